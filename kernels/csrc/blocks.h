// Work on (row, block) pairs: what a row reads, how it is divided among threads.
//
// A pair writes its own elements and its own partial sums; the partial sums of a row are added in
// order when all of them are there. So results do not depend on who computed what.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "rows.h"

namespace FLOWGRPO_ISA {

// Below this many elements waking the other threads costs more than it saves.
constexpr int64_t kSerialElements = 32768;

// How this thread treats subnormals and rounds: a register of each thread, which
// torch.set_flush_denormal changes in the calling one alone.
#if defined(__SSE2__)
FG_INLINE uint64_t float_mode() { return _mm_getcsr(); }
FG_INLINE void set_float_mode(uint64_t mode) { _mm_setcsr((uint32_t)mode); }
#elif defined(__aarch64__)
FG_INLINE uint64_t float_mode() {
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
FG_INLINE void set_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
FG_INLINE uint64_t float_mode() { return 0; }
FG_INLINE void set_float_mode(uint64_t) {}
#endif

// Gives a thread the mode of another one for as long as it lives.
class FloatMode {
 public:
  explicit FloatMode(uint64_t mode) : before_(float_mode()) { change(mode); }
  ~FloatMode() { change(before_); }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  // Fences for the compiler: what is loaded between them is not computed with outside.
  static void change(uint64_t mode) {
    __asm__ volatile("" : : : "memory");
    set_float_mode(mode);
    __asm__ volatile("" : : : "memory");
  }

  const uint64_t before_;
};

// Ends what a thread has streamed.
struct StreamFence {
  ~StreamFence() { stream_fence(); }
};

struct Coefficients {
  float A, B, C, k, c0, K, abs_dt, noise_step, std_dev, sigma;
};

static inline Coefficients coefficients(const FgArgs& a, int64_t row) {
  const int64_t step = a.step[row];
  if (step < 0 || step >= a.table_rows) {
    const float nan = NAN;
    return {nan, nan, nan, nan, nan, nan, nan, 0.0f, nan, nan};
  }
  const float* t = a.table + step * a.table_columns;
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9]};
}

// A row that has neither noise nor a score.
FG_INLINE bool quiet(const Coefficients& c) { return c.C == 0.0f && c.k == 0.0f; }

static inline int64_t blocks_of(const FgArgs& a) { return (a.elements + kBlock - 1) / kBlock; }

// For every row: before(row, block) for its blocks, then finish(row), then after(row, block).
//
// Whole rows go to one thread each, which finds what `before` read in its cache when `after` reads
// it again (three float32 latents of 16 x 64 x 64 are 0.75 MiB). Rows that are left over, or fewer
// than threads, are worked on by all threads, block by block.
template <class Before, class Finish, class After>
void for_rows(const FgArgs& a, Before before, Finish finish, After after) {
  const int64_t blocks = blocks_of(a);
  const bool serial = a.threads <= 1 || a.rows * a.elements < kSerialElements;
  const int threads = serial ? 1 : (int)a.threads;
  const int64_t whole = a.rows - a.rows % threads;
  const int64_t shared = (a.rows - whole) * blocks;
  const uint64_t mode = float_mode();
#pragma omp parallel num_threads(threads) if (!serial)
  {
    // Every element is computed as the calling thread would, whichever thread does.
    const FloatMode same(mode);
    const StreamFence streamed;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < whole; ++row) {
      for (int64_t block = 0; block < blocks; ++block) before(row, block);
      finish(row);
      for (int64_t block = 0; block < blocks; ++block) after(row, block);
    }
    if (whole < a.rows) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < shared; ++i) before(whole + i / blocks, i % blocks);
#pragma omp for schedule(static)
      for (int64_t row = whole; row < a.rows; ++row) finish(row);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < shared; ++i) after(whole + i / blocks, i % blocks);
    }
  }
}

// The same without a second pass over the blocks, or with nothing else.
template <class Before, class Finish>
void for_rows(const FgArgs& a, Before before, Finish finish) {
  for_rows(a, before, finish, [](int64_t, int64_t) {});
}
template <class Work>
void for_blocks(const FgArgs& a, Work work) {
  for_rows(a, work, [](int64_t) {});
}

// What one row reads, and the pieces of it that every op needs.
struct Inputs {
  Coefficients c;
  float w;
  Row velocity, uncond, sample;

  Inputs(const FgArgs& a, int64_t row)
      : c(coefficients(a, row)),
        w(a.guidance_scale),
        velocity(row_of(a.velocity, row)),
        uncond(row_of(a.uncond_velocity, row)),
        sample(row_of(a.sample, row)) {}
};

FG_INLINE Group guided(const Row& velocity, const Row& uncond, float w, int64_t at, int n) {
  Group v = load_group(velocity, at, n);
  if (uncond.data != nullptr) {
    const Group u = load_group(uncond, at, n);
    for (int i = 0; i < kVectors; ++i) v.v[i] = u.v[i] + (v.v[i] - u.v[i]) * w;
  }
  return v;
}

FG_INLINE Group mean_of(const Inputs& in, const Group& v, const Group& x) {
  Group mu;
  for (int i = 0; i < kVectors; ++i) mu.v[i] = x.v[i] * in.c.A + v.v[i] * in.c.B;
  return mu;
}
FG_INLINE Group mean(const Inputs& in, const Group& v, int64_t at, int n) {
  return mean_of(in, v, load_group(in.sample, at, n));
}
FG_INLINE Group x0_of(const Inputs& in, const Group& v, const Group& x) {
  Group x0;
  for (int i = 0; i < kVectors; ++i) x0.v[i] = x.v[i] - v.v[i] * in.c.sigma;
  return x0;
}

FG_INLINE Group difference(const Group& a, const Group& b) {
  Group r;
  for (int i = 0; i < kVectors; ++i) r.v[i] = a.v[i] - b.v[i];
  return r;
}

// log_prob of a row from the sum of its squared residuals.
static inline float score(const Coefficients& c, float sum, int64_t elements) {
  if (quiet(c)) return 0.0f;
  const float m = sum / (float)(elements > 0 ? elements : 1);
  return -(c.k * m) - c.c0;
}

struct Span {
  int64_t start;
  int count;
};
static inline Span span_of(const FgArgs& a, int64_t block) {
  const int64_t start = block * kBlock, left = a.elements - start;
  return {start, (int)(left < kBlock ? left : kBlock)};
}

// The sums of every block, kept until those of a row are complete. Sums: a struct of floats.
template <class Sums>
class RowSums {
 public:
  explicit RowSums(const FgArgs& a)
      : blocks_(blocks_of(a)),
        stride_(a.rows * blocks_),
        sums_((float*)malloc(sizeof(float) * (size_t)(kCount * stride_ + 1))) {}
  ~RowSums() { free(sums_); }
  RowSums(const RowSums&) = delete;
  RowSums& operator=(const RowSums&) = delete;

  bool failed() const { return sums_ == nullptr; }
  void set(int64_t row, int64_t block, const Sums& s) {
    float values[kCount];
    std::memcpy(values, &s, sizeof s);
    for (int i = 0; i < kCount; ++i) sums_[i * stride_ + row * blocks_ + block] = values[i];
  }
  Sums of(int64_t row) const {
    float values[kCount];
    for (int i = 0; i < kCount; ++i)
      values[i] = ordered_sum(sums_ + i * stride_ + row * blocks_, blocks_);
    Sums s;
    std::memcpy(&s, values, sizeof s);
    return s;
  }

 private:
  static constexpr int kCount = sizeof(Sums) / sizeof(float);
  const int64_t blocks_, stride_;
  float* const sums_;
};

// c x, 0 where c is 0: there x may be infinite or NaN.
FG_INLINE Group term(const Group& x, float c) {
  Group r{};
  if (c != 0.0f)
    for (int i = 0; i < kVectors; ++i) r.v[i] = x.v[i] * c;
  return r;
}

FG_INLINE void add(Group& sum, const Group& x) {
  for (int i = 0; i < kVectors; ++i) sum.v[i] = sum.v[i] + x.v[i];
}

// dv, rounded once, straight to the velocities: w dv and (1 - w) dv under guidance.
FG_INLINE void store_gradient(const FgArgs& a, const Row& grad, const Row& grad_uncond, int64_t at,
                              int n, Group dv) {
  if (grad_uncond.data != nullptr) {
    Group u;
    for (int i = 0; i < kVectors; ++i) u.v[i] = dv.v[i] * a.uncond_scale;
    store_group(grad_uncond, at, n, u);
  }
  if (a.uncond_velocity.data != nullptr)
    for (int i = 0; i < kVectors; ++i) dv.v[i] = dv.v[i] * a.guidance_scale;
  store_group(grad, at, n, dv);
}

}  // namespace FLOWGRPO_ISA
