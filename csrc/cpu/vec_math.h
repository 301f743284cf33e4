// exp, log, log1p, tanh and the softcap of a vector; vec_portable.h describes the vector types.
#pragma once

#include <limits>

#include "vec_math_f32.h"
#include "vec_math_f64.h"
#include "vec_pair.h"

namespace sparse_kernels {

template <class Vec>
using Approximation = ApproximationIn<Vec, typename Vec::Real>;

constexpr double kLog2E = 1.44269504088896340736;

template <class Vec>
constexpr typename Vec::Real kInfinity = std::numeric_limits<typename Vec::Real>::infinity();
template <class Vec>
constexpr typename Vec::Real kLargest = std::numeric_limits<typename Vec::Real>::max();
template <class Vec>
constexpr typename Vec::Real kNaN = std::numeric_limits<typename Vec::Real>::quiet_NaN();

// e^(d / temperature) for d <= 0, as 2^(c d) with c = log2(e) / temperature. In float the relative
// error is below 1e-7, besides that of rounding c: c d is not rounded. Exactly 1 at 0. The argument
// must be clamped; below the clamp the result is 2^kLowestPower. NaN stays NaN.
template <class Vec>
struct Exponential {
  using Real = typename Vec::Real;

  Vec scale, lowest;

  explicit Exponential(double inverse_temperature) {
    const double c = kLog2E * inverse_temperature, l = Approximation<Vec>::kLowestPower / c;
    scale = Vec::splat(Real(Vec::kPowerSteps * c));
    lowest = Vec::splat(l < -double(kLargest<Vec>) ? -kLargest<Vec> : Real(l));
  }
  // The same of a pair. What it computes with is one vector, not two.
  template <class Half>
  explicit Exponential(const Exponential<Half>& half)
      : scale(Vec::twice(half.scale)), lowest(Vec::twice(half.lowest)) {}
  // NaN stays NaN because max returns its second argument then.
  Vec clamp(Vec d) const { return max(lowest, d); }
  __attribute__((always_inline)) Vec operator()(Vec clamped) const { return end(begin(clamped)); }

  // The same in two halves. A loop that begins an exponential before it ends the one before has
  // fewer operations that wait for others.
  struct Begun {
    Vec step, f;
  };
  __attribute__((always_inline)) Begun begin(Vec clamped) const {
    Begun begun;
    begun.step = nearest_step(clamped, scale, begun.f);
    return begun;
  }
  __attribute__((always_inline)) Vec end(const Begun& begun) const {
    return power_of_step(begun.step, begun.f, Approximation<Vec>::exp2_slope(begun.f));
  }
};

// log(x) for x >= 1, with an error below 1 ulp; NaN for NaN and infinity. vec_avx512.h has its own
// for floats.
template <class Vec>
__attribute__((always_inline)) inline Vec vec_log(Vec x) {
  using Real = typename Vec::Real;
  using Log = Approximation<Vec>;
  Vec m, k;
  split_exponent(x, m, k);
  const Vec f = m - Vec::splat(1);
  const Vec s = f / (m + Vec::splat(1));
  const Vec half = Vec::splat(Real(0.5)) * f * f;
  const Vec low = fma(k, Vec::splat(Log::kLn2Low), s * (half + Log::log_series(s * s))) - half + f;
  return fma(k, Vec::splat(Log::kLn2High), low) + (x - x);
}

// log(1 + x) for x >= 0, accurate for small x too; `inverse` is 1 / (1 + x), nearly: it scales what
// rounding 1 + x has lost.
template <class Vec>
inline Vec vec_log1p(Vec x, Vec inverse) {
  const Vec u = Vec::splat(1) + x;
  return fma(x - (u - Vec::splat(1)), inverse, vec_log(u));
}

// tanh(u), with an error below 2 ulp; NaN stays NaN, and infinity gives 1. `slope`, where it is not
// null, receives 1 - tanh(u)^2, computed so that it does not cancel where tanh is nearly 1.
template <class Vec>
inline Vec vec_tanh(Vec u, Vec* slope = nullptr) {
  using Real = typename Vec::Real;
  const Vec zero = Vec::splat(0), one = Vec::splat(1);
  const Exponential<Vec> squared(2.0);
  const Vec a = max(zero - u, u);
  const Vec e = squared(squared.clamp(zero - a));
  const Vec inverse = one / (one + e);
  if (slope) *slope = Vec::splat(4) * e * inverse * inverse;
  const Vec far = (one - e) * inverse;
  const Vec near = fma(Approximation<Vec>::tanh_series(u * u), u, u);
  return select_ge(a, Vec::splat(Real(0.625)), select_ge(u, zero, far, zero - far), near);
}

// softcap tanh(x / softcap).
template <class Vec>
inline Vec vec_cap(Vec x, typename Vec::Real softcap) {
  return Vec::splat(softcap) * vec_tanh(x / Vec::splat(softcap));
}

}  // namespace sparse_kernels
