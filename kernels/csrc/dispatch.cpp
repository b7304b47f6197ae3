// The C ABI: chooses an instruction set at run time and passes each op on to it.

#include <atomic>

#include "abi.h"

#ifdef FLOWGRPO_X86
#include <cpuid.h>
#endif

#define FG_EXPORT extern "C" __attribute__((visibility("default")))

namespace isa_baseline {
extern const Kernels kernels;
}
#ifdef FLOWGRPO_X86
namespace isa_avx2 {
extern const Kernels kernels;
}
namespace isa_avx512 {
extern const Kernels kernels;
}
#endif

namespace {

#ifdef FLOWGRPO_X86
// Conversions of float16, of which compilers' __builtin_cpu_supports knows only since lately.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
#endif

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
int32_t best() {
#ifdef FLOWGRPO_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !has_f16c()) return 0;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? 2
             : 1;
#else
  return 0;
#endif
}

// Any thread may make the first call. Nothing else is published with the number, so the order of
// other memory accesses does not matter.
std::atomic<int32_t> selected{-1};

int32_t select(int32_t isa) {
  selected.store(isa, std::memory_order_relaxed);
  return isa;
}

const Kernels& kernels() {
  const int32_t isa = selected.load(std::memory_order_relaxed);
  switch (isa < 0 ? select(best()) : isa) {
#ifdef FLOWGRPO_X86
    case 2:
      return isa_avx512::kernels;
    case 1:
      return isa_avx2::kernels;
#endif
    default:
      return isa_baseline::kernels;
  }
}

}  // namespace

FG_EXPORT int32_t flowgrpo_native_abi(void) { return FLOWGRPO_ABI; }
FG_EXPORT int64_t flowgrpo_native_args_size(void) { return (int64_t)sizeof(FgArgs); }
FG_EXPORT const char* flowgrpo_native_version(void) { return FLOWGRPO_VERSION; }
FG_EXPORT int32_t flowgrpo_native_isa_best(void) { return best(); }
FG_EXPORT int32_t flowgrpo_native_isa_select(int32_t wanted) {
  return select(wanted >= 0 && wanted <= best() ? wanted : best());
}
FG_EXPORT int32_t flowgrpo_native_openmp(void) { return FLOWGRPO_OPENMP_FOUND; }

FG_EXPORT int32_t flowgrpo_native_sde_step(const FgArgs* a) { return kernels().sde_step(a); }
FG_EXPORT int32_t flowgrpo_native_log_prob(const FgArgs* a) { return kernels().log_prob(a); }
FG_EXPORT int32_t flowgrpo_native_log_prob_backward(const FgArgs* a) {
  return kernels().log_prob_backward(a);
}
FG_EXPORT int32_t flowgrpo_native_log_prob_mean(const FgArgs* a) {
  return kernels().log_prob_mean(a);
}
FG_EXPORT int32_t flowgrpo_native_log_prob_mean_backward(const FgArgs* a) {
  return kernels().log_prob_mean_backward(a);
}
FG_EXPORT int32_t flowgrpo_native_grpo_loss_forward(const FgArgs* a) {
  return kernels().grpo_loss_forward(a);
}
FG_EXPORT int32_t flowgrpo_native_grpo_loss_backward(const FgArgs* a) {
  return kernels().grpo_loss_backward(a);
}
FG_EXPORT int32_t flowgrpo_native_grpo_loss_gradient(const FgArgs* a) {
  return kernels().grpo_loss_gradient(a);
}
FG_EXPORT int32_t flowgrpo_native_nft_loss_forward(const FgArgs* a) {
  return kernels().nft_loss_forward(a);
}
FG_EXPORT int32_t flowgrpo_native_nft_loss_backward(const FgArgs* a) {
  return kernels().nft_loss_backward(a);
}
FG_EXPORT int32_t flowgrpo_native_nft_loss_gradient(const FgArgs* a) {
  return kernels().nft_loss_gradient(a);
}
FG_EXPORT int32_t flowgrpo_native_normals(const FgArgs* a, uint32_t noise_step) {
  return kernels().normals(a, noise_step);
}
