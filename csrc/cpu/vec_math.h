// Functions of a Vec. Included inside an instruction set's namespace.

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2E = 1.44269504088896341f;
// Clamped here, 2^t is still a normal number.
constexpr float kLowestPower = -126.0f;

// 2^t for t <= 0. Relative error below 2e-7; exactly 1 at 0; 2^-126 from there down; NaN stays NaN
// (max returns its second argument then). Minimax on [-1/2, 1/2] with the constant held at 1.
inline Vec exp2_clamped(Vec t) {
  return scale_by_power(t, [](Vec f) {
    Vec p = fma(splat(0x1.5bba14p-10f), f, splat(0x1.3cea88p-7f));
    p = fma(p, f, splat(0x1.c6b752p-5f));
    p = fma(p, f, splat(0x1.ebf9bcp-3f));
    p = fma(p, f, splat(0x1.62e42ap-1f));
    return fma(p, f, splat(1.0f));
  });
}
inline Vec clamp_power(Vec t) { return max(splat(kLowestPower), t); }

// log(x) for x >= 1/2, below 1 ulp (fdlibm's logf); NaN for NaN and inf.
inline Vec log(Vec x) {
  Vec m, k;
  split_exponent(x, m, k);
  const Vec f = m - splat(1.0f);
  const Vec s = f / (m + splat(1.0f));
  const Vec z = s * s, w = z * z;
  const Vec odd = z * fma(w, splat(0.28498786688f), splat(0.66666662693f));
  const Vec even = w * fma(w, splat(0.24279078841f), splat(0.40000972152f));
  const Vec half = splat(0.5f) * f * f;
  const Vec low = fma(k, splat(9.0580006145e-6f), s * (half + odd + even)) - half + f;
  return fma(k, splat(6.9313812256e-1f), low) + (x - x);
}
// log(1 + x) for x >= 0, without losing a small x.
inline Vec log1p(Vec x) {
  const Vec u = splat(1.0f) + x;
  return log(u) + (x - (u - splat(1.0f))) / u;
}

// tanh(u), below 2 ulp; NaN stays NaN, infinity gives 1. ``slope`` gets 1 - tanh(u)^2, which does
// not cancel where tanh is nearly 1.
inline Vec tanh(Vec u, Vec* slope = nullptr) {
  const Vec zero = splat(0.0f), one = splat(1.0f);
  const Vec a = max(zero - u, u);
  const Vec e = exp2_clamped(clamp_power(a * splat(-2.0f * kLog2E)));
  const Vec inverse = one / (one + e);
  if (slope) *slope = splat(4.0f) * e * inverse * inverse;
  const Vec far = (one - e) * inverse;
  const Vec z = u * u;  // Cephes tanhf
  Vec p = fma(splat(-5.70498872745e-3f), z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const Vec near = fma(p * z, u, u);
  return select_ge(a, splat(0.625f), select_ge(u, zero, far, zero - far), near);
}

// Blocks of float32 logits pass through this where there is a softcap.
inline Vec cap(Vec x, float softcap) { return splat(softcap) * tanh(x / splat(softcap)); }
