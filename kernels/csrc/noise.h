// Counter-based standard normals, as philox.py defines them, bit for bit: Philox4x32-10 words, then
// Box-Muller with short polynomials. See philox.py for the formula, the accuracy and the sources.
#pragma once

#include "simd.h"

namespace FLOWGRPO_ISA {

struct Words {
  vu w0, w1, w2, w3;
};

// Chains of rounds computed side by side: a round waits for the one before it, and two chains fill
// the wait. More registers than two need only AVX-512 has.
constexpr int kChains = kLanes == 16 ? 2 : 1;
// Normals of one call.
constexpr int kNormals = 4 * kLanes * kChains;

// What the counters (low, high, step, 0) of one seed have in common, whatever the low word.
struct Counters {
  // Whole vectors: a round reads its keys from memory instead of spreading them out each time.
  vu key0[10], key1[10];
  // What rounds 1 and 2 add to words 0 and 2 (xor) and make of word 3.
  vu word1, word2, word3;
};

constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;

static inline Counters counters(uint64_t seed, uint32_t step, uint32_t high) {
  Counters c;
  for (uint32_t i = 0; i < 10; ++i) {
    c.key0[i] = splat_u((uint32_t)seed + i * 0x9E3779B9u);
    c.key1[i] = splat_u((uint32_t)(seed >> 32) + i * 0xBB67AE85u);
  }
  const uint64_t product1 = (uint64_t)step * kMul1;
  const uint32_t word0 = (uint32_t)(product1 >> 32) ^ high ^ (uint32_t)seed;
  const uint64_t product0 = (uint64_t)word0 * kMul0;
  c.word1 = splat_u((uint32_t)product1) ^ c.key0[1];
  c.word2 = splat_u((uint32_t)(product0 >> 32)) ^ c.key1[1];
  c.word3 = splat_u((uint32_t)product0);
  return c;
}

// Rounds 1 and 2, in which half of the words are still the same for all counters.
FG_INLINE Words first_rounds(const Counters& c, vu low) {
  vu hi, lo, hi1, lo1;
  mul_wide(low, kMul0, hi, lo);
  mul_wide(hi ^ c.key1[0], kMul1, hi1, lo1);
  return {hi1 ^ c.word1, lo1, lo ^ c.word2, c.word3};
}

FG_INLINE Words philox_round(const Words& w, vu key0, vu key1) {
  vu hi0, lo0, hi1, lo1;
  mul_wide(w.w0, kMul0, hi0, lo0);
  mul_wide(w.w2, kMul1, hi1, lo1);
  return {hi1 ^ w.w1 ^ key0, lo1, hi0 ^ w.w3 ^ key1, lo0};
}

template <int N>
FG_INLINE vf horner(const float (&c)[N], vf x) {
  vf result = x * c[N - 1] + c[N - 2];
  for (int i = N - 3; i >= 0; --i) result = result * x + c[i];
  return result;
}

FG_INLINE void box_muller(vu radius, vu angle, vf& z0, vf& z1) {
  constexpr float kLog[] = {-2.0f,        0.999999762f,  -0.666683733f, 0.500041485f, -0.399136662f,
                            0.331247866f, -0.299045354f, 0.287336797f,  -0.174446985f};
  constexpr float kSin[] = {1.57079637f, -0.64596349f, 0.079680033f, -0.00460165786f};
  constexpr float kCos[] = {-1.23369765f, 0.25360322f, -0.0204172824f};
  // u 2^32; the scale comes off its exponent, with the one that puts f into [sqrt(1/2), sqrt(2)).
  const vf u = to_float(radius) + 0.5f;
  const vu bits = as_bits(u) - (0x3F3504F3u + (32u << 23));
  const vi e = (vi)bits >> 23;
  vf f = as_float((bits & 0x7FFFFFu) + 0x3F3504F3u) - 1.0f;
  const vf r = sqrt_v(__builtin_convertvector(e, vf) * -1.38629436f + f * horner(kLog, f));

  f = __builtin_convertvector((vi)(angle << 2), vf) * 0x1p-32f;
  const vf z = f * f;
  vf s = f * horner(kSin, z);
  vf c = z * horner(kCos, z) + 1.0f;
  c = as_float(as_bits(c) ^ (angle & 0x80000000u));
  order_by_bit(angle, 0x40000000u, s, c);
  z0 = r * s;
  z1 = r * c;
}

// Transposes the 4x4 matrices that the four vectors hold in each 128-bit quarter.
FG_INLINE void transpose4(vf& a, vf& b, vf& c, vf& d) {
#if FLOWGRPO_LANES == 16 && defined(__AVX512F__)
  const __m512 t0 = _mm512_unpacklo_ps((__m512)a, (__m512)b);
  const __m512 t1 = _mm512_unpackhi_ps((__m512)a, (__m512)b);
  const __m512 t2 = _mm512_unpacklo_ps((__m512)c, (__m512)d);
  const __m512 t3 = _mm512_unpackhi_ps((__m512)c, (__m512)d);
  a = (vf)_mm512_shuffle_ps(t0, t2, 0x44);
  b = (vf)_mm512_shuffle_ps(t0, t2, 0xEE);
  c = (vf)_mm512_shuffle_ps(t1, t3, 0x44);
  d = (vf)_mm512_shuffle_ps(t1, t3, 0xEE);
#elif FLOWGRPO_LANES == 8 && defined(__AVX__)
  const __m256 t0 = _mm256_unpacklo_ps((__m256)a, (__m256)b);
  const __m256 t1 = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  const __m256 t2 = _mm256_unpacklo_ps((__m256)c, (__m256)d);
  const __m256 t3 = _mm256_unpackhi_ps((__m256)c, (__m256)d);
  a = (vf)_mm256_shuffle_ps(t0, t2, 0x44);
  b = (vf)_mm256_shuffle_ps(t0, t2, 0xEE);
  c = (vf)_mm256_shuffle_ps(t1, t3, 0x44);
  d = (vf)_mm256_shuffle_ps(t1, t3, 0xEE);
#elif FLOWGRPO_LANES == 4 && defined(__SSE2__)
  __m128 r0 = (__m128)a, r1 = (__m128)b, r2 = (__m128)c, r3 = (__m128)d;
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  a = (vf)r0, b = (vf)r1, c = (vf)r2, d = (vf)r3;
#else
  const vf in[4] = {a, b, c, d};
  vf out[4] = {};
  for (int q = 0; q < kLanes; q += 4)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) out[i][q + j] = in[j][q + i];
  a = out[0], b = out[1], c = out[2], d = out[3];
#endif
}

// kNormals normals of consecutive elements, the first of which is 4 * low of the row's part that
// has these counters; low + kNormals / 4 must not pass 2^32.
FG_INLINE void normals(const Counters& counters, uint32_t low, vf* out) {
  // Lane 4k + m computes the counter that the in-quarter transpose moves to its place.
  vu offset;
  for (int i = 0; i < kLanes; ++i) offset[i] = (uint32_t)((kLanes / 4) * (i % 4) + i / 4);
  Words w[kChains];
  for (int i = 0; i < kChains; ++i)
    w[i] = first_rounds(counters, offset + (low + (uint32_t)(i * kLanes)));
#pragma GCC unroll 8
  for (int r = 2; r < 10; ++r)
    for (int i = 0; i < kChains; ++i) w[i] = philox_round(w[i], counters.key0[r], counters.key1[r]);
  for (int i = 0; i < kChains; ++i) {
    vf* z = out + 4 * i;
    box_muller(w[i].w0, w[i].w1, z[0], z[1]);
    box_muller(w[i].w2, w[i].w3, z[2], z[3]);
    transpose4(z[0], z[1], z[2], z[3]);
  }
}

}  // namespace FLOWGRPO_ISA
