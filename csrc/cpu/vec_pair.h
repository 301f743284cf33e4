// Two vectors that are treated as one of twice the lanes: what is computed of them alternates, so
// that neither waits for itself. A processor holds the operations that wait in a queue, and an
// exponential is a chain of a dozen.
#pragma once

#include <cstdint>

#include "scalar_types.h"

namespace sparse_kernels {

// a == b ? x : y; y where either is NaN. vec_*.h may have a faster one.
template <class Vec>
inline Vec select_eq(Vec a, Vec b, Vec x, Vec y) {
  return select_ge(a, b, select_ge(b, a, x, y), y);
}

// Where two vectors differ, or either is NaN. Where kMasks, this is a mask, and there are
//   add_where(there, a, b)      a + b there, a elsewhere
//   fma_where(there, a, b, c)   a b + c there, c elsewhere
template <class Vec>
struct Difference {
  Vec a, b;
};
template <class Vec>
inline Difference<Vec> differs(Vec a, Vec b) {
  return {a, b};
}
// x there, y elsewhere.
template <class Vec>
inline Vec select_where(Difference<Vec> there, Vec x, Vec y) {
  return select_eq(there.a, there.b, y, x);
}

// Contiguous classes of kLanes rows, row_stride elements apart: x[j * stride + i] is column j of
// row i. vec_*.h may have a faster one.
template <class Vec, class T>
inline void transpose(Vec, const T* rows, int64_t row_stride, int columns, typename Vec::Real* x,
                      int stride) {
  for (int i = 0; i < Vec::kLanes; ++i)
    for (int j = 0; j < columns; ++j) x[j * stride + i] = widen(rows[i * row_stride + j]);
}

// vec_portable.h describes the functions.
template <class Half>
struct Pair {
  using Real = typename Half::Real;
  static constexpr int kLanes = 2 * Half::kLanes;
  static constexpr int kPowerSteps = Half::kPowerSteps;
  static constexpr bool kInRegisters = Half::kInRegisters;
  static constexpr bool kMasks = Half::kMasks;

  Half low, high;

  static Pair twice(Half a) { return {a, a}; }
  static Pair splat(Real x) { return twice(Half::splat(x)); }
  template <class T>
  static Pair load(const T* p) {
    return {Half::load(p), Half::load(p + Half::kLanes)};
  }
};

template <class Vec>
constexpr int vectors_in = 1;
template <class Half>
constexpr int vectors_in<Pair<Half>> = 2 * vectors_in<Half>;

template <class T, class Half>
inline void store(T* p, Pair<Half> a) {
  store(p, a.low);
  store(p + Half::kLanes, a.high);
}

template <class Half>
inline Pair<Half> operator+(Pair<Half> a, Pair<Half> b) {
  return {a.low + b.low, a.high + b.high};
}
template <class Half>
inline Pair<Half> operator-(Pair<Half> a, Pair<Half> b) {
  return {a.low - b.low, a.high - b.high};
}
template <class Half>
inline Pair<Half> operator*(Pair<Half> a, Pair<Half> b) {
  return {a.low * b.low, a.high * b.high};
}
template <class Half>
inline Pair<Half> operator/(Pair<Half> a, Pair<Half> b) {
  return {a.low / b.low, a.high / b.high};
}
template <class Half>
inline Pair<Half> fma(Pair<Half> a, Pair<Half> b, Pair<Half> c) {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
template <class Half>
inline Pair<Half> fms(Pair<Half> a, Pair<Half> b, Pair<Half> c) {
  return {fms(a.low, b.low, c.low), fms(a.high, b.high, c.high)};
}
template <class Half>
inline Pair<Half> max(Pair<Half> a, Pair<Half> b) {
  return {max(a.low, b.low), max(a.high, b.high)};
}
template <class Half>
inline Pair<Half> min(Pair<Half> a, Pair<Half> b) {
  return {min(a.low, b.low), min(a.high, b.high)};
}
template <class Half>
inline Pair<Half> select_ge(Pair<Half> a, Pair<Half> b, Pair<Half> x, Pair<Half> y) {
  return {select_ge(a.low, b.low, x.low, y.low), select_ge(a.high, b.high, x.high, y.high)};
}
template <class Half>
inline Pair<Half> select_eq(Pair<Half> a, Pair<Half> b, Pair<Half> x, Pair<Half> y) {
  return {select_eq(a.low, b.low, x.low, y.low), select_eq(a.high, b.high, x.high, y.high)};
}

template <class Half>
using DifferenceOf = decltype(differs(Half(), Half()));
template <class Half>
struct PairDifference {
  DifferenceOf<Half> low, high;
};
template <class Half>
inline PairDifference<Half> differs(Pair<Half> a, Pair<Half> b) {
  return {differs(a.low, b.low), differs(a.high, b.high)};
}
template <class Half>
inline Pair<Half> select_where(PairDifference<Half> there, Pair<Half> x, Pair<Half> y) {
  return {select_where(there.low, x.low, y.low), select_where(there.high, x.high, y.high)};
}
template <class Half>
inline Pair<Half> add_where(PairDifference<Half> there, Pair<Half> a, Pair<Half> b) {
  return {add_where(there.low, a.low, b.low), add_where(there.high, a.high, b.high)};
}
template <class Half>
inline Pair<Half> fma_where(PairDifference<Half> there, Pair<Half> a, Pair<Half> b, Pair<Half> c) {
  return {fma_where(there.low, a.low, b.low, c.low), fma_where(there.high, a.high, b.high, c.high)};
}

template <class Half>
inline Pair<Half> nearest_step(Pair<Half> d, Pair<Half> scale, Pair<Half>& f) {
  return {nearest_step(d.low, scale.low, f.low), nearest_step(d.high, scale.high, f.high)};
}
template <class Half>
inline Pair<Half> power_of_step(Pair<Half> n, Pair<Half> f, Pair<Half> slope) {
  return {power_of_step(n.low, f.low, slope.low), power_of_step(n.high, f.high, slope.high)};
}

template <class Half, class T>
inline void transpose(Pair<Half>, const T* rows, int64_t row_stride, int columns,
                      typename Half::Real* x, int stride) {
  constexpr int kLanes = Half::kLanes;
  transpose(Half(), rows, row_stride, columns, x, stride);
  transpose(Half(), rows + kLanes * row_stride, row_stride, columns, x + kLanes, stride);
}

}  // namespace sparse_kernels
