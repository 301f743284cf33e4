// What the functions of vec_math.h approximate with in float. Included inside an instruction set's
// f32.

// 2^t is still a normal number, and so is all that it is made of, even in steps of an eighth (-124,
// plus 0.4 of a step): a masked logit must not cost what subnormal numbers cost.
constexpr double kLowestPower = -123.95;
constexpr float kFlushBelow = 1e-30f;  // a sum that is only terms of 2^kLowestPower is nothing
constexpr float kLn2High = 6.9313812256e-1f, kLn2Low = 9.0580006145e-6f;

// (2^(f / kPowerSteps) - 1) / f on [-1/2, 1/2], minimax for 2^(f / kPowerSteps): relative error of
// that 2e-8 and 3e-8.
inline Vec exp2_slope(Vec f) {
  if (kPowerSteps == 8) {
    const Vec p = fma(splat(0x1.c6a002p-14f), f, splat(0x1.ec0c32p-9f));
    return fma(p, f, splat(0x1.62e432p-4f));
  }
  Vec p = fma(splat(0x1.41fbbcp-13f), f, splat(0x1.5f3e54p-10f));
  p = fma(p, f, splat(0x1.3b2d4cp-7f));
  p = fma(p, f, splat(0x1.c6aee8p-5f));
  p = fma(p, f, splat(0x1.ebfbdcp-3f));
  return fma(p, f, splat(0x1.62e43p-1f));
}

// R(z) with log((1 + s) / (1 - s)) = 2 s + s R(s^2) (fdlibm's logf).
inline Vec log_series(Vec z) {
  const Vec w = z * z;
  const Vec odd = z * fma(w, splat(0.28498786688f), splat(0.66666662693f));
  const Vec even = w * fma(w, splat(0.24279078841f), splat(0.40000972152f));
  return odd + even;
}

// R(z) with tanh(u) = u + u R(u^2), for |u| below 0.625 (Cephes' tanhf).
inline Vec tanh_series(Vec z) {
  Vec p = fma(splat(-5.70498872745e-3f), z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  return z * fma(p, z, splat(-3.33332819422e-1f));
}
