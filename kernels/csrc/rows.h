// Groups of 64 consecutive elements, and sums in the fixed order of the numerical contract.
#pragma once

#include "abi.h"
#include "simd.h"

namespace FLOWGRPO_ISA {

constexpr int kGroup = 64;
constexpr int kVectors = kGroup / kLanes;
// Blocks and lanes of a row sum; changing them changes the last bits of every log_prob.
constexpr int kBlock = 4096;
constexpr int kSumLanes = 1024;

struct Group {
  vf v[kVectors];
};

// One row of an FgTensor; absent when data is NULL.
struct Row {
  char* data;
  int64_t dtype;
};

FG_INLINE int64_t item_size(int64_t dtype) { return dtype == FG_FLOAT32 ? 4 : 2; }
FG_INLINE Row row_of(const FgTensor& t, int64_t row) {
  if (t.data == nullptr) return {nullptr, t.dtype};
  return {(char*)t.data + row * t.row_stride * item_size(t.dtype), t.dtype};
}

FG_INLINE Group load_full(const char* p, int64_t dtype) {
  Group g;
  switch (dtype) {
    case FG_BFLOAT16:
      for (int i = 0; i < kVectors; ++i) g.v[i] = load((const bf16*)p + i * kLanes);
      break;
    case FG_FLOAT16:
      for (int i = 0; i < kVectors; ++i) g.v[i] = load((const fp16*)p + i * kLanes);
      break;
    default:
      for (int i = 0; i < kVectors; ++i) g.v[i] = load((const float*)p + i * kLanes);
  }
  return g;
}

FG_INLINE void store_full(char* p, int64_t dtype, const Group& g) {
  switch (dtype) {
    case FG_BFLOAT16:
      for (int i = 0; i < kVectors; ++i) store((bf16*)p + i * kLanes, g.v[i]);
      break;
    case FG_FLOAT16:
      for (int i = 0; i < kVectors; ++i) store((fp16*)p + i * kLanes, g.v[i]);
      break;
    default:
      for (int i = 0; i < kVectors; ++i) store((float*)p + i * kLanes, g.v[i]);
  }
}

// How far ahead, in bytes, a pass asks for what it will read or write: the hardware's own prefetch
// ends at every page of 4 KiB, and behind it waits the memory.
constexpr int kAhead = 4096;

template <int kWrite>
FG_INLINE void fetch(const char* p, int64_t size) {
  for (int64_t i = 0; i < kGroup * size; i += 64) __builtin_prefetch(p + kAhead + i, kWrite);
}

// A group of which only the first n elements exist: the rest reads as 0 and is not written.
FG_INLINE Group load_group(const Row& row, int64_t start, int n) {
  const int64_t size = item_size(row.dtype);
  const char* p = row.data + start * size;
  if (__builtin_expect(n == kGroup, 1)) {
    fetch<0>(p, size);
    return load_full(p, row.dtype);
  }
  char padded[4 * kGroup] = {};
  std::memcpy(padded, p, (size_t)(n * size));
  return load_full(padded, row.dtype);
}
FG_INLINE void store_group(const Row& row, int64_t start, int n, const Group& g) {
  const int64_t size = item_size(row.dtype);
  char* p = row.data + start * size;
  if (__builtin_expect(n == kGroup, 1)) {
    fetch<1>(p, size);
    return store_full(p, row.dtype, g);
  }
  char padded[4 * kGroup];
  store_full(padded, row.dtype, g);
  std::memcpy(p, padded, (size_t)(n * size));
}

// For what is written once and not read soon: the line is not fetched first, nor kept.
FG_INLINE void stream_group(const Row& row, int64_t start, int n, const Group& g) {
  float* p = (float*)row.data + start;
  if (n != kGroup || ((uintptr_t)p & 63) != 0) return store_group(row, start, n, g);
  for (int i = 0; i < kVectors; ++i) stream(p + i * kLanes, g.v[i]);
}

// The values that storing and loading again would give.
FG_INLINE Group rounded(const Group& g, int64_t dtype) {
  Group r = g;
  if (dtype == FG_BFLOAT16)
    for (int i = 0; i < kVectors; ++i) r.v[i] = rounded_to((const bf16*)nullptr, g.v[i]);
  else if (dtype == FG_FLOAT16)
    for (int i = 0; i < kVectors; ++i) r.v[i] = rounded_to((const fp16*)nullptr, g.v[i]);
  return r;
}

// x[0] = the sum of n = 2^p values by adjacent pairs; scratch holds n / 2.
static void pair_tree(float* __restrict x, float* __restrict scratch, int n) {
  float* from = x;
  float* to = scratch;
  while (n > 1) {
    n /= 2;
    const float* __restrict in = from;
    float* __restrict out = to;
    for (int i = 0; i < n; ++i) out[i] = in[2 * i] + in[2 * i + 1];
    from = out;
    to = (float*)in;
  }
  x[0] = from[0];
}

FG_INLINE int lanes_for(int64_t n) {
  int lanes = 1;
  while (lanes < n && lanes < kSumLanes) lanes *= 2;
  return lanes;
}

// Values of one block of a row, added up as they come: chunk by chunk onto the lanes, then by pairs.
struct BlockSum {
  alignas(64) float lanes[kSumLanes];

  // Adds the squares of elements [at, at + n) of the block; n <= 64 and at is a multiple of 64.
  inline __attribute__((always_inline)) void add(int at, int n, const Group& g) {
    Group sq;
    for (int i = 0; i < kVectors; ++i) sq.v[i] = g.v[i] * g.v[i];
    add_values(at, n, sq);
  }
  // The same of the magnitudes.
  inline __attribute__((always_inline)) void add_magnitudes(int at, int n, const Group& g) {
    Group magnitude;
    for (int i = 0; i < kVectors; ++i)
      magnitude.v[i] = as_float(as_bits(g.v[i]) & splat_u(0x7fffffffu));
    add_values(at, n, magnitude);
  }

  // The same of the values themselves.
  inline __attribute__((always_inline)) void add_values(int at, int n, Group x) {
    float* lane = lanes + at % kSumLanes;
    if (__builtin_expect(n != kGroup, 0)) {
      // Behind the last element stands what was computed from zeros, not yet a missing +0.
      alignas(64) float values[kGroup];
      for (int i = 0; i < kVectors; ++i) store(values + i * kLanes, x.v[i]);
      for (int i = n; i < kGroup; ++i) values[i] = 0.0f;
      for (int i = 0; i < kVectors; ++i) x.v[i] = load(values + i * kLanes);
    }
    if (at >= kSumLanes)
      for (int i = 0; i < kVectors; ++i) x.v[i] = load(lane + i * kLanes) + x.v[i];
    for (int i = 0; i < kVectors; ++i) store(lane + i * kLanes, x.v[i]);
  }

  // The sum of the block's `count` elements.
  float finish(int count) {
    alignas(64) float scratch[kSumLanes / 2];
    const int width = lanes_for(count);
    for (int i = (count + kGroup - 1) / kGroup * kGroup; i < width; ++i) lanes[i] = 0.0f;
    pair_tree(lanes, scratch, width);
    return lanes[0];
  }
};

// The second pass: any number of values, chunks of kSumLanes added lane by lane, then by pairs.
static float ordered_sum(const float* values, int64_t n) {
  alignas(64) float lanes[kSumLanes], scratch[kSumLanes / 2];
  const int width = lanes_for(n);
  for (int i = 0; i < width; ++i) lanes[i] = i < n ? values[i] : 0.0f;
  for (int64_t at = width; at < n; at += width) {
    const int64_t left = n - at < width ? n - at : width;
    for (int64_t i = 0; i < left; ++i) lanes[i] += values[at + i];
  }
  pair_tree(lanes, scratch, width);
  return lanes[0];
}

}  // namespace FLOWGRPO_ISA
