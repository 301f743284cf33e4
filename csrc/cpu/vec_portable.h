// Vectors of eight floats or doubles in plain C++: the definition that the other vec_*.h implement,
// and what runs where there is none of AVX2, AVX-512 and NEON. Compilers turn most loops here into
// vector instructions of the target.
//
// A vector type Vec has
//   Real, kLanes                 the type and the number of its elements
//   Vec::splat(x)                x in every lane
//   Vec::load(p)                 kLanes consecutive logits of any type that widens to Real
//   kPowerSteps                  steps of 2^x between powers of two: see nearest_step
//   kInRegisters                 whether compilers keep several of these at a time in registers
//   kMasks                       whether a comparison takes no vector register
//   Words                        2 kLanes logits of 16 bits, as their bits; where Real is float
// and the operators and functions of this file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "scalar_types.h"

namespace sparse_kernels {
namespace portable {

// Sixteen. GCC and Clang have vectors of integers for every target; of loops over 16 bits they make
// none.
struct Words16 {
  using Half = int16_t __attribute__((vector_size(16)));

  Half low, high;

  static Words16 splat(uint16_t x) {
    const int16_t word = int16_t(x);
    const Half all = {word, word, word, word, word, word, word, word};
    return {all, all};
  }
  static Words16 load(const void* p) {
    Words16 out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
};

inline void store(void* p, const Words16& a) { std::memcpy(p, &a, sizeof a); }
inline Words16 operator+(const Words16& a, const Words16& b) {
  return {a.low + b.low, a.high + b.high};
}
// The larger of two integers with signs.
inline Words16 max_signed(const Words16& a, const Words16& b) {
  return {a.low > b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}
// a == b ? x : y.
inline Words16 select_eq(const Words16& a, const Words16& b, const Words16& x, const Words16& y) {
  return {a.low == b.low ? x.low : y.low, a.high == b.high ? x.high : y.high};
}
// Integers with signs in the order of the logits whose bits these are; and those bits of such
// integers. A NaN without a sign is above infinity, one with a sign below minus infinity.
inline Words16 in_signed_order(const Words16& a) {
  return {a.low ^ ((a.low >> 15) & 0x7fff), a.high ^ ((a.high >> 15) & 0x7fff)};
}

template <class Element>
struct Lanes8 {
  using Real = Element;
  using Words = Words16;
  static constexpr int kLanes = 8;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kInRegisters = false;
  static constexpr bool kMasks = false;

  Real lane[kLanes];

  // f(i) in lane i.
  template <class F>
  static Lanes8 map(F f) {
    Lanes8 out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = f(i);
    return out;
  }
  static Lanes8 splat(Real x) {
    return map([&](int) { return x; });
  }
  template <class T>
  static Lanes8 load(const T* p) {
    return map([&](int i) { return widen(p[i]); });
  }
};

template <class T, class Real>
inline void store(T* p, Lanes8<Real> a) {
  for (int i = 0; i < Lanes8<Real>::kLanes; ++i) narrow(a.lane[i], p + i);
}
// store() past the caches where the processor can, to an address that is aligned to
// kStreamAlignment or follows such a store.
template <class T, class Real>
inline void stream(T* p, Lanes8<Real> a) {
  store(p, a);
}
// Lane i of the result is lane lanes[i].
template <class Real>
inline Lanes8<Real> permute(Lanes8<Real> a, const int32_t* lanes) {
  return Lanes8<Real>::map([&](int i) { return a.lane[lanes[i]]; });
}

template <class Real>
inline Lanes8<Real> operator+(Lanes8<Real> a, Lanes8<Real> b) {
  return Lanes8<Real>::map([&](int i) { return a.lane[i] + b.lane[i]; });
}
template <class Real>
inline Lanes8<Real> operator-(Lanes8<Real> a, Lanes8<Real> b) {
  return Lanes8<Real>::map([&](int i) { return a.lane[i] - b.lane[i]; });
}
template <class Real>
inline Lanes8<Real> operator*(Lanes8<Real> a, Lanes8<Real> b) {
  return Lanes8<Real>::map([&](int i) { return a.lane[i] * b.lane[i]; });
}
template <class Real>
inline Lanes8<Real> operator/(Lanes8<Real> a, Lanes8<Real> b) {
  return Lanes8<Real>::map([&](int i) { return a.lane[i] / b.lane[i]; });
}
// a b + c; rounded twice here, once in the other vec_*.h.
template <class Real>
inline Lanes8<Real> fma(Lanes8<Real> a, Lanes8<Real> b, Lanes8<Real> c) {
  return Lanes8<Real>::map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
// a b - c, rounded once (or nearly), so that nothing is lost where the two cancel.
inline Lanes8<float> fms(Lanes8<float> a, Lanes8<float> b, Lanes8<float> c) {
  return Lanes8<float>::map(
      [&](int i) { return float(double(a.lane[i]) * b.lane[i] - c.lane[i]); });
}
inline Lanes8<double> fms(Lanes8<double> a, Lanes8<double> b, Lanes8<double> c) {
  return Lanes8<double>::map([&](int i) { return std::fma(a.lane[i], b.lane[i], -c.lane[i]); });
}
// The larger; b where either is NaN, as on x86.
template <class Real>
inline Lanes8<Real> max(Lanes8<Real> a, Lanes8<Real> b) {
  return Lanes8<Real>::map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// The smaller; b where either is NaN.
template <class Real>
inline Lanes8<Real> min(Lanes8<Real> a, Lanes8<Real> b) {
  return Lanes8<Real>::map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// a >= b ? x : y; y where either is NaN.
template <class Real>
inline Lanes8<Real> select_ge(Lanes8<Real> a, Lanes8<Real> b, Lanes8<Real> x, Lanes8<Real> y) {
  return Lanes8<Real>::map([&](int i) { return a.lane[i] >= b.lane[i] ? x.lane[i] : y.lane[i]; });
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

// 2^(d scale / kPowerSteps) where that is between 2^-124 and 1 (2^-1020 and 1 in double), or NaN:
// the caller clamps. In two functions, so that several vectors can take turns. nearest_step returns
// n, the integer nearest to d scale, as power_of_step reads it, and the rest f in [-1/2, 1/2];
// `slope` is (2^(f / kPowerSteps) - 1) / f.
inline Lanes8<float> nearest_step(Lanes8<float> d, Lanes8<float> scale, Lanes8<float>& f) {
  // Adding 1.5 * 2^23 leaves the rounded sum in the low bits: a conversion from float to int would
  // be undefined for NaN.
  const Lanes8<float> magic = Lanes8<float>::splat(12582912.0f);
  const Lanes8<float> shifted = d * scale + magic;
  f = fms(d, scale, shifted - magic);
  return shifted;
}
inline Lanes8<float> power_of_step(Lanes8<float> shifted, Lanes8<float> f, Lanes8<float> slope) {
  const Lanes8<float> p = fma(slope, f, Lanes8<float>::splat(1.0f));
  // A product, since a sum of exponents could make a number of a NaN.
  return Lanes8<float>::map([&](int i) {
    return p.lane[i] * float_from_bits((bits_from_float(shifted.lane[i]) + 127) << 23);
  });
}
inline Lanes8<double> nearest_step(Lanes8<double> d, Lanes8<double> scale, Lanes8<double>& f) {
  const Lanes8<double> magic = Lanes8<double>::splat(0x1.8p52);
  const Lanes8<double> shifted = d * scale + magic;
  f = fms(d, scale, shifted - magic);
  return shifted;
}
inline Lanes8<double> power_of_step(Lanes8<double> shifted, Lanes8<double> f,
                                    Lanes8<double> slope) {
  const Lanes8<double> p = fma(slope, f, Lanes8<double>::splat(1.0));
  return Lanes8<double>::map([&](int i) {
    return p.lane[i] * double_from_bits((bits_from_double(shifted.lane[i]) + 1023) << 52);
  });
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)), for x >= sqrt(1/2); m and k are unspecified for
// infinity and NaN.
inline void split_exponent(Lanes8<float> x, Lanes8<float>& m, Lanes8<float>& k) {
  constexpr uint32_t kRootHalf = 0x3f3504f3;
  m = Lanes8<float>::map([&](int i) {
    const uint32_t bits = bits_from_float(x.lane[i]);
    return float_from_bits(bits - ((bits - kRootHalf) & 0xff800000u));
  });
  k = Lanes8<float>::map(
      [&](int i) { return float((bits_from_float(x.lane[i]) - kRootHalf) >> 23); });
}
inline void split_exponent(Lanes8<double> x, Lanes8<double>& m, Lanes8<double>& k) {
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;
  m = Lanes8<double>::map([&](int i) {
    const uint64_t bits = bits_from_double(x.lane[i]);
    return double_from_bits(bits - ((bits - kRootHalf) & 0xfff0000000000000));
  });
  k = Lanes8<double>::map(
      [&](int i) { return double((bits_from_double(x.lane[i]) - kRootHalf) >> 52); });
}

}  // namespace portable
}  // namespace sparse_kernels
