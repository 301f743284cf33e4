// Functions of one block of a row: up to kBlock + kLanes consecutive classes, in whole vectors.
#pragma once

#include <type_traits>

#include "row_stats_plan.h"
#include "row_stats_sums.h"
#include "scalar_types.h"
#include "vec_any_order.h"
#include "vec_math.h"

namespace sparse_kernels {

// -inf in the first half: min() with kLanes of these removes the lanes before the second half.
template <class Vec>
struct TailMask {
  typename Vec::Real value[2 * Vec::kLanes] = {};
  constexpr TailMask() {
    for (int i = 0; i < 2 * Vec::kLanes; ++i)
      value[i] = i < Vec::kLanes ? -kInfinity<Vec> : kInfinity<Vec>;
  }
};
// Hazard: it must be constant. An initialiser would run when the library is loaded, on processors
// without these instructions too.
template <class Vec>
constexpr TailMask<Vec> kTailMask;

template <class Vec>
inline int vectors_of(int columns) {
  return (columns + Vec::kLanes - 1) / Vec::kLanes;
}

// Copies a block, capped where there is a softcap, in whole vectors; the copy may be changed. Where
// columns are left over, the last vector ends with the last column and begins with -inf. (Padded at
// its end, it would be stored in two parts, and its load would wait for both.) There must be at
// least kLanes columns. Returns the largest in the copy, as max_block does.
template <class Vec, class T, class Real = typename Vec::Real>
inline Real copy_block(const T* x, int columns, Real softcap, Real* copy) {
  constexpr int kLanes = Vec::kLanes;
  const auto capped = [&](int i) __attribute__((always_inline)) {
    const Vec v = Vec::load(x + i);
    return softcap != 0 ? vec_cap(v, softcap) : v;
  };
  const int tail = columns % kLanes, whole = columns - tail;
  Vec largest = Vec::splat(-kInfinity<Vec>), other = largest;
  const auto put = [&](int i, Vec v, Vec& m) __attribute__((always_inline)) {
    store(copy + i, v);
    m = max(m, v);
  };
  int i = 0;
  for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    put(i, capped(i), largest);
    put(i + kLanes, capped(i + kLanes), other);
  }
  if (i < whole) put(i, capped(i), largest);
  if (tail)
    put(whole, min(Vec::load(kTailMask<Vec>.value + tail), capped(columns - kLanes)), other);
  return reduce_max(max(largest, other));
}

// The position of a column in the copy, and the column at a position.
template <class Vec>
inline int position_in_copy(int column, int columns) {
  const int tail = columns % Vec::kLanes;
  return tail && column >= columns - tail ? column + Vec::kLanes - tail : column;
}
template <class Vec>
inline int column_at(int position, int columns) {
  const int tail = columns % Vec::kLanes;
  return tail && position >= columns - tail ? position - (Vec::kLanes - tail) : position;
}

// always_inline, as is whatever only prefetches: it has no effect that GCC knows of, and where it
// is a call that call is left out.
__attribute__((always_inline)) static inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

// Into the innermost cache alone.
__attribute__((always_inline)) static inline void prefetch_past_caches(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 0);
#else
  (void)p;
#endif
}

// The target must be -inf here, so that the loop needs no exception: where a row is short,
// mispredicted branches would cost as much as its sums.
//
// Prefetches what follows in memory, of the same length, while the arithmetic on this block takes
// its time: otherwise the first read of that would wait. To prefetch past the end of memory is
// harmless.
//
// Logits of 16 bits are read in pairs of vectors: `vectors` is even then.
template <class Vec, bool kSquares, class X, class T>
inline Sums<Vec> sum_block(const X* x, int vectors, typename Vec::Real maximum,
                           const Exponential<Vec>& in_memory, const T* next) {
  using Terms = std::conditional_t<sizeof(X) == 2, Batch<Vec>, Vec>;
  constexpr int kLanes = Terms::kLanes;
  const Exponential<Vec> of_vector = in_memory;
  const Exponential<Terms> exponential(of_vector);
  const Terms m = Terms::splat(maximum);
  const auto ahead = [&](int i) __attribute__((always_inline)) {
    for (int j = 0; j < 4 * kLanes; j += 64 / int(sizeof(T))) prefetch(next + i * kLanes + j);
  };
  const auto d = [&](int i) __attribute__((always_inline)) {
    Terms logits;
    load_in_any_order(x + i * kLanes, logits);
    return logits - m;
  };
  constexpr bool kOverlapped = vectors_in<Terms> > 1;
  return in_one_vector(
      sum_of<kSquares, kOverlapped>(vectors / vectors_in<Terms>, exponential, d, ahead));
}

// The largest of a block. NaN may be lost here: the sums, which meet every element, keep it.
template <class Vec, class T>
inline typename Vec::Real max_block(const T* x, int vectors) {
  constexpr int kLanes = Vec::kLanes;
  Vec m[4];
  for (Vec& v : m) v = Vec::splat(-kInfinity<Vec>);
  int i = 0;
  for (; i + 4 <= vectors; i += 4)
    for (int u = 0; u < 4; u += 2) {
      Vec first, second;
      load_pair(x + (i + u) * kLanes, first, second);
      m[u] = max(m[u], first);
      m[u + 1] = max(m[u + 1], second);
    }
  for (; i < vectors; ++i) m[0] = max(m[0], Vec::load(x + i * kLanes));
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <class Vec, class T>
inline bool has_nan(const T* x, int vectors) {
  bool any = false;
  for (int j = 0; j < vectors * Vec::kLanes; ++j) any |= widen(x[j]) != widen(x[j]);
  return any;
}

template <class Vec>
struct TwoLargest {
  using Real = typename Vec::Real;
  Real largest = -kInfinity<Vec>, second = -kInfinity<Vec>;

  void add(Real x) {
    if (x > largest) {
      second = largest;
      largest = x;
    } else if (x > second) {
      second = x;
    }
  }
};

template <class Vec, class T>
inline TwoLargest<Vec> two_largest(const T* x, int vectors) {
  constexpr int kLanes = Vec::kLanes;
  Vec largest = Vec::splat(-kInfinity<Vec>), second = largest;
  const auto add = [&](Vec v) {
    second = max(second, min(largest, v));
    largest = max(largest, v);
  };
  for (int i = 0; i < vectors; ++i) add(Vec::load(x + i * kLanes));
  alignas(64) typename Vec::Real a[kLanes], b[kLanes];
  store(a, largest);
  store(b, second);
  TwoLargest<Vec> result;
  for (int i = 0; i < kLanes; ++i) {
    result.add(a[i]);
    result.add(b[i]);
  }
  return result;
}

// Sum of x - shift.
template <class Vec, class T>
inline double sum_differences(const T* x, int columns, typename Vec::Real shift) {
  constexpr int kLanes = Vec::kLanes;
  Vec sum = Vec::splat(0);
  const int vectors = columns / kLanes;
  for (int i = 0; i < vectors; ++i) sum = sum + (Vec::load(x + i * kLanes) - Vec::splat(shift));
  double total = reduce_add(sum);
  for (int j = vectors * kLanes; j < columns; ++j)
    total += widen(x[position_in_copy<Vec>(j, columns)]) - shift;
  return total;
}

}  // namespace sparse_kernels
