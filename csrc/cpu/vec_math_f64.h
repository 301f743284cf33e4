// Approximations in double for the functions of vec_math.h; vec_math_f32.h describes the members.
#pragma once

namespace sparse_kernels {

template <class Vec, class Real>
struct ApproximationIn;

template <class Vec>
struct ApproximationIn<Vec, double> {
  static constexpr double kLowestPower = -1020.0;
  static constexpr double kFlushBelow = 1e-300;
  static constexpr double kLn2High = 6.93147180369123816490e-1,
                          kLn2Low = 1.90821492927058770002e-10;

  // The relative error of 2^f is 2e-17.
  static Vec exp2_slope(Vec f) {
    static_assert(Vec::kPowerSteps == 1, "no polynomial for other steps");
    Vec p = fma(Vec::splat(0x1.c063841f3a21dp-32), f, Vec::splat(0x1.e605f964b639dp-28));
    p = fma(p, f, Vec::splat(0x1.b54167a1b0034p-24));
    p = fma(p, f, Vec::splat(0x1.62bfd49ededd3p-20));
    p = fma(p, f, Vec::splat(0x1.ffcbee3b0a61cp-17));
    p = fma(p, f, Vec::splat(0x1.43091309610fcp-13));
    p = fma(p, f, Vec::splat(0x1.5d87fe7bbbe09p-10));
    p = fma(p, f, Vec::splat(0x1.3b2ab6fba1e1cp-7));
    p = fma(p, f, Vec::splat(0x1.c6b08d7048f31p-5));
    p = fma(p, f, Vec::splat(0x1.ebfbdff82c598p-3));
    return fma(p, f, Vec::splat(0x1.62e42fefa39f3p-1));
  }

  static Vec log_series(Vec z) {  // fdlibm's log
    const Vec w = z * z;
    Vec odd = fma(w, Vec::splat(1.479819860511658591e-1), Vec::splat(1.818357216161805012e-1));
    odd = fma(odd, w, Vec::splat(2.857142874366239149e-1));
    odd = z * fma(odd, w, Vec::splat(6.666666666666735130e-1));
    Vec even = fma(w, Vec::splat(1.531383769920937332e-1), Vec::splat(2.222219843214978396e-1));
    even = w * fma(even, w, Vec::splat(3.999999999940941908e-1));
    return odd + even;
  }

  static Vec tanh_series(Vec z) {  // Cephes' tanh
    Vec p = fma(Vec::splat(-9.64399179425052238628e-1), z, Vec::splat(-9.92877231001918586564e1));
    p = fma(p, z, Vec::splat(-1.61468768441708447952e3));
    Vec q = z + Vec::splat(1.12811678491632931402e2);
    q = fma(q, z, Vec::splat(2.23548839060100448583e3));
    q = fma(q, z, Vec::splat(4.84406305325125486048e3));
    return z * (p / q);
  }
};

}  // namespace sparse_kernels
