// Launches a compiled GPU kernel: one call for Python, in place of one that converts eleven arguments.
// Nothing of CUDA is needed to build this: the driver's function comes in the record.

#include "abi.h"

// Keys of the last argument of cuLaunchKernel (cuda.h): the parameters as they lie in memory.
#define FG_PARAM_POINTER ((void*)1)
#define FG_PARAM_SIZE ((void*)2)
#define FG_PARAM_END ((void*)0)

extern "C" __attribute__((visibility("default"))) int32_t flowgrpo_native_cuda_launch(
    const void* record) {
  const FgLaunch* a = (const FgLaunch*)record;
  size_t bytes = a->bytes;
  // The driver copies the parameters before it returns.
  void* extra[] = {FG_PARAM_POINTER, (void*)(a + 1), FG_PARAM_SIZE, &bytes, FG_PARAM_END};
  return a->launch(a->function, a->programs, 1, 1, a->threads, 1, 1, a->shared, a->stream, nullptr,
                   extra);
}
