// Eight floats, or eight doubles, in plain C++: the definition that the other vec_*.h implement,
// and what serves where neither AVX2 nor AVX-512 is there. Compilers turn most loops here into
// whatever the target has.
#pragma once

#include <cmath>

#include "scalar_types.h"

namespace sparse_kernels {
namespace portable {

template <class Real>
struct Lanes8 {
  static constexpr int kLanes = 8;
  Real lane[kLanes];
};

// f(i) in lane i.
template <class Real, class F>
inline Lanes8<Real> map(F f) {
  Lanes8<Real> out;
  for (int i = 0; i < Lanes8<Real>::kLanes; ++i) out.lane[i] = f(i);
  return out;
}

template <class T>
inline auto load(const T* p) {
  return map<decltype(widen(*p))>([&](int i) { return widen(p[i]); });
}
template <class T, class Real>
inline void store(T* p, Lanes8<Real> a) {
  for (int i = 0; i < Lanes8<Real>::kLanes; ++i) narrow(a.lane[i], p + i);
}

template <class Real>
inline Lanes8<Real> operator+(Lanes8<Real> a, Lanes8<Real> b) {
  return map<Real>([&](int i) { return a.lane[i] + b.lane[i]; });
}
template <class Real>
inline Lanes8<Real> operator-(Lanes8<Real> a, Lanes8<Real> b) {
  return map<Real>([&](int i) { return a.lane[i] - b.lane[i]; });
}
template <class Real>
inline Lanes8<Real> operator*(Lanes8<Real> a, Lanes8<Real> b) {
  return map<Real>([&](int i) { return a.lane[i] * b.lane[i]; });
}
template <class Real>
inline Lanes8<Real> operator/(Lanes8<Real> a, Lanes8<Real> b) {
  return map<Real>([&](int i) { return a.lane[i] / b.lane[i]; });
}
// a b + c; here rounded twice.
template <class Real>
inline Lanes8<Real> fma(Lanes8<Real> a, Lanes8<Real> b, Lanes8<Real> c) {
  return map<Real>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
// a b - c, rounded once (or nearly), so that nothing is lost where the two cancel.
inline Lanes8<float> fms(Lanes8<float> a, Lanes8<float> b, Lanes8<float> c) {
  return map<float>([&](int i) { return float(double(a.lane[i]) * b.lane[i] - c.lane[i]); });
}
inline Lanes8<double> fms(Lanes8<double> a, Lanes8<double> b, Lanes8<double> c) {
  return map<double>([&](int i) { return std::fma(a.lane[i], b.lane[i], -c.lane[i]); });
}
template <class Real>
inline Lanes8<Real> sqrt(Lanes8<Real> a) {
  return map<Real>([&](int i) { return std::sqrt(a.lane[i]); });
}
// The larger (the smaller); the second where either is NaN (as on x86).
template <class Real>
inline Lanes8<Real> max(Lanes8<Real> a, Lanes8<Real> b) {
  return map<Real>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
template <class Real>
inline Lanes8<Real> min(Lanes8<Real> a, Lanes8<Real> b) {
  return map<Real>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// a >= b ? x : y; y where either is NaN.
template <class Real>
inline Lanes8<Real> select_ge(Lanes8<Real> a, Lanes8<Real> b, Lanes8<Real> x, Lanes8<Real> y) {
  return map<Real>([&](int i) { return a.lane[i] >= b.lane[i] ? x.lane[i] : y.lane[i]; });
}

// In double: the last few roundings of a sum of floats would be most of its error.
template <class Real>
inline double reduce_add(Lanes8<Real> a) {
  const auto pair = [&](int i) { return double(a.lane[i]) + double(a.lane[i + 4]); };
  return (pair(0) + pair(2)) + (pair(1) + pair(3));
}
template <class Real>
inline Real reduce_max(Lanes8<Real> a) {
  Real m = a.lane[0];
  for (int i = 1; i < Lanes8<Real>::kLanes; ++i) m = m > a.lane[i] ? m : a.lane[i];
  return m;
}

// f32 and f64 hold what is different for the two; the kernel is compiled in each.
namespace f32 {

using Real = float;
using Vec = Lanes8<float>;

inline Vec splat(float x) {
  return map<float>([&](int) { return x; });
}

// 2^(d scale / kPowerSteps), for what is between 2^-124 and 1, or NaN: the caller clamps. slope(f)
// is (2^(f / kPowerSteps) - 1) / f, for f in [-1/2, 1/2].
constexpr int kPowerSteps = 1;

template <class Slope>
inline Vec exp2_steps(Vec d, Vec scale, Slope slope) {
  // Adding 1.5 * 2^23 leaves round(t) in the low bits: no float-to-int conversion, which would be
  // undefined for NaN. A product, not a sum of exponents, which could make a number of a NaN.
  const Vec magic = splat(12582912.0f);
  const Vec shifted = d * scale + magic;
  const Vec f = fms(d, scale, shifted - magic);
  const Vec p = fma(slope(f), f, splat(1.0f));
  return map<float>([&](int i) {
    return p.lane[i] * float_from_bits((bits_from_float(shifted.lane[i]) + 127) << 23);
  });
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)), for x >= sqrt(1/2); anything for infinity and NaN.
inline void split_exponent(Vec x, Vec& m, Vec& k) {
  m = map<float>([&](int i) {
    const uint32_t bits = bits_from_float(x.lane[i]);
    return float_from_bits(bits - ((bits - 0x3f3504f3u) & 0xff800000u));
  });
  k = map<float>([&](int i) { return float((bits_from_float(x.lane[i]) - 0x3f3504f3u) >> 23); });
}

}  // namespace f32

namespace f64 {

using Real = double;
using Vec = Lanes8<double>;

inline Vec splat(double x) {
  return map<double>([&](int) { return x; });
}

constexpr int kPowerSteps = 1;

template <class Slope>
inline Vec exp2_steps(Vec d, Vec scale, Slope slope) {  // down to 2^-1020
  const Vec magic = splat(0x1.8p52);
  const Vec shifted = d * scale + magic;
  const Vec f = fms(d, scale, shifted - magic);
  const Vec p = fma(slope(f), f, splat(1.0));
  return map<double>([&](int i) {
    return p.lane[i] * double_from_bits((bits_from_double(shifted.lane[i]) + 1023) << 52);
  });
}

inline void split_exponent(Vec x, Vec& m, Vec& k) {
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;
  m = map<double>([&](int i) {
    const uint64_t bits = bits_from_double(x.lane[i]);
    return double_from_bits(bits - ((bits - kRootHalf) & 0xfff0000000000000));
  });
  k = map<double>([&](int i) { return double((bits_from_double(x.lane[i]) - kRootHalf) >> 52); });
}

}  // namespace f64

}  // namespace portable
}  // namespace sparse_kernels
