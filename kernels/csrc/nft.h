// The loss of DiffusionNFT and its gradient: two residuals a row, each normalised by its mean
// magnitude. The formulas are those of the numerical contract in flowgrpo_kernels/reference.py.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "blocks.h"

namespace FLOWGRPO_ISA {
namespace {

// Sums over elements: |p|, p^2, |q|, q^2, h^2, e^2.
struct NftSums {
  float abs_p, p, abs_q, q, h, e;
};

inline float unit(float x) { return x >= 0.0f && x <= 1.0f ? x : NAN; }

// What one row reads.
struct NftInputs {
  float w, sigma, sigma_beta;
  Row velocity, uncond, sample, x0, old, ref, ref_uncond;

  NftInputs(const FgArgs& a, int64_t row)
      : w(a.guidance_scale),
        sigma(unit(a.sigma[row])),
        sigma_beta(sigma * a.beta),
        velocity(row_of(a.velocity, row)),
        uncond(row_of(a.uncond_velocity, row)),
        sample(row_of(a.sample, row)),
        x0(row_of(a.x0, row)),
        old(row_of(a.old_velocity, row)),
        ref(row_of(a.ref_velocity, row)),
        ref_uncond(row_of(a.ref_uncond_velocity, row)) {}
};

// p = x0+ - x0, q = x0- - x0, h = v - v_old, from the velocity v.
struct NftErrors {
  Group p, q, h;
};

FG_INLINE NftErrors nft_errors(const NftInputs& in, const Group& v, int64_t at, int n) {
  const Group old = load_group(in.old, at, n);
  const Group x = load_group(in.sample, at, n), x0 = load_group(in.x0, at, n);
  NftErrors r;
  for (int i = 0; i < kVectors; ++i) {
    r.h.v[i] = v.v[i] - old.v[i];
    const vf d = (x.v[i] - old.v[i] * in.sigma) - x0.v[i];
    const vf t = r.h.v[i] * in.sigma_beta;
    r.p.v[i] = d - t;
    r.q.v[i] = d + t;
  }
  return r;
}

NftSums nft_sums_block(const FgArgs& a, int64_t row, int64_t block) {
  const NftInputs in(a, row);
  const Span span = span_of(a, block);
  BlockSum abs_p, p, abs_q, q, h, e;
  for (int at = 0; at < span.count; at += kGroup) {
    const int n = span.count - at < kGroup ? span.count - at : kGroup;
    const int64_t from = span.start + at;
    const Group v = guided(in.velocity, in.uncond, in.w, from, n);
    const NftErrors x = nft_errors(in, v, from, n);
    abs_p.add_magnitudes(at, n, x.p);
    p.add(at, n, x.p);
    abs_q.add_magnitudes(at, n, x.q);
    q.add(at, n, x.q);
    h.add(at, n, x.h);
    if (in.ref.data != nullptr)
      e.add(at, n, difference(v, guided(in.ref, in.ref_uncond, in.w, from, n)));
  }
  return {abs_p.finish(span.count), p.finish(span.count), abs_q.finish(span.count),
          q.finish(span.count),     h.finish(span.count),
          in.ref.data != nullptr ? e.finish(span.count) : 0.0f};
}

// dv = c_p p + c_q q + c_e e, straight to the velocities.
void nft_gradient_block(const FgArgs& a, int64_t row, int64_t block) {
  const NftInputs in(a, row);
  const Row grad = row_of(a.grad_velocity, row), grad_uncond = row_of(a.grad_uncond_velocity, row);
  const float* c = a.coefs + 3 * row;
  const float go = a.grad[0], c_p = go * c[0], c_q = go * c[1], c_e = go * c[2];
  const Span span = span_of(a, block);
  for (int at = 0; at < span.count; at += kGroup) {
    const int n = span.count - at < kGroup ? span.count - at : kGroup;
    const int64_t from = span.start + at;
    const Group v = guided(in.velocity, in.uncond, in.w, from, n);
    const NftErrors x = nft_errors(in, v, from, n);
    Group dv = term(x.p, c_p);
    add(dv, term(x.q, c_q));
    if (in.ref.data != nullptr)
      add(dv, term(difference(v, guided(in.ref, in.ref_uncond, in.w, from, n)), c_e));
    store_gradient(a, grad, grad_uncond, from, n, dv);
  }
}

// The weighted terms of one row, which are added up over the rows afterwards.
struct NftRow {
  float positive, negative, kl;
};

NftRow nft_row(const FgArgs& a, int64_t row, const NftSums& s) {
  const float n = (float)(a.elements > 0 ? a.elements : 1), rows = (float)a.rows;
  const float mean_p = s.abs_p / n, mean_q = s.abs_q / n;
  // Comparisons that a NaN gets through.
  const float scale_p = mean_p < a.floor ? a.floor : mean_p;
  const float scale_q = mean_q < a.floor ? a.floor : mean_q;
  const float error_p = (s.p / n) / scale_p, error_q = (s.q / n) / scale_q;
  const float r = unit(a.optimality[row]), slope = 2.0f * (unit(a.sigma[row]) * a.beta);
  const float weight = a.row_weight != nullptr ? a.row_weight[row] : 1.0f;
  const float kl_weight = a.kl_row_weight != nullptr ? a.kl_row_weight[row] : 1.0f;
  const bool has_ref = a.ref_velocity.data != nullptr, silent = weight == 0.0f;

  const float share = weight / rows;
  float* coefs = a.coefs + 3 * row;
  coefs[0] = silent ? 0.0f : -((((share * r) * slope) / scale_p) / n);
  coefs[1] = silent ? 0.0f : (((share * (1.0f - r)) * slope) / scale_q) / n;
  coefs[2] = has_ref ? (((kl_weight / rows) * a.kl_weight) * 2.0f) / n : 0.0f;
  a.positive_error[row] = error_p;
  a.negative_error[row] = error_q;
  a.old_deviation[row] = s.h / n;

  float positive = r * error_p, negative = (1.0f - r) * error_q, kl = has_ref ? s.e / n : 0.0f;
  if (a.row_weight != nullptr) {
    positive = silent ? 0.0f : weight * positive;
    negative = silent ? 0.0f : weight * negative;
  }
  if (has_ref && a.kl_row_weight != nullptr) kl = kl_weight == 0.0f ? 0.0f : kl_weight * kl;
  return {positive, negative, kl};
}

// The forward op, and what is done to a row's blocks once its errors are known.
template <class After>
int32_t nft_loss(const FgArgs& a, After after) {
  RowSums<NftSums> sums(a);
  float* per_row = (float*)malloc(sizeof(float) * (size_t)(3 * a.rows + 1));
  if (sums.failed() || per_row == nullptr) {
    free(per_row);
    return 1;
  }
  float *positive = per_row, *negative = per_row + a.rows, *kl = per_row + 2 * a.rows;
  for_rows(
      a, [&](int64_t row, int64_t block) { sums.set(row, block, nft_sums_block(a, row, block)); },
      [&](int64_t row) {
        const NftRow r = nft_row(a, row, sums.of(row));
        positive[row] = r.positive, negative[row] = r.negative, kl[row] = r.kl;
      },
      [&](int64_t row, int64_t block) { after(a, row, block); });
  const float rows = (float)(a.rows > 0 ? a.rows : 1);
  *a.positive_loss = ordered_sum(positive, a.rows) / rows;
  *a.negative_loss = ordered_sum(negative, a.rows) / rows;
  *a.kl = ordered_sum(kl, a.rows) / rows;
  *a.loss = *a.positive_loss + *a.negative_loss;
  if (a.ref_velocity.data != nullptr) *a.loss = *a.loss + a.kl_weight * *a.kl;
  free(per_row);
  return 0;
}

int32_t nft_loss_forward(const FgArgs* args) {
  return nft_loss(*args, [](const FgArgs&, int64_t, int64_t) {});
}

// With the gradients for the upstream gradient grad, those of a row while it is in the cache.
int32_t nft_loss_gradient(const FgArgs* args) { return nft_loss(*args, nft_gradient_block); }

int32_t nft_loss_backward(const FgArgs* args) {
  const FgArgs& a = *args;
  for_blocks(a, [&](int64_t row, int64_t block) { nft_gradient_block(a, row, block); });
  return 0;
}

}  // namespace
}  // namespace FLOWGRPO_ISA
