// The sums of the rows in the lanes of two vectors: every sum is vertical, without reductions
// across lanes and without tails.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_stats_group.h"
#include "row_stats_plan.h"
#include "row_stats_sums.h"
#include "scalar_types.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_any_order.h"
#include "vec_math.h"

namespace sparse_kernels {

// The two largest logits, the lowest index of the largest, and the sum, over all blocks.
template <class Vec>
struct Extras {
  using Real = typename Vec::Real;
  using Lanes = Pair<Vec>;
  static constexpr int kLanes = Lanes::kLanes;

  alignas(64) Real best[kLanes];
  double sum[kLanes];
  int64_t argmax[kLanes];
  Lanes largest, second;

  void start() {
    largest = second = Lanes::splat(-kInfinity<Vec>);
    for (int i = 0; i < kLanes; ++i) {
      best[i] = -kInfinity<Vec>;
      sum[i] = 0.0;
      argmax[i] = 0;
    }
  }

  template <class X>
  void add(const RowStatsArgs& args, const Plan<Vec>& plan, int64_t begin, int columns, Lanes shift,
           const X* x, int stride) {
    alignas(64) Real a[kLanes], b[kLanes];
    const auto column = [&](int j) { return Lanes::load(x + j * stride); };
    if (plan.requested[kMargin])
      for (int j = 0; j < columns; ++j) {
        const Lanes v = column(j);
        second = max(second, min(largest, v));
        largest = max(largest, v);
      }
    if (args.argmax) {
      Lanes top = column(0), index = Lanes::splat(0);
      for (int j = 1; j < columns; ++j) top = max(top, column(j));
      for (int j = columns - 1; j >= 0; --j)
        index = select_ge(column(j), top, Lanes::splat(Real(j)), index);
      store(a, top);
      store(b, index);
      for (int i = 0; i < kLanes; ++i)
        if (a[i] > best[i]) {
          best[i] = a[i];
          argmax[i] = begin + int64_t(b[i]);
        }
    }
    if (plan.smoothed) {
      Lanes difference = Lanes::splat(0);
      for (int j = 0; j < columns; ++j) difference = difference + (column(j) - shift);
      store(a, difference);
      store(b, shift);
      for (int i = 0; i < kLanes; ++i) sum[i] += double(a[i]) + double(b[i]) * columns;
    }
  }

  void finish(const RowStatsArgs& args, Group<Vec>& group, int first) const {
    store(group.second + first, second);
    std::memcpy(group.argmax + first, argmax, sizeof argmax);
    for (int i = 0; i < kLanes; ++i)
      group.mean[first + i] = Real(sum[i] / double(args.classes) - group.maximum[first + i]);
  }
};

// The sums of kLanes rows, block by block: x[j * stride + i] is column j of row i. Lanes are in the
// order in which load_in_any_order() reads logits of type X.
// Ignored rows are computed too, whatever their logits: lanes are independent, and finish() writes
// 0 for these rows.
template <class Vec, class X>
struct LaneSums {
  using Real = typename Vec::Real;
  using Lanes = Pair<Vec>;
  static constexpr int kLanes = Lanes::kLanes;

  Lanes shift;
  Sums<Lanes> sums;

  void start() {
    shift = Lanes::splat(0);
    sums = Sums<Lanes>();
  }

  // Brings the sums of earlier blocks, where there are any, to the maximum of all so far.
  void rescale(const Exponential<Vec>& in_memory, Lanes maximum, bool any) {
    // Where there is only -inf so far, any finite shift serves. The lowest finite number is no
    // -inf: it is what masked rows are filled with.
    const Lanes zero = Lanes::splat(0);
    const Lanes next = select_ge(Lanes::splat(-kInfinity<Vec>), maximum, zero, maximum);
    if (any) {
      const Exponential<Lanes> exponential(in_memory);
      const Lanes delta = exponential.clamp(min(zero, shift - next));
      const Lanes f = exponential(delta);
      sums =
          Sums<Lanes>{f * sums.rest, f * fma(delta, sums.rest, sums.rest_d), f * f * sums.rest_sq};
    }
    shift = next;
  }

  // Adds a block in which the logits of targets are -inf. Calls ahead() before every fourth column,
  // here and below.
  template <bool kSquares, class Ahead>
  void add(const Exponential<Vec>& in_memory, int columns, const X* x, int stride,
           const Ahead& ahead) {
    const Exponential<Lanes> exponential(in_memory);
    const Lanes s = shift;
    const auto d = [&](int j) __attribute__((always_inline)) {
      Lanes logits;
      load_in_any_order(x + j * stride, logits);
      return logits - s;
    };
    sums =
        sums + sum_of<kSquares, Vec::kInRegisters>(
                   columns, exponential, d, [&](int) __attribute__((always_inline)) { ahead(); });
  }

  // Adds a block, but for column target[i] of row i, whose logit becomes target_x[i].
  template <bool kSquares, class Ahead>
  void add_others(const Exponential<Vec>& in_memory, int columns, const Real* target,
                  Real* target_x, const X* x, int stride, const Ahead& ahead) {
    const Exponential<Lanes> exponential(in_memory);
    const Lanes one = Lanes::splat(1), s = shift, target_column = Lanes::load(target);
    Lanes column = Lanes::splat(0), found = Lanes::load(target_x);
    const auto logits = [&](int j)
                            __attribute__((always_inline)) { return Lanes::load(x + j * stride); };
    const auto d = [&](int j) __attribute__((always_inline)) { return logits(j) - s; };
    const auto others = [&](int j) __attribute__((always_inline)) {
      const auto there = differs(target_column, column);
      found = select_where(there, found, logits(j));
      column = column + one;
      return there;
    };
    sums = sums + sum_of<kSquares, Vec::kMasks>(
                      columns, exponential, d, [&](int) __attribute__((always_inline)) { ahead(); },
                      others);
    store(target_x, found);
  }

  // Into lanes [first, first + kLanes) of the group.
  void finish(const Plan<Vec>& plan, Group<Vec>& group, int first) const {
    store(group.rest + first, in_order<X>(sums.rest));
    store(group.rest_d + first, in_order<X>(sums.rest_d));
    if (!plan.in_double) return;
    alignas(64) Real rest_sq[kLanes];
    store(rest_sq, in_order<X>(sums.rest_sq));
    for (int i = 0; i < kLanes; ++i) {
      group.rest_in_double[first + i] = group.rest[first + i];
      group.rest_sq[first + i] = rest_sq[i];
    }
  }
};

}  // namespace sparse_kernels
