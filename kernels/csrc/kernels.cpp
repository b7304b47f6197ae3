// The ops, compiled once per instruction set. What is computed, and in which order, is the
// numerical contract in flowgrpo_kernels/reference.py: the same bits for every instruction set and
// thread count.
//
// Work is split over (row, block) pairs, so that one row keeps all threads busy. A pair writes its
// own elements and its own partial sums; a second, short pass adds the partial sums of each row in
// order.

#include <math.h>
#include <stdlib.h>

#include "noise.h"
#include "rows.h"

namespace FLOWGRPO_ISA {
namespace {

// Below this many elements waking the other threads costs more than it saves.
constexpr int64_t kSerialElements = 32768;

struct Coefficients {
  float A, B, C, k, c0, K, abs_dt, noise_step;
};

Coefficients coefficients(const FgArgs& a, int64_t row) {
  const int64_t step = a.step[row];
  if (step < 0 || step >= a.table_rows) {
    const float nan = NAN;
    return {nan, nan, nan, nan, nan, nan, nan, 0.0f};
  }
  const float* t = a.table + step * a.table_columns;
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]};
}

int64_t blocks_of(const FgArgs& a) { return (a.elements + kBlock - 1) / kBlock; }

// Calls work(row, block) for every pair, then finish(row) for every row when all pairs are done.
template <class Work, class Finish>
void for_blocks(const FgArgs& a, Work work, Finish finish) {
  const int64_t blocks = blocks_of(a), pairs = a.rows * blocks;
  const bool serial = a.threads <= 1 || a.rows * a.elements < kSerialElements;
#pragma omp parallel num_threads(serial ? 1 : (int)a.threads) if (!serial)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs; ++i) work(i / blocks, i % blocks);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) finish(row);
  }
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

FG_INLINE Group mean(const Inputs& in, const Group& v, int64_t at, int n) {
  const Group x = load_group(in.sample, at, n);
  Group mu;
  for (int i = 0; i < kVectors; ++i) mu.v[i] = x.v[i] * in.c.A + v.v[i] * in.c.B;
  return mu;
}

FG_INLINE Group difference(const Group& a, const Group& b) {
  Group r;
  for (int i = 0; i < kVectors; ++i) r.v[i] = a.v[i] - b.v[i];
  return r;
}

FG_INLINE Group group_normals(uint64_t seed, uint32_t step, int64_t at) {
  Group z;
  for (int i = 0; i < kVectors; i += 4)
    normals(seed, step, (uint64_t)(at + i * kLanes) / 4, z.v + i);
  return z;
}

// log_prob of a row from the sum of its squared residuals.
float score(const Coefficients& c, float sum, int64_t elements) {
  if (c.C == 0.0f) return 0.0f;
  const float m = sum / (float)(elements > 0 ? elements : 1);
  return -(c.k * m) - c.c0;
}

struct Span {
  int64_t start;
  int count;
};
Span span_of(const FgArgs& a, int64_t block) {
  const int64_t start = block * kBlock, left = a.elements - start;
  return {start, (int)(left < kBlock ? left : kBlock)};
}

// ---- sde_step: reads velocity (uncond_velocity, noise) and sample, writes prev_sample ----

float step_block(const FgArgs& a, int64_t row, int64_t block) {
  const Inputs in(a, row);
  const Row noise = row_of(a.noise, row), prev = row_of(a.prev_sample, row);
  const uint64_t seed = a.seeds != nullptr ? (uint64_t)a.seeds[row] : 0;
  const uint32_t noise_step = (uint32_t)(int64_t)in.c.noise_step;
  const bool noisy = in.c.C != 0.0f && (noise.data != nullptr || a.seeds != nullptr);
  const Span span = span_of(a, block);
  BlockSum sum;
  for (int at = 0; at < span.count; at += kGroup) {
    const int n = span.count - at < kGroup ? span.count - at : kGroup;
    const int64_t e = span.start + at;
    const Group mu = mean(in, guided(in.velocity, in.uncond, in.w, e, n), e, n);
    Group x = mu;
    if (noisy) {
      const Group z =
          noise.data != nullptr ? load_group(noise, e, n) : group_normals(seed, noise_step, e);
      for (int i = 0; i < kVectors; ++i) x.v[i] = mu.v[i] + z.v[i] * in.c.C;
    }
    store_group(prev, e, n, x);
    sum.add(at, n, difference(rounded(x, prev.dtype), mu));
  }
  return sum.finish(span.count);
}

int32_t sde_step(const FgArgs* args) {
  const FgArgs& a = *args;
  const int64_t blocks = blocks_of(a);
  float* sums = (float*)malloc(sizeof(float) * (size_t)(a.rows * blocks + 1));
  if (sums == nullptr) return 1;
  for_blocks(
      a,
      [&](int64_t row, int64_t block) { sums[row * blocks + block] = step_block(a, row, block); },
      [&](int64_t row) {
        const float sum = ordered_sum(sums + row * blocks, blocks);
        a.log_prob[row] = score(coefficients(a, row), sum, a.elements);
      });
  free(sums);
  return 0;
}

int32_t fill_normals(const FgArgs* args, uint32_t noise_step) {
  const FgArgs& a = *args;
  for_blocks(
      a,
      [&](int64_t row, int64_t block) {
        const Row out = row_of(a.prev_sample, row);
        const Span span = span_of(a, block);
        for (int at = 0; at < span.count; at += kGroup) {
          const int n = span.count - at < kGroup ? span.count - at : kGroup;
          const int64_t e = span.start + at;
          store_group(out, e, n, group_normals((uint64_t)a.seeds[row], noise_step, e));
        }
      },
      [](int64_t) {});
  return 0;
}

// ---- log_prob and grpo_loss: sums of d^2, e^2, h^2 over the elements of each row ----

struct Sums {
  float d, e, h;
};

Sums residual_block(const FgArgs& a, int64_t row, int64_t block) {
  const Inputs in(a, row);
  const Row prev = row_of(a.prev_sample, row), ref = row_of(a.ref_velocity, row);
  const Row ref_uncond = row_of(a.ref_uncond_velocity, row), old = row_of(a.old_velocity, row);
  const Span span = span_of(a, block);
  BlockSum sum_d, sum_e, sum_h;
  for (int at = 0; at < span.count; at += kGroup) {
    const int n = span.count - at < kGroup ? span.count - at : kGroup;
    const int64_t e = span.start + at;
    const Group v = guided(in.velocity, in.uncond, in.w, e, n);
    sum_d.add(at, n, difference(load_group(prev, e, n), mean(in, v, e, n)));
    if (ref.data != nullptr) sum_e.add(at, n, difference(v, guided(ref, ref_uncond, in.w, e, n)));
    if (old.data != nullptr) sum_h.add(at, n, difference(v, load_group(old, e, n)));
  }
  return {sum_d.finish(span.count), ref.data != nullptr ? sum_e.finish(span.count) : 0.0f,
          old.data != nullptr ? sum_h.finish(span.count) : 0.0f};
}

// Calls finish(row, sums) for every row.
template <class Finish>
int32_t row_sums(const FgArgs& a, Finish finish) {
  const int64_t blocks = blocks_of(a), stride = a.rows * blocks;
  float* sums = (float*)malloc(sizeof(float) * (size_t)(3 * stride + 1));
  if (sums == nullptr) return 1;
  for_blocks(
      a,
      [&](int64_t row, int64_t block) {
        const Sums s = residual_block(a, row, block);
        float* at = sums + row * blocks + block;
        at[0] = s.d, at[stride] = s.e, at[2 * stride] = s.h;
      },
      [&](int64_t row) {
        const float* at = sums + row * blocks;
        finish(row, Sums{ordered_sum(at, blocks), ordered_sum(at + stride, blocks),
                         ordered_sum(at + 2 * stride, blocks)});
      });
  free(sums);
  return 0;
}

int32_t log_prob(const FgArgs* args) {
  const FgArgs& a = *args;
  return row_sums(a, [&](int64_t row, const Sums& s) {
    a.log_prob[row] = score(coefficients(a, row), s.d, a.elements);
  });
}

// torch's clamp and maximum: NaN propagates.
float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
float maximum(float x, float y) { return x != x ? x : y != y ? y : x > y ? x : y; }

// The scalars of one row of the loss; policy, kl and clipped are added up over the rows afterwards.
struct RowLoss {
  float policy, kl, clipped;
};

RowLoss loss_row(const FgArgs& a, int64_t row, const Sums& s) {
  const Coefficients c = coefficients(a, row);
  const float n = (float)(a.elements > 0 ? a.elements : 1), rows = (float)a.rows;
  const bool guard = a.old_velocity.data != nullptr, has_ref = a.ref_velocity.data != nullptr;
  const float b2 = c.B * c.B, lp = score(c, s.d, a.elements);
  float delta = lp - a.old_log_prob[row];
  if (guard) delta = (delta + (c.k * b2) * (s.h / n)) * c.C;
  const float ratio = expf(delta);
  const float adv = clamp(a.advantages[row], -a.adv_clip, a.adv_clip);
  const float unclipped = -adv * ratio, clipped = -adv * clamp(ratio, a.ratio_low, a.ratio_high);
  const bool outside = ratio < a.ratio_low || ratio > a.ratio_high;
  const bool active = !(outside && clipped > unclipped);
  const float weight = a.row_weight != nullptr ? a.row_weight[row] : 1.0f;
  const float kl_weight = a.kl_row_weight != nullptr ? a.kl_row_weight[row] : 1.0f;

  float policy = maximum(unclipped, clipped);
  float g = ((weight / rows) * (-adv * (active ? 1.0f : 0.0f))) * ratio;
  if (a.row_weight != nullptr && weight == 0.0f) g = 0.0f;
  if (guard) {
    policy = policy / c.abs_dt;
    g = (g * c.C) / c.abs_dt;
  }
  float* coefs = a.coefs + 3 * row;
  coefs[0] = (g * (2.0f * (c.k * c.B))) / n;
  coefs[1] = has_ref ? (((kl_weight / rows) * a.kl_weight) * (2.0f * (c.K * b2))) / n : 0.0f;
  coefs[2] = guard ? (g * (2.0f * (c.k * b2))) / n : 0.0f;

  float kl = has_ref && c.C != 0.0f ? (c.K * b2) * (s.e / n) : 0.0f;
  if (a.row_weight != nullptr) policy = weight == 0.0f ? 0.0f : weight * policy;
  if (a.kl_row_weight != nullptr) kl = kl_weight == 0.0f ? 0.0f : kl_weight * kl;
  a.log_prob[row] = lp;
  a.ratio[row] = ratio;
  return {policy, kl, outside ? 1.0f : 0.0f};
}

int32_t grpo_loss_forward(const FgArgs* args) {
  const FgArgs& a = *args;
  float* per_row = (float*)malloc(sizeof(float) * (size_t)(3 * a.rows + 1));
  if (per_row == nullptr) return 1;
  float *policy = per_row, *kl = per_row + a.rows, *clipped = per_row + 2 * a.rows;
  const int32_t status = row_sums(a, [&](int64_t row, const Sums& s) {
    const RowLoss r = loss_row(a, row, s);
    policy[row] = r.policy, kl[row] = r.kl, clipped[row] = r.clipped;
  });
  const float rows = (float)(a.rows > 0 ? a.rows : 1);
  *a.policy_loss = ordered_sum(policy, a.rows) / rows;
  *a.kl = ordered_sum(kl, a.rows) / rows;
  *a.clip_fraction = ordered_sum(clipped, a.rows) / rows;
  *a.loss = *a.policy_loss;
  if (a.ref_velocity.data != nullptr) *a.loss = *a.policy_loss + a.kl_weight * *a.kl;
  free(per_row);
  return status;
}

// ---- backward: dv = c_d d + c_e e + c_h h, straight to the velocities ----

void gradient_block(const FgArgs& a, int64_t row, int64_t block, float c_d, float c_e, float c_h) {
  const Inputs in(a, row);
  const Row prev = row_of(a.prev_sample, row), ref = row_of(a.ref_velocity, row);
  const Row ref_uncond = row_of(a.ref_uncond_velocity, row), old = row_of(a.old_velocity, row);
  const Row grad = row_of(a.grad_velocity, row), grad_uncond = row_of(a.grad_uncond_velocity, row);
  const Span span = span_of(a, block);
  for (int at = 0; at < span.count; at += kGroup) {
    const int n = span.count - at < kGroup ? span.count - at : kGroup;
    const int64_t e = span.start + at;
    const Group v = guided(in.velocity, in.uncond, in.w, e, n);
    Group dv = difference(load_group(prev, e, n), mean(in, v, e, n));
    for (int i = 0; i < kVectors; ++i) dv.v[i] = dv.v[i] * c_d;
    if (ref.data != nullptr) {
      const Group r = guided(ref, ref_uncond, in.w, e, n);
      for (int i = 0; i < kVectors; ++i) dv.v[i] = dv.v[i] + (v.v[i] - r.v[i]) * c_e;
    }
    if (old.data != nullptr) {
      const Group o = load_group(old, e, n);
      for (int i = 0; i < kVectors; ++i) dv.v[i] = dv.v[i] + (v.v[i] - o.v[i]) * c_h;
    }
    if (grad_uncond.data != nullptr) {
      Group u;
      for (int i = 0; i < kVectors; ++i) u.v[i] = dv.v[i] * a.uncond_scale;
      store_group(grad_uncond, e, n, u);
    }
    if (in.uncond.data != nullptr)
      for (int i = 0; i < kVectors; ++i) dv.v[i] = dv.v[i] * in.w;
    store_group(grad, e, n, dv);
  }
}

int32_t log_prob_backward(const FgArgs* args) {
  const FgArgs& a = *args;
  const float n = (float)(a.elements > 0 ? a.elements : 1);
  for_blocks(
      a,
      [&](int64_t row, int64_t block) {
        const Coefficients c = coefficients(a, row);
        gradient_block(a, row, block, (a.grad[row] * (2.0f * (c.k * c.B))) / n, 0.0f, 0.0f);
      },
      [](int64_t) {});
  return 0;
}

int32_t grpo_loss_backward(const FgArgs* args) {
  const FgArgs& a = *args;
  const float go = a.grad[0];
  for_blocks(
      a,
      [&](int64_t row, int64_t block) {
        const float* c = a.coefs + 3 * row;
        gradient_block(a, row, block, go * c[0], go * c[1], go * c[2]);
      },
      [](int64_t) {});
  return 0;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {sde_step,          log_prob,           log_prob_backward,
                         grpo_loss_forward, grpo_loss_backward, fill_normals};

}  // namespace FLOWGRPO_ISA
