// Eight floats in plain C++: the definition that the other vec_*.h implement, and what serves where
// neither AVX2 nor AVX-512 is there. Compilers turn most loops here into whatever the target has.
#pragma once

#include <cmath>

#include "scalar_types.h"

namespace sparse_kernels {
namespace portable {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kUnroll = 2;  // independent accumulators in a loop over columns
  float lane[kLanes];
};

template <class F>
inline Vec map(F f) {
  Vec out;
  for (int i = 0; i < Vec::kLanes; ++i) out.lane[i] = f(i);
  return out;
}

inline Vec splat(float x) {
  return map([&](int) { return x; });
}
template <class T>
inline Vec load(const T* p) {
  return map([&](int i) { return to_float(p[i]); });
}
template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < Vec::kLanes; ++i) from_float(a.lane[i], p + i);
}

inline Vec operator+(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Vec sqrt(Vec a) {
  return map([&](int i) { return std::sqrt(a.lane[i]); });
}
// The larger (the smaller); the second where either is NaN (as on x86).
inline Vec max(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// a >= b ? x : y; y where either is NaN.
inline Vec select_ge(Vec a, Vec b, Vec x, Vec y) {
  return map([&](int i) { return a.lane[i] >= b.lane[i] ? x.lane[i] : y.lane[i]; });
}

inline float reduce_add(Vec a) {
  return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) +
         ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
}
inline float reduce_max(Vec a) {
  float m = a.lane[0];
  for (int i = 1; i < Vec::kLanes; ++i) m = m > a.lane[i] ? m : a.lane[i];
  return m;
}

// p(t - n) 2^n with n = round(t), for t in [-126, 0] or NaN: the caller clamps.
template <class Polynomial>
inline Vec scale_by_power(Vec t, Polynomial polynomial) {
  // Adding 1.5 * 2^23 leaves round(t) in the low bits: no float-to-int conversion, which would be
  // undefined for NaN.
  const Vec magic = splat(12582912.0f);
  const Vec shifted = t + magic;
  const Vec p = polynomial(t - (shifted - magic));
  return map([&](int i) {
    return float_from_bits(bits_from_float(p.lane[i]) + (bits_from_float(shifted.lane[i]) << 23));
  });
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)), for normal x > 0; anything for other x.
inline void split_exponent(Vec x, Vec& m, Vec& k) {
  m = map([&](int i) {
    const uint32_t bits = bits_from_float(x.lane[i]);
    return float_from_bits(bits - ((bits - 0x3f3504f3u) & 0xff800000u));
  });
  k = map([&](int i) { return float(int32_t(bits_from_float(x.lane[i]) - 0x3f3504f3u) >> 23); });
}

}  // namespace portable
}  // namespace sparse_kernels
