// Launches a compiled GPU kernel: one call with two arguments for Python, in place of one with eleven.
// Nothing of CUDA is needed to build this: the driver's function comes in the record.

#include "abi.h"

// Keys of the last argument of cuLaunchKernel (cuda.h): the parameters as they lie in memory.
#define FG_PARAM_POINTER ((void*)1)
#define FG_PARAM_SIZE ((void*)2)
#define FG_PARAM_END ((void*)0)

extern "C" __attribute__((visibility("default"))) int32_t flowgrpo_native_cuda_launch(
    const void* kernel, const void* launch) {
  const FgKernel* k = (const FgKernel*)kernel;
  const FgLaunch* a = (const FgLaunch*)launch;
  const uint32_t* words = (const uint32_t*)(a + 1);
  uint32_t bits = 0;
  for (uint64_t left = k->sixteenths; left != 0; left &= left - 1) bits |= words[__builtin_ctzll(left)];
  if (bits & 15) return FG_MISALIGNED;
  size_t bytes = k->bytes;
  // The driver copies the parameters before it returns.
  void* extra[] = {FG_PARAM_POINTER, (void*)words, FG_PARAM_SIZE, &bytes, FG_PARAM_END};
  return k->launch(k->function, (uint32_t)a->programs, 1, 1, k->threads, 1, 1, k->shared, a->stream,
                   nullptr, extra);
}
