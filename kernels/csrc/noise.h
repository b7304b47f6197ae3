// Counter-based standard normals, as philox.py defines them, bit for bit: Philox4x32-10 words, then
// Box-Muller with short polynomials. See philox.py for the formula, the accuracy and the sources.
#pragma once

#include "simd.h"

namespace FLOWGRPO_ISA {

struct Words {
  vu w0, w1, w2, w3;
};

FG_INLINE Words philox(Words c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    vu hi0, lo0, hi1, lo1;
    mul_wide(c.w0, 0xD2511F53u, hi0, lo0);
    mul_wide(c.w2, 0xCD9E8D57u, hi1, lo1);
    c = {hi1 ^ c.w1 ^ key0, lo1, hi0 ^ c.w3 ^ key1, lo0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
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
  const vf u = to_float(radius) * 0x1p-32f + 0x1p-33f;
  const vu bits = as_bits(u);
  const vi e = (vi)(bits - 0x3F3504F3u) >> 23;
  vf f = as_float(bits - ((vu)e << 23)) - 1.0f;
  const vf r = sqrt_v(__builtin_convertvector(e, vf) * -1.38629436f + f * horner(kLog, f));

  f = __builtin_convertvector((vi)(angle << 2), vf) * 0x1p-32f;
  const vf z = f * f;
  const vf s = f * horner(kSin, z);
  vf c = z * horner(kCos, z) + 1.0f;
  c = as_float(as_bits(c) ^ (angle & 0x80000000u));
  const vi swap = (vi)(angle << 1) < 0;
  z0 = r * select(swap, s, c);
  z1 = r * select(swap, c, s);
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

// The normals of 4 kLanes consecutive elements, the first of which is 4 * block. Lane 4k + m
// computes the block that the in-quarter transpose moves to its place in memory order.
FG_INLINE void normals(uint64_t seed, uint32_t step, uint64_t block, vf out[4]) {
  vu offset;
  for (int i = 0; i < kLanes; ++i) offset[i] = (uint32_t)((kLanes / 4) * (i % 4) + i / 4);
  const vu low = offset + (uint32_t)block;
  // Blocks past 2^32 carry into the second word.
  const vu high = (uint32_t)(block >> 32) - (vu)(low < splat_u((uint32_t)block));
  const Words w =
      philox({low, high, splat_u(step), splat_u(0)}, (uint32_t)seed, (uint32_t)(seed >> 32));
  box_muller(w.w0, w.w1, out[0], out[1]);
  box_muller(w.w2, w.w3, out[2], out[3]);
  transpose4(out[0], out[1], out[2], out[3]);
}

}  // namespace FLOWGRPO_ISA
