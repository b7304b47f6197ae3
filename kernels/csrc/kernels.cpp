// The ops, compiled once per instruction set. What is computed, and in which order, is the
// numerical contract in flowgrpo_kernels/reference.py: the same bits for every instruction set and
// thread count. blocks.h says how the work is divided, loss.h and nft.h hold the losses.

#include <stdlib.h>

#include "blocks.h"
#include "loss.h"
#include "nft.h"
#include "noise.h"

namespace FLOWGRPO_ISA {
namespace {

// Elements of a row that are computed at a time: whole groups, whole calls of normals().
constexpr int kStride = kNormals > kGroup ? kNormals : kGroup;
static_assert(kStride % kGroup == 0 && kStride % kNormals == 0 && kBlock % kStride == 0, "");

// The normals of kStride elements from `at` on; a block's elements have one high counter word.
FG_INLINE void stride_normals(const Counters& counters, int64_t at, Group* out) {
  for (int i = 0; i < kStride; i += kNormals)
    normals(counters, (uint32_t)((uint64_t)(at + i) / 4), &out->v[0] + i / kLanes);
}

Counters block_counters(uint64_t seed, uint32_t step, const Span& span) {
  return counters(seed, step, (uint32_t)((uint64_t)span.start / 4 >> 32));
}

// ---- sde_step: reads velocity (uncond_velocity, noise) and sample, writes prev_sample ----

enum Noise { kNone, kSeeds, kGiven };

// From so many elements on, mean and x0 are larger than what a core keeps for itself.
constexpr int64_t kStreamElements = 1 << 19;

// What is written beside x' and the score, where it is asked for; float32.
struct Moments {
  Row mean, x0;
  bool streamed;

  Moments(const FgArgs& a, int64_t row)
      : mean(row_of(a.mean, row)),
        x0(row_of(a.x0, row)),
        streamed(a.rows * a.elements >= kStreamElements) {}

  inline __attribute__((always_inline)) void store(const Inputs& in, int64_t e, int n, const Group& v, const Group& x,
                              const Group& mu) const {
    if (mean.data != nullptr) write(mean, e, n, mu);
    if (x0.data != nullptr) write(x0, e, n, x0_of(in, v, x));
  }

 private:
  inline __attribute__((always_inline)) void write(const Row& row, int64_t e, int n, const Group& g) const {
    if (streamed)
      stream_group(row, e, n, g);
    else
      store_group(row, e, n, g);
  }
};

template <Noise kNoise>
float step_block(const FgArgs& a, int64_t row, int64_t block) {
  const Inputs in(a, row);
  const Moments moments(a, row);
  const Row noise = row_of(a.noise, row), prev = row_of(a.prev_sample, row);
  const Span span = span_of(a, block);
  Counters counters;
  if (kNoise == kSeeds)
    counters = block_counters((uint64_t)a.seeds[row], (uint32_t)(int64_t)in.c.noise_step, span);
  BlockSum sum;
  for (int first = 0; first < span.count; first += kStride) {
    Group z[kStride / kGroup];
    if (kNoise == kSeeds) stride_normals(counters, span.start + first, z);
    for (int g = 0; g < kStride / kGroup; ++g) {
      const int at = first + g * kGroup, left = span.count - at;
      if (left <= 0) break;
      const int n = left < kGroup ? left : kGroup;
      const int64_t e = span.start + at;
      const Group v = guided(in.velocity, in.uncond, in.w, e, n);
      const Group from = load_group(in.sample, e, n), mu = mean_of(in, v, from);
      moments.store(in, e, n, v, from, mu);
      Group x = mu;
      if (kNoise == kGiven) z[g] = load_group(noise, e, n);
      if (kNoise != kNone)
        for (int i = 0; i < kVectors; ++i) x.v[i] = mu.v[i] + z[g].v[i] * in.c.C;
      store_group(prev, e, n, x);
      sum.add(at, n, difference(rounded(x, prev.dtype), mu));
    }
  }
  return sum.finish(span.count);
}

float step_block(const FgArgs& a, int64_t row, int64_t block) {
  // A quiet row needs no noise: C * eps is 0.
  if (coefficients(a, row).C == 0.0f || (a.noise.data == nullptr && a.seeds == nullptr))
    return step_block<kNone>(a, row, block);
  return a.noise.data != nullptr ? step_block<kGiven>(a, row, block)
                                 : step_block<kSeeds>(a, row, block);
}

// Writes log_prob of the rows whose blocks' sums of squares `block_sum(a, row, block)` computes.
template <class Work>
int32_t scored(const FgArgs& a, Work block_sum) {
  const int64_t blocks = blocks_of(a);
  float* sums = (float*)malloc(sizeof(float) * (size_t)(a.rows * blocks + 1));
  if (sums == nullptr) return 1;
  for_rows(
      a,
      [&](int64_t row, int64_t block) { sums[row * blocks + block] = block_sum(a, row, block); },
      [&](int64_t row) {
        const float sum = ordered_sum(sums + row * blocks, blocks);
        a.log_prob[row] = score(coefficients(a, row), sum, a.elements);
      });
  free(sums);
  return 0;
}

int32_t sde_step(const FgArgs* args) {
  return scored(*args, [](const FgArgs& a, int64_t row, int64_t block) {
    return step_block(a, row, block);
  });
}

int32_t fill_normals(const FgArgs* args, uint32_t noise_step) {
  const FgArgs& a = *args;
  for_blocks(a, [&](int64_t row, int64_t block) {
    const Row out = row_of(a.prev_sample, row);
    const Span span = span_of(a, block);
    const Counters counters = block_counters((uint64_t)a.seeds[row], noise_step, span);
    for (int from = 0; from < span.count; from += kStride) {
      Group z[kStride / kGroup];
      stride_normals(counters, span.start + from, z);
      for (int at = from; at < from + kStride && at < span.count; at += kGroup) {
        const int n = span.count - at < kGroup ? span.count - at : kGroup;
        store_group(out, span.start + at, n, z[(at - from) / kGroup]);
      }
    }
  });
  return 0;
}

// ---- log_prob ----

int32_t log_prob(const FgArgs* args) {
  const FgArgs& a = *args;
  RowSums<Sums> sums(a);
  if (sums.failed()) return 1;
  for_rows(
      a,
      [&](int64_t row, int64_t block) {
        sums.set(row, block, residual_block<false>(a, row, block));
      },
      [&](int64_t row) {
        a.log_prob[row] = score(coefficients(a, row), sums.of(row).d, a.elements);
      });
  return 0;
}

float mean_block(const FgArgs& a, int64_t row, int64_t block) {
  const Inputs in(a, row);
  const Row prev = row_of(a.prev_sample, row);
  const Moments moments(a, row);
  const Span span = span_of(a, block);
  BlockSum sum;
  for (int at = 0; at < span.count; at += kGroup) {
    const int n = span.count - at < kGroup ? span.count - at : kGroup;
    const int64_t e = span.start + at;
    const Group v = guided(in.velocity, in.uncond, in.w, e, n);
    const Group x = load_group(in.sample, e, n), mu = mean_of(in, v, x);
    moments.store(in, e, n, v, x, mu);
    sum.add(at, n, difference(load_group(prev, e, n), mu));
  }
  return sum.finish(span.count);
}

int32_t log_prob_mean(const FgArgs* args) {
  return scored(*args, mean_block);
}

int32_t log_prob_mean_backward(const FgArgs* args) {
  const FgArgs& a = *args;
  const float count = (float)(a.elements > 0 ? a.elements : 1);
  for_blocks(a, [&](int64_t row, int64_t block) {
    const Inputs in(a, row);
    const Row prev = row_of(a.prev_sample, row);
    const Row grad = row_of(a.grad_velocity, row), grad_uncond = row_of(a.grad_uncond_velocity, row);
    const Row grad_mean = row_of(a.grad_mean, row), grad_x0 = row_of(a.grad_x0, row);
    const float c_d = (a.grad[row] * (2.0f * (in.c.k * in.c.B))) / count;
    const Span span = span_of(a, block);
    for (int at = 0; at < span.count; at += kGroup) {
      const int n = span.count - at < kGroup ? span.count - at : kGroup;
      const int64_t e = span.start + at;
      Group dv{};
      if (c_d != 0.0f) {
        const Group v = guided(in.velocity, in.uncond, in.w, e, n);
        dv = term(difference(load_group(prev, e, n), mean(in, v, e, n)), c_d);
      }
      if (grad_mean.data != nullptr) {
        const Group g = load_group(grad_mean, e, n);
        for (int i = 0; i < kVectors; ++i) dv.v[i] = dv.v[i] + g.v[i] * in.c.B;
      }
      if (grad_x0.data != nullptr) {
        const Group g = load_group(grad_x0, e, n);
        for (int i = 0; i < kVectors; ++i) dv.v[i] = dv.v[i] - g.v[i] * in.c.sigma;
      }
      store_gradient(a, grad, grad_uncond, e, n, dv);
    }
  });
  return 0;
}

int32_t log_prob_backward(const FgArgs* args) {
  const FgArgs& a = *args;
  const float n = (float)(a.elements > 0 ? a.elements : 1);
  for_blocks(a, [&](int64_t row, int64_t block) {
    const Coefficients c = coefficients(a, row);
    gradient_block<false>(a, row, block, (a.grad[row] * (2.0f * (c.k * c.B))) / n, 0.0f, 0.0f);
  });
  return 0;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    sde_step,           log_prob,           log_prob_backward,
    log_prob_mean,      log_prob_mean_backward,
    grpo_loss_forward,  grpo_loss_backward, grpo_loss_gradient,
    nft_loss_forward,   nft_loss_backward,  nft_loss_gradient,
    fill_normals,
};

}  // namespace FLOWGRPO_ISA
