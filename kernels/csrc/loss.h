// The loss of stored steps and its gradient: sums of squares over each row, scalars of each row,
// gradients straight to the velocities. log_prob shares the first and the last.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"

namespace FLOWGRPO_ISA {
namespace {

// Sums over elements of d^2, e^2 and h^2.
struct Sums {
  float d, e, h;
};

// kKeep: d itself is left where the gradient will be, which is float32.
template <bool kKeep>
Sums residual_block(const FgArgs& a, int64_t row, int64_t block) {
  const Inputs in(a, row);
  const Row grad = row_of(a.grad_velocity, row);
  const Row prev = row_of(a.prev_sample, row), ref = row_of(a.ref_velocity, row);
  const Row ref_uncond = row_of(a.ref_uncond_velocity, row), old = row_of(a.old_velocity, row);
  const Span span = span_of(a, block);
  BlockSum sum_d, sum_e, sum_h;
  for (int at = 0; at < span.count; at += kGroup) {
    const int n = span.count - at < kGroup ? span.count - at : kGroup;
    const int64_t e = span.start + at;
    const Group v = guided(in.velocity, in.uncond, in.w, e, n);
    const Group d = difference(load_group(prev, e, n), mean(in, v, e, n));
    if (kKeep) store_group(grad, e, n, d);
    sum_d.add(at, n, d);
    if (ref.data != nullptr) sum_e.add(at, n, difference(v, guided(ref, ref_uncond, in.w, e, n)));
    if (old.data != nullptr) sum_h.add(at, n, difference(v, load_group(old, e, n)));
  }
  return {sum_d.finish(span.count), ref.data != nullptr ? sum_e.finish(span.count) : 0.0f,
          old.data != nullptr ? sum_h.finish(span.count) : 0.0f};
}

// dv = c_d d + c_e e + c_h h, straight to the velocities. kKept: d is where dv goes.
template <bool kKept>
void gradient_block(const FgArgs& a, int64_t row, int64_t block, float c_d, float c_e, float c_h) {
  const Inputs in(a, row);
  const Row prev = row_of(a.prev_sample, row), ref = row_of(a.ref_velocity, row);
  const Row ref_uncond = row_of(a.ref_uncond_velocity, row), old = row_of(a.old_velocity, row);
  const Row grad = row_of(a.grad_velocity, row), grad_uncond = row_of(a.grad_uncond_velocity, row);
  const Span span = span_of(a, block);
  for (int at = 0; at < span.count; at += kGroup) {
    const int n = span.count - at < kGroup ? span.count - at : kGroup;
    const int64_t e = span.start + at;
    Group v;
    if (!kKept || ref.data != nullptr || old.data != nullptr)
      v = guided(in.velocity, in.uncond, in.w, e, n);
    Group dv = term(kKept ? load_group(grad, e, n)
                          : difference(load_group(prev, e, n), mean(in, v, e, n)),
                    c_d);
    if (ref.data != nullptr)
      add(dv, term(difference(v, guided(ref, ref_uncond, in.w, e, n)), c_e));
    if (old.data != nullptr) add(dv, term(difference(v, load_group(old, e, n)), c_h));
    store_gradient(a, grad, grad_uncond, e, n, dv);
  }
}

template <bool kKept>
void loss_gradient_block(const FgArgs& a, int64_t row, int64_t block) {
  const float go = a.grad[0];
  const float* c = a.coefs + 3 * row;
  gradient_block<kKept>(a, row, block, go * c[0], go * c[1], go * c[2]);
}

// 2^n for n in [-126, 127].
float power_of_two(int32_t n) {
  const uint32_t bits = (uint32_t)(n + 127) << 23;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// exp by the polynomial of reference.py, whose bits no libm has.
float exponential(float x) {
  // The first comparison is false for a NaN, which is put back at the end.
  const float number = x > 89.0f ? 89.0f : x > -104.0f ? x : -104.0f;
  const float n = floorf(number * 1.44269504f + 0.5f);
  const float r = (number - n * 0.693359375f) - n * -0.00021219444f;
  float p = r * 0.000197882517f + 0.00139468687f;
  p = p * r + 0.00833351072f;
  p = p * r + 0.0416662656f;
  p = p * r + 0.166666657f;
  p = p * r + 0.5f;
  const int32_t whole = (int32_t)n, half = whole >> 1;
  const float result = ((p * (r * r) + r) + 1.0f) * power_of_two(half) * power_of_two(whole - half);
  return x == x ? result : x;
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
  const float ratio = exponential(delta);
  const float adv = clamp(a.advantages[row], -a.adv_clip, a.adv_clip);
  const float unclipped = -adv * ratio, clipped = -adv * clamp(ratio, a.ratio_low, a.ratio_high);
  const bool outside = ratio < a.ratio_low || ratio > a.ratio_high;
  const bool active = !(outside && clipped > unclipped);
  const float weight = a.row_weight != nullptr ? a.row_weight[row] : 1.0f;
  const float kl_weight = a.kl_row_weight != nullptr ? a.kl_row_weight[row] : 1.0f;

  float policy = maximum(unclipped, clipped);
  float g = ((weight / rows) * (-adv * (active ? 1.0f : 0.0f))) * ratio;
  if (quiet(c) || weight == 0.0f) g = 0.0f;
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
  if (has_ref && a.kl_row_weight != nullptr) kl = kl_weight == 0.0f ? 0.0f : kl_weight * kl;
  a.log_prob[row] = lp;
  a.ratio[row] = ratio;
  return {policy, kl, outside ? 1.0f : 0.0f};
}

// The forward op, between what is done before and after a row's ratio is known.
template <class Before, class After>
int32_t grpo_loss(const FgArgs& a, Before before, After after) {
  RowSums<Sums> sums(a);
  float* per_row = (float*)malloc(sizeof(float) * (size_t)(3 * a.rows + 1));
  if (sums.failed() || per_row == nullptr) {
    free(per_row);
    return 1;
  }
  float *policy = per_row, *kl = per_row + a.rows, *clipped = per_row + 2 * a.rows;
  for_rows(
      a, [&](int64_t row, int64_t block) { sums.set(row, block, before(a, row, block)); },
      [&](int64_t row) {
        const RowLoss r = loss_row(a, row, sums.of(row));
        policy[row] = r.policy, kl[row] = r.kl, clipped[row] = r.clipped;
      },
      [&](int64_t row, int64_t block) { after(a, row, block); });
  const float rows = (float)(a.rows > 0 ? a.rows : 1);
  *a.policy_loss = ordered_sum(policy, a.rows) / rows;
  *a.kl = ordered_sum(kl, a.rows) / rows;
  *a.clip_fraction = ordered_sum(clipped, a.rows) / rows;
  *a.loss = *a.policy_loss;
  if (a.ref_velocity.data != nullptr) *a.loss = *a.policy_loss + a.kl_weight * *a.kl;
  free(per_row);
  return 0;
}

int32_t grpo_loss_forward(const FgArgs* args) {
  return grpo_loss(*args, residual_block<false>, [](const FgArgs&, int64_t, int64_t) {});
}

// With the gradients for the upstream gradient grad, those of a row while what they are computed
// from is still in the cache.
int32_t grpo_loss_gradient(const FgArgs* args) {
  if (args->grad_velocity.dtype == FG_FLOAT32)
    return grpo_loss(*args, residual_block<true>, loss_gradient_block<true>);
  return grpo_loss(*args, residual_block<false>, loss_gradient_block<false>);
}

int32_t grpo_loss_backward(const FgArgs* args) {
  const FgArgs& a = *args;
  for_blocks(a, [&](int64_t row, int64_t block) { loss_gradient_block<false>(a, row, block); });
  return 0;
}

}  // namespace
}  // namespace FLOWGRPO_ISA
