// Vectors of the compiled instruction set, dtype conversions and elementary functions.
//
// This header is compiled once per instruction set (FLOWGRPO_LANES = 4, 8 or 16 floats a vector).
// Every operation is an IEEE-754 single operation per element (add, multiply, divide, square root)
// and contraction into fused multiply-adds is switched off, so all instruction sets give the same
// bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef FLOWGRPO_LANES
#error "FLOWGRPO_LANES must be 4, 8 or 16"
#endif

namespace FLOWGRPO_ISA {

constexpr int kLanes = FLOWGRPO_LANES;

typedef float vf __attribute__((vector_size(4 * FLOWGRPO_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * FLOWGRPO_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * FLOWGRPO_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * FLOWGRPO_LANES)));

#define FG_INLINE static inline __attribute__((always_inline))

FG_INLINE vf splat(float x) { return x - vf{}; }
FG_INLINE vu splat_u(uint32_t x) { return x - vu{}; }

FG_INLINE vf as_float(vu x) { return (vf)x; }
FG_INLINE vu as_bits(vf x) { return (vu)x; }

FG_INLINE vf sqrt_v(vf x) {
#if FLOWGRPO_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif FLOWGRPO_LANES == 8 && defined(__AVX__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif FLOWGRPO_LANES == 4 && defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

// High and low halves of the 64-bit products x * m, per lane.
FG_INLINE void mul_wide(vu x, uint32_t m, vu& hi, vu& lo) {
#if FLOWGRPO_LANES == 16 && defined(__AVX512F__)
  const __m512i mm = _mm512_set1_epi32((int)m), xx = (__m512i)x;
  // Shuffles, not shifts: shifts would queue behind the multiplications for the same port.
  const __m512i even = _mm512_mul_epu32(xx, mm);
  const __m512i odd = _mm512_mul_epu32(_mm512_shuffle_epi32(xx, (_MM_PERM_ENUM)0xF5), mm);
  hi = (vu)_mm512_mask_shuffle_epi32(odd, 0x5555, even, (_MM_PERM_ENUM)0xF5);
  lo = (vu)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, (_MM_PERM_ENUM)0xA0);
#elif FLOWGRPO_LANES == 8 && defined(__AVX2__)
  const __m256i mm = _mm256_set1_epi32((int)m), xx = (__m256i)x;
  const __m256i even = _mm256_mul_epu32(xx, mm);
  const __m256i odd = _mm256_mul_epu32(_mm256_shuffle_epi32(xx, 0xF5), mm);
  hi = (vu)_mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xF5), odd, 0xAA);
  lo = (vu)_mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA);
#elif FLOWGRPO_LANES == 4 && defined(__SSE2__)
  const __m128i mm = _mm_set1_epi32((int)m), xx = (__m128i)x;
  const __m128i low = _mm_set_epi32(0, -1, 0, -1);
  const __m128i even = _mm_mul_epu32(xx, mm);
  const __m128i odd = _mm_mul_epu32(_mm_srli_epi64(xx, 32), mm);
  hi = (vu)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_andnot_si128(low, odd));
  lo = (vu)_mm_or_si128(_mm_and_si128(low, even), _mm_slli_epi64(odd, 32));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t p = (uint64_t)x[i] * m;
    hi[i] = (uint32_t)(p >> 32);
    lo[i] = (uint32_t)p;
  }
#endif
}

// The nearest float of each unsigned integer: the halves convert exactly and the sum rounds once.
FG_INLINE vf to_float(vu x) {
#if FLOWGRPO_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_cvtepu32_ps((__m512i)x);
#else
  const vf high = __builtin_convertvector((vi)(x >> 16), vf);
  const vf low = __builtin_convertvector((vi)(x & 0xffffu), vf);
  return high * 65536.0f + low;
#endif
}

// ---- dtypes: float32 by itself, bfloat16 and float16 as their 16 bits ----

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

FG_INLINE vu widen(const void* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
}
FG_INLINE void narrow(void* p, vu x) {
  const vh h = __builtin_convertvector(x, vh);
  std::memcpy(p, &h, sizeof h);
}

FG_INLINE vf select(vi mask, vf yes, vf no) {
  return (vf)(((vu)mask & (vu)yes) | (~(vu)mask & (vu)no));
}
FG_INLINE vu select_u(vi mask, vu yes, vu no) { return ((vu)mask & yes) | (~(vu)mask & no); }

// (yes, no) where the bit is set in x, else (no, yes).
FG_INLINE void order_by_bit(vu x, uint32_t bit, vf& yes, vf& no) {
#if FLOWGRPO_LANES == 16 && defined(__AVX512F__)
  const __mmask16 set = _mm512_test_epi32_mask((__m512i)x, _mm512_set1_epi32((int)bit));
  const __m512 a = (__m512)yes, b = (__m512)no;
  yes = (vf)_mm512_mask_blend_ps(set, b, a);
  no = (vf)_mm512_mask_blend_ps(set, a, b);
#else
  const vi set = (x & bit) != 0u;
  const vf a = yes, b = no;
  yes = select(set, a, b);
  no = select(set, b, a);
#endif
}

FG_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FG_INLINE vf load(const bf16* p) { return as_float(widen(p) << 16); }
// binary16 -> binary32, exact: exponent and mantissa are shifted into place and the exponent is
// rebiased by 112; infinities and NaN get the exponent 255. A subnormal becomes the mantissa of a
// number in [2^-14, 2^-13), from which 2^-14 is subtracted: no float32 on the way is subnormal, so
// the result does not depend on whether those are flushed to zero.
FG_INLINE vf from_fp16_bits(vu h) {
  const vu magnitude = (h & 0x7fffu) << 13;
  const vu normal = magnitude + splat_u(112u << 23);
  const vu small = as_bits(as_float(magnitude | splat_u(113u << 23)) - splat(0x1p-14f));
  const vi special = (vi)magnitude >= (vi)splat_u(0x7c00u << 13);
  const vu x = select_u((vi)magnitude < (vi)splat_u(0x0400u << 13), small, normal);
  return as_float(select_u(special, magnitude | splat_u(0x7f800000u), x) | ((h & 0x8000u) << 16));
}
// The instructions that do the same take subnormals as they are, whatever the mode of the thread.
FG_INLINE vf load(const fp16* p) {
#if FLOWGRPO_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif FLOWGRPO_LANES == 8 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  return from_fp16_bits(widen(p));
#endif
}

// Round to nearest even; NaN becomes torch's NaN.
FG_INLINE vu to_bf16_bits(vf x) {
  const vu b = as_bits(x);
  const vu rounded = (b + splat_u(0x7fffu) + ((b >> 16) & 1u)) >> 16;
  return select_u(x != x, splat_u(0x7fc0u), rounded);
}
FG_INLINE vu to_fp16_bits(vf x) {
  const vu b = as_bits(x), sign = b & 0x80000000u;
  const vu a = b ^ sign;
  // Normal results: rebias the exponent by -112 and round the 13 dropped bits to even.
  const vu normal = (a + splat_u(0xc8000fffu) + ((a >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 leaves the rounded mantissa in the low bits of the sum.
  const vu subnormal = as_bits(as_float(a) + splat(0.5f)) - splat_u(0x3f000000u);
  vu h = select_u((vi)a < (vi)splat_u(0x38800000u), subnormal, normal);
  h = select_u((vi)a >= (vi)splat_u(0x47800000u), splat_u(0x7c00u), h);
  h = select_u((vi)a > (vi)splat_u(0x7f800000u), splat_u(0x7e00u), h);
  return h | (sign >> 16);
}

FG_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
// Past the caches, to an address that is a multiple of a vector's size; visible to other threads
// after a fence.
FG_INLINE void stream(float* p, vf x) {
#if FLOWGRPO_LANES == 16 && defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif FLOWGRPO_LANES == 8 && defined(__AVX__)
  _mm256_stream_ps(p, (__m256)x);
#elif FLOWGRPO_LANES == 4 && defined(__SSE2__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}
FG_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
FG_INLINE void store(bf16* p, vf x) { narrow(p, to_bf16_bits(x)); }
FG_INLINE void store(fp16* p, vf x) { narrow(p, to_fp16_bits(x)); }

// The value that storing and loading would give.
FG_INLINE vf rounded_to(const float*, vf x) { return x; }
FG_INLINE vf rounded_to(const bf16*, vf x) { return as_float(to_bf16_bits(x) << 16); }
FG_INLINE vf rounded_to(const fp16*, vf x) { return from_fp16_bits(to_fp16_bits(x)); }

}  // namespace FLOWGRPO_ISA
