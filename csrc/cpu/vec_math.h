// Functions of a Vec. Included inside an instruction set's f32 or f64, after
// vec_math_<precision>.h.

constexpr double kLog2E = 1.44269504088896340736;

// e^(d / temperature) for d <= 0: 2^(c d) with c = log2(e) / temperature. In float within 1e-7 of
// it, relatively, besides what rounding c brings: c d is not rounded. Exactly 1 at 0. Clamped
// first, it is 2^kLowestPower from there down, and NaN stays NaN.
struct Exponential {
  Vec scale, lowest;

  explicit Exponential(double inverse_temperature) {
    const double c = kLog2E * inverse_temperature, l = kLowestPower / c;
    scale = splat(Real(kPowerSteps * c));
    lowest = splat(l < -double(kLargest) ? -kLargest : Real(l));
  }
  // max returns its second argument for NaN.
  Vec clamp(Vec d) const { return max(lowest, d); }
  Vec operator()(Vec clamped) const {
    return exp2_steps(clamped, scale, [](Vec f) { return exp2_slope(f); });
  }
};

// log(x) for x >= sqrt(1/2), below 1 ulp; NaN for NaN and inf.
inline Vec log(Vec x) {
  Vec m, k;
  split_exponent(x, m, k);
  const Vec f = m - splat(1);
  const Vec s = f / (m + splat(1));
  const Vec half = splat(Real(0.5)) * f * f;
  const Vec low = fma(k, splat(kLn2Low), s * (half + log_series(s * s))) - half + f;
  return fma(k, splat(kLn2High), low) + (x - x);
}
// log(1 + x) for x >= 0, without losing a small x.
inline Vec log1p(Vec x) {
  const Vec u = splat(1) + x;
  return log(u) + (x - (u - splat(1))) / u;
}

// tanh(u), below 2 ulp; NaN stays NaN, infinity gives 1. ``slope`` gets 1 - tanh(u)^2, which does
// not cancel where tanh is nearly 1.
inline Vec tanh(Vec u, Vec* slope = nullptr) {
  const Vec zero = splat(0), one = splat(1);
  const Exponential squared(2.0);
  const Vec a = max(zero - u, u);
  const Vec e = squared(squared.clamp(zero - a));
  const Vec inverse = one / (one + e);
  if (slope) *slope = splat(4) * e * inverse * inverse;
  const Vec far = (one - e) * inverse;
  const Vec near = fma(tanh_series(u * u), u, u);
  return select_ge(a, splat(Real(0.625)), select_ge(u, zero, far, zero - far), near);
}

// Blocks of logits pass through this where there is a softcap.
inline Vec cap(Vec x, Real softcap) { return splat(softcap) * tanh(x / splat(softcap)); }
