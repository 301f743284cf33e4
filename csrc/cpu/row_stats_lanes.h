// The sums of kLanes rows, one in each lane: every sum is vertical, without reductions across lanes
// and without tails.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_stats_group.h"
#include "row_stats_plan.h"
#include "row_stats_sums.h"
#include "scalar_types.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_math.h"

namespace sparse_kernels {

// The two largest logits, the lowest index of the largest, and the sum, over all blocks.
template <class Vec>
struct Extras {
  using Real = typename Vec::Real;
  static constexpr int kLanes = Vec::kLanes;

  alignas(64) Real best[kLanes];
  double sum[kLanes];
  int64_t argmax[kLanes];
  Vec largest, second;

  void start() {
    largest = second = Vec::splat(-kInfinity<Vec>);
    for (int i = 0; i < kLanes; ++i) {
      best[i] = -kInfinity<Vec>;
      sum[i] = 0.0;
      argmax[i] = 0;
    }
  }

  void add(const RowStatsArgs& args, const Plan<Vec>& plan, int64_t begin, int columns, Vec shift,
           const Real* x, int stride) {
    alignas(64) Real a[kLanes], b[kLanes];
    const auto column = [&](int j) { return Vec::load(x + j * stride); };
    if (plan.requested[kMargin])
      for (int j = 0; j < columns; ++j) {
        const Vec v = column(j);
        second = max(second, min(largest, v));
        largest = max(largest, v);
      }
    if (args.argmax) {
      Vec top = column(0), index = Vec::splat(0);
      for (int j = 1; j < columns; ++j) top = max(top, column(j));
      for (int j = columns - 1; j >= 0; --j)
        index = select_ge(column(j), top, Vec::splat(Real(j)), index);
      store(a, top);
      store(b, index);
      for (int i = 0; i < kLanes; ++i)
        if (a[i] > best[i]) {
          best[i] = a[i];
          argmax[i] = begin + int64_t(b[i]);
        }
    }
    if (plan.smoothed) {
      Vec difference = Vec::splat(0);
      for (int j = 0; j < columns; ++j) difference = difference + (column(j) - shift);
      store(a, difference);
      store(b, shift);
      for (int i = 0; i < kLanes; ++i) sum[i] += double(a[i]) + double(b[i]) * columns;
    }
  }

  void finish(const RowStatsArgs& args, Group<Vec>& group) const {
    store(group.second, second);
    std::memcpy(group.argmax, argmax, sizeof argmax);
    for (int i = 0; i < kLanes; ++i)
      group.mean[i] = Real(sum[i] / double(args.classes) - group.maximum[i]);
  }
};

// a == b ? x : y; y where either is NaN. vec_*.h may have a faster one.
template <class Vec>
inline Vec select_eq(Vec a, Vec b, Vec x, Vec y) {
  return select_ge(a, b, select_ge(b, a, x, y), y);
}

// The sums of kLanes rows, block by block: x[j * stride + i] is column j of the row in lane i.
// Ignored rows are computed too, whatever their logits: lanes are independent, and finish() writes
// 0 for these rows.
template <class Vec>
struct LaneSums {
  using Real = typename Vec::Real;
  static constexpr int kLanes = Vec::kLanes;

  Vec maximum, shift, target_x;
  Sums<Vec> sums;

  void start() {
    maximum = Vec::splat(-kInfinity<Vec>);
    shift = target_x = Vec::splat(0);
    sums = Sums<Vec>();
  }

  void raise_maximum(int columns, const Real* x, int stride) {
    Vec other = maximum;  // two, since each waits for the one before
    int j = 0;
    for (; j + 2 <= columns; j += 2) {
      maximum = max(maximum, Vec::load(x + j * stride));
      other = max(other, Vec::load(x + (j + 1) * stride));
    }
    if (j < columns) other = max(other, Vec::load(x + j * stride));
    maximum = max(maximum, other);
  }

  // Brings the sums of earlier blocks, where there are any, to the maximum.
  void rescale(const Exponential<Vec>& exponential, bool any) {
    // Where there is only -inf so far, any finite shift serves. The lowest finite number is no
    // -inf: it is what masked rows are filled with.
    const Vec zero = Vec::splat(0);
    const Vec next = select_ge(Vec::splat(-kInfinity<Vec>), maximum, zero, maximum);
    if (any) {
      const Vec delta = exponential.clamp(min(zero, shift - next));
      const Vec f = exponential(delta);
      sums = Sums<Vec>{f * sums.rest, f * fma(delta, sums.rest, sums.rest_d), f * f * sums.rest_sq};
    }
    shift = next;
  }

  // Adds a block, but for column target[i] of the row in lane i: -inf adds nothing. Calls ahead()
  // before every fourth column.
  template <bool kSquares, class Ahead>
  void add(const Exponential<Vec>& exponential, int columns, const Real* target, const Real* x,
           int stride, const Ahead& ahead) {
    const Vec zero = Vec::splat(0), one = Vec::splat(1), nothing = Vec::splat(-kInfinity<Vec>);
    const Vec s = shift;
    Vec to_target = Vec::load(target), found = target_x;
    const auto d = [&](int j) {
      const Vec v = Vec::load(x + j * stride);
      const Vec at_target = to_target;
      to_target = to_target - one;
      found = select_eq(at_target, zero, v, found);
      return select_eq(at_target, zero, nothing, v - s);
    };
    sums = sums + sum_of<kSquares>(columns, exponential, d, [&](int) { ahead(); });
    target_x = found;
  }

  void finish(const Plan<Vec>& plan, Group<Vec>& group) const {
    store(group.maximum, maximum);
    store(group.rest, sums.rest);
    store(group.rest_d, sums.rest_d);
    store(group.target_d, target_x - maximum);  // NaN where every logit is -inf
    if (!plan.in_double) return;
    alignas(64) Real rest_sq[kLanes];
    store(rest_sq, sums.rest_sq);
    for (int i = 0; i < kLanes; ++i) {
      group.rest_in_double[i] = group.rest[i];
      group.rest_sq[i] = rest_sq[i];
    }
  }
};

}  // namespace sparse_kernels
