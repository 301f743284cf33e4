// The inner loop of the row statistics: sums of e, e d and e^2 with e = exp(d / temperature).
#pragma once

#include <type_traits>

#include "vec_math.h"

namespace sparse_kernels {

// Every lane, where vec_pair.h's differs() names some.
struct Everywhere {};
template <class Vec>
__attribute__((always_inline)) inline Vec add_where(Everywhere, Vec a, Vec b) {
  return a + b;
}
template <class Vec>
__attribute__((always_inline)) inline Vec fma_where(Everywhere, Vec a, Vec b, Vec c) {
  return fma(a, b, c);
}
struct AlwaysEverywhere {
  __attribute__((always_inline)) Everywhere operator()(int) const { return {}; }
};

// One sum in each lane.
template <class Vec>
struct Sums {
  Vec rest = Vec::splat(0), rest_d = Vec::splat(0), rest_sq = Vec::splat(0);

  // Of the lanes that `there` names; d is finite, or the row is invalid.
  template <bool kSquares, class There>
  __attribute__((always_inline)) void add(const There& there, Vec e, Vec d) {
    if constexpr (Vec::kMasks || std::is_same_v<There, Everywhere>) {
      rest = add_where(there, rest, e);
      rest_d = fma_where(there, e, d, rest_d);
      if (kSquares) rest_sq = fma_where(there, e, e, rest_sq);
    } else {
      const Vec counted = select_where(there, e, Vec::splat(0));
      rest = rest + counted;
      rest_d = fma(counted, d, rest_d);
      if (kSquares) rest_sq = fma(counted, counted, rest_sq);
    }
  }

  Sums operator+(const Sums& other) const {
    return {rest + other.rest, rest_d + other.rest_d, rest_sq + other.rest_sq};
  }
};

// Vectors that are added to one another before their sum joins the total. Equal terms round the
// same way each time, and the error of one long sum would grow with the square of its terms.
constexpr int kRun = 32;

// The term of a vector whose lanes are in memory. A function of its own: each operation is a loop
// over the lanes, of which GCC makes vectors here, but not in a loop's body.
template <bool kSquares, class Vec, class There>
__attribute__((noinline)) static void add_in_memory(Sums<Vec>& sums, const There& there, Vec d,
                                                    const Exponential<Vec>& exponential) {
  const Vec clamped = exponential.clamp(d);
  sums.template add<kSquares>(there, exponential(clamped), clamped);
}

// Sums over d(0) to d(count - 1). They alternate between two sums: more would not fit into AVX2's
// registers, and with one each term would wait for the term before. The two halves of a pair are
// two sums. Calls ahead(i) before every fourth term. there(i) names the lanes of term i that count.
//
// kOverlapped: a term is begun before the one before it is ended. A term is a chain of a dozen
// operations, and fewer of them fill the processor's queue then. It takes more registers, of which
// there are too few where d itself needs some.
//
// always_inline, here and in d: where a file has grown by enough, GCC makes a call of a term, or of
// this loop, with its vectors in memory.
template <bool kSquares, bool kOverlapped, class Vec, class D, class Ahead,
          class There = AlwaysEverywhere>
__attribute__((always_inline)) inline Sums<Vec> sum_of(int count,
                                                       const Exponential<Vec>& exponential,
                                                       const D& d, const Ahead& ahead,
                                                       const There& there = There()) {
  constexpr int kTerms = kRun / vectors_in<Vec>;
  struct Begun {
    decltype(there(0)) counts;
    Vec d;
    typename Exponential<Vec>::Begun power;
  };
  const auto begin = [&](int i) __attribute__((always_inline)) {
    const Vec clamped = exponential.clamp(d(i));
    return Begun{there(i), clamped, exponential.begin(clamped)};
  };
  Sums<Vec> total;
  for (int i = 0; i < count;) {
    const int end = count - i < kTerms ? count : i + kTerms;
    Sums<Vec> even, unpaired;
    Sums<Vec>& odd = vectors_in<Vec> > 1 ? even : unpaired;
    const auto add = [&](Sums<Vec>& sums, const Begun& term) __attribute__((always_inline)) {
      sums.template add<kSquares>(term.counts, exponential.end(term.power), term.d);
    };
    const auto add_whole = [&](Sums<Vec>& sums, int j) __attribute__((always_inline)) {
      if constexpr (Vec::kInRegisters)
        add(sums, begin(j));
      else
        add_in_memory<kSquares>(sums, there(j), d(j), exponential);
    };
    for (; i + 4 <= end; i += 4) {
      ahead(i);
      if constexpr (!kOverlapped) {
        add_whole(even, i);
        add_whole(odd, i + 1);
        add_whole(even, i + 2);
        add_whole(odd, i + 3);
        continue;
      }
      const Begun first = begin(i), second = begin(i + 1);
      add(even, first);
      const Begun third = begin(i + 2);
      add(odd, second);
      const Begun fourth = begin(i + 3);
      add(even, third);
      add(odd, fourth);
    }
    for (; i < end; ++i) add_whole(even, i);
    total = total + (even + unpaired);
  }
  return total;
}

// The sums of a pair's two vectors.
template <class Vec>
inline Sums<Vec> in_one_vector(const Sums<Vec>& sums) {
  return sums;
}
template <class Half>
inline Sums<Half> in_one_vector(const Sums<Pair<Half>>& sums) {
  return {sums.rest.low + sums.rest.high, sums.rest_d.low + sums.rest_d.high,
          sums.rest_sq.low + sums.rest_sq.high};
}

}  // namespace sparse_kernels
