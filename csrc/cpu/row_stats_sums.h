// The inner loop of the row statistics: sums of e, e d and e^2 with e = exp(d / temperature).
#pragma once

#include "vec_math.h"

namespace sparse_kernels {

// One sum in each lane.
template <class Vec>
struct Sums {
  Vec rest = Vec::splat(0), rest_d = Vec::splat(0), rest_sq = Vec::splat(0);

  template <bool kSquares>
  void add(Vec d, const Exponential<Vec>& exponential) {
    d = exponential.clamp(d);
    const Vec e = exponential(d);
    rest = rest + e;
    rest_d = fma(e, d, rest_d);
    if (kSquares) rest_sq = fma(e, e, rest_sq);
  }

  Sums operator+(const Sums& other) const {
    return {rest + other.rest, rest_d + other.rest_d, rest_sq + other.rest_sq};
  }
};

// Vectors that are added to one another before their sum joins the total. Equal terms round the
// same way each time, and the error of one long sum would grow with the square of its terms.
constexpr int kRun = 32;

// Sums over d(0) to d(count - 1). They alternate between two sums: more would not fit into AVX2's
// registers, and with one each term would wait for the term before. The two halves of a pair are
// two sums. Calls ahead(i) before every fourth term.
template <bool kSquares, class Vec, class D, class Ahead>
inline Sums<Vec> sum_of(int count, const Exponential<Vec>& exponential, const D& d,
                        const Ahead& ahead) {
  constexpr int kTerms = kRun / vectors_in<Vec>;
  Sums<Vec> total;
  for (int i = 0; i < count;) {
    const int end = count - i < kTerms ? count : i + kTerms;
    Sums<Vec> even, unpaired;
    Sums<Vec>& odd = vectors_in<Vec> > 1 ? even : unpaired;
    for (; i + 4 <= end; i += 4) {
      ahead(i);
      even.template add<kSquares>(d(i), exponential);
      odd.template add<kSquares>(d(i + 1), exponential);
      even.template add<kSquares>(d(i + 2), exponential);
      odd.template add<kSquares>(d(i + 3), exponential);
    }
    for (; i < end; ++i) even.template add<kSquares>(d(i), exponential);
    total = total + (even + unpaired);
  }
  return total;
}

}  // namespace sparse_kernels
