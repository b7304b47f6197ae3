// Rows of a transition table from sigma pairs, in float64, each operation rounded on its own, in the
// order of flowgrpo_kernels/row_laws.py, whose bits these are.

#include <float.h>
#include <math.h>

#include <cstring>

#include "abi.h"

namespace {

constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr double kHalfPi = 0x1.921fb54442d18p+0;
constexpr double kLogSqrt2Pi = 0x1.d67f1c864beb5p-1;
constexpr int64_t kSqrtHalfBits = 0x3fe6a09e667f3bcd;

int64_t bits_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
double double_of(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Logarithm of a normal number: 2 atanh of (f - 1) / (f + 1), f in [sqrt(1/2), sqrt(2)).
double log_of(double x) {
  const int64_t bits = bits_of(x), e = (bits - kSqrtHalfBits) >> 52;
  const double f = double_of(bits - e * ((int64_t)1 << 52));
  const double z = (f - 1.0) / (f + 1.0), w = z * z;
  double p = 1.0 / 23.0;
  for (int i = 21; i > 0; i -= 2) p = p * w + 1.0 / i;
  return (double)e * kLn2 + (z * 2.0) * p;
}

// Exponential of a number that is not positive; 0 below -700.
double exp_of(double x) {
  const double y = x >= 0.0 ? 0.0 : x >= -700.0 ? x : -700.0;
  const double k = floor(y * kLog2E + 0.5);
  const double r = (y - k * kLn2High) - k * kLn2Low;
  double p = 1.0 / 14.0;
  for (int i = 13; i > 0; --i) p = (p * r + 1.0) / i;
  p = p * r + 1.0;
  return y == -700.0 ? 0.0 : p * double_of(((int64_t)k + 1023) << 52);
}

// sin(u pi / 2) for u in [0, 1].
double sin_of(double u) {
  const double x = u * kHalfPi, w = x * x;
  double p = 1.0;
  for (int i = 23; i > 1; i -= 2) p = 1.0 - (p * w) / (double)(i * (i - 1));
  return x * p;
}

// One of the inputs that may be float or double.
struct Input {
  const void* data;
  int64_t stride;
  bool wide;

  double operator[](int64_t row) const {
    return wide ? ((const double*)data)[row * stride] : (double)((const float*)data)[row * stride];
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void flowgrpo_native_transition_rows(
    const FgRows* rows) {
  const FgRows& in = *rows;
  const bool gaussian = in.flags & FG_GAUSSIAN, normalizer = in.flags & FG_NORMALIZER;
  const bool score_quiet = in.flags & FG_SCORE_QUIET, kl_gaussian = in.flags & FG_KL_GAUSSIAN;
  const Input sigma{in.sigma, in.sigma_stride, (in.float64 & 1) != 0};
  const Input sigma_next{in.sigma_next, in.sigma_next_stride, (in.float64 & 2) != 0};
  const Input noise_level{in.noise_level, in.noise_level_stride, (in.float64 & 4) != 0};
  const Input sigma_max{in.sigma_max, in.sigma_max_stride, (in.float64 & 8) != 0};
  for (int64_t i = 0; i < in.rows; ++i) {
    const double s = sigma[i], p = sigma_next[i], a = noise_level[i], m = sigma_max[i];
    const double gap = s - p, dt = p - s;
    bool valid = s > p && p >= 0.0 && s <= 1.0 && a >= 0.0 && a <= (double)FLT_MAX;

    double std = 0.0, q = 0.0;
    bool preserving = false;  // A and B of cps
    switch (in.law) {
      case FG_FLOW_SDE: {
        const double inside = 1.0 - s <= in.near_one ? m : s;
        valid = valid && inside < 1.0;
        std = a * sqrt(s / (1.0 - inside));
        break;
      }
      case FG_DANCE_SDE:
        std = a;
        break;
      case FG_SIGMA_LINEAR:
        std = a + (m - a) * s;
        valid = valid && std >= 0.0;
        break;
      case FG_CPS: {
        const double u = a <= 1.0 ? a : 2.0 - a;
        valid = valid && a <= 2.0;
        preserving = true;
        std = p * sin_of(u);
        q = p * sin_of(1.0 - u);
        break;
      }
      case FG_PRECISE:
      case FG_DANCE_PRECISE: {
        preserving = true;
        double power;
        if (in.law == FG_PRECISE) {
          const double ratio = (p * (1.0 - s)) / (s * (1.0 - p));
          const bool none = ratio < DBL_MIN;
          power = exp_of((a * a) * log_of(none ? 1.0 : ratio));
          if (none && a > 0.0) power = 0.0;
        } else {
          const double x = 1.0 / (p == 0.0 ? 1.0 : p) - 1.0 / s;
          power = exp_of(-((a * a) * (x < 0.0 ? 0.0 : x)));
        }
        const double left = 1.0 - power;
        std = p * sqrt(left < 0.0 ? 0.0 : left);
        q = p * sqrt(power);
        break;
      }
      default:
        break;
    }

    double A, B, C;
    if (preserving) {
      A = (1.0 - p) + q;
      B = (1.0 - s) * q - s * (1.0 - p);
      C = std;
    } else {
      A = ((std * std) * dt) / (2.0 * s) + 1.0;
      B = (((std * std) * (1.0 - s)) / (2.0 * s) + 1.0) * dt;
      C = std * sqrt(gap < 0.0 ? 0.0 : gap);
    }

    const bool silent = (float)C == 0.0f;
    const double noisy = silent ? 1.0 : C, spread = silent ? 1.0 : std;
    double k = gaussian ? 0.5 / (noisy * noisy) : 1.0;
    double c0 = gaussian && normalizer ? log_of(noisy) + kLogSqrt2Pi : 0.0;
    double K = kl_gaussian ? 0.5 / (noisy * noisy) : 0.5 / (spread * spread);
    if (silent) {
      C = c0 = K = 0.0;
      k = score_quiet ? 1.0 : 0.0;
    }
    const double counter = in.noise_step != nullptr
                               ? (double)in.noise_step[i * in.noise_step_stride]
                               : floor(s * 8388608.0);
    const double values[10] = {A, B, C, k, c0, K, gap, counter, std, s};
    valid = valid && counter >= 0.0 && counter < 16777216.0;
    float* row = in.table + 10 * i;
    for (int j = 0; j < 10; ++j) {
      row[j] = (float)values[j];
      valid = valid && row[j] - row[j] == 0.0f;
    }
    if (valid) continue;
    for (int j = 0; j < 10; ++j) row[j] = NAN;
    row[7] = 0.0f;  // an integer still
  }
}
