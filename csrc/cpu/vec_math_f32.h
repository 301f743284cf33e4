// Approximations in float for the functions of vec_math.h.
#pragma once

namespace sparse_kernels {

template <class Vec, class Real>
struct ApproximationIn;

template <class Vec>
struct ApproximationIn<Vec, float> {
  // 2^kLowestPower, and every intermediate result of computing it, even in steps of an eighth
  // (-124, plus 0.3 of a step) or a sixteenth (less 0.4 of a step), is a normal number: a masked
  // logit must not be as slow as subnormal numbers are.
  static constexpr double kLowestPower = -123.9625;
  // A sum below this has only terms of 2^kLowestPower and counts as 0.
  static constexpr float kFlushBelow = 1e-30f;
  static constexpr float kLn2High = 6.9313812256e-1f, kLn2Low = 9.0580006145e-6f;

  // (2^(f / kPowerSteps) - 1) / f on [-1/2, 1/2], minimax for 2^(f / kPowerSteps), whose relative
  // error is 2e-8 for one step, 3e-8 for eight and 2e-9 for sixteen.
  static Vec exp2_slope(Vec f) {
    if (Vec::kPowerSteps == 8) {
      const Vec p = fma(Vec::splat(0x1.c6a002p-14f), f, Vec::splat(0x1.ec0c32p-9f));
      return fma(p, f, Vec::splat(0x1.62e432p-4f));
    }
    if (Vec::kPowerSteps == 16) {
      const Vec p = fma(Vec::splat(0x1.c6b46ap-17f), f, Vec::splat(0x1.ebfff4p-11f));
      return fma(p, f, Vec::splat(0x1.62e43p-5f));
    }
    Vec p = fma(Vec::splat(0x1.41fbbcp-13f), f, Vec::splat(0x1.5f3e54p-10f));
    p = fma(p, f, Vec::splat(0x1.3b2d4cp-7f));
    p = fma(p, f, Vec::splat(0x1.c6aee8p-5f));
    p = fma(p, f, Vec::splat(0x1.ebfbdcp-3f));
    return fma(p, f, Vec::splat(0x1.62e43p-1f));
  }

  // R(z) with log((1 + s) / (1 - s)) = 2 s + s R(s^2) (fdlibm's logf).
  static Vec log_series(Vec z) {
    const Vec w = z * z;
    const Vec odd = z * fma(w, Vec::splat(0.28498786688f), Vec::splat(0.66666662693f));
    const Vec even = w * fma(w, Vec::splat(0.24279078841f), Vec::splat(0.40000972152f));
    return odd + even;
  }

  // R(z) with tanh(u) = u + u R(u^2), for |u| below 0.625 (Cephes' tanhf).
  static Vec tanh_series(Vec z) {
    Vec p = fma(Vec::splat(-5.70498872745e-3f), z, Vec::splat(2.06390887954e-2f));
    p = fma(p, z, Vec::splat(-5.37397155531e-2f));
    p = fma(p, z, Vec::splat(1.33314422036e-1f));
    return z * fma(p, z, Vec::splat(-3.33332819422e-1f));
  }
};

}  // namespace sparse_kernels
