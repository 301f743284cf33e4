// Row statistics with rows in lanes: every sum is vertical, without reductions across lanes and
// without tails. The logits are read once.
//   transpose_rows   few contiguous classes, or rows in any layout: kTransposeClasses columns of
//                    kLanes rows are transposed into L1.
//   sum_tile         classes that are not contiguous, of rows that are adjacent in memory (pixels):
//                    up to kTileGroups x kLanes rows, so that each class's plane is read in runs of
//                    several cache lines.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_stats_blocks.h"
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

// The sums of kLanes rows, block by block. Ignored rows are computed too, whatever their logits:
// lanes are independent, and finish() writes 0 for these rows.
template <class Vec>
struct LaneSums {
  using Real = typename Vec::Real;
  static constexpr int kLanes = Vec::kLanes;

  alignas(64) Real target_x[kLanes];
  int64_t target[kLanes];
  Vec maximum, shift;
  Sums<Vec> sums;

  // Lanes past the last row repeat it.
  void start(const RowStatsArgs& args, int64_t row, int count, Group<Vec>& group,
             RowStatsResult& result) {
    maximum = Vec::splat(-kInfinity<Vec>);
    shift = Vec::splat(0);
    sums = Sums<Vec>();
    for (int i = 0; i < kLanes; ++i) {
      const int64_t r = row + (i < count ? i : count - 1);
      target[i] = target_of(args, r);
      group.ignored[i] = is_ignored(args, r, target[i], result);
      if (group.ignored[i]) target[i] = 0;
      target_x[i] = 0;
    }
  }

  // Classes [begin, begin + columns): x[j * stride + i] is column j of the row in lane i. The
  // target's is overwritten with -inf, to keep it out of the sums.
  template <bool kSquares>
  void add(const RowStatsArgs& args, const Plan<Vec>& plan, int64_t begin, int columns, Real* x,
           int stride, Extras<Vec>* extras) {
    const Exponential<Vec> exponential = plan.exponential;
    const Vec zero = Vec::splat(0);
    for (int j = 0; j < columns; ++j) maximum = max(maximum, Vec::load(x + j * stride));
    // Where there is only -inf so far, any finite shift serves. The lowest finite number is no
    // -inf: it is what masked rows are filled with.
    const Vec next = select_ge(Vec::splat(-kInfinity<Vec>), maximum, zero, maximum);
    if (begin > 0) {
      const Vec delta = exponential.clamp(min(zero, shift - next));
      const Vec f = exponential(delta);
      sums = Sums<Vec>{f * sums.rest, f * fma(delta, sums.rest, sums.rest_d), f * f * sums.rest_sq};
    }
    shift = next;
    if (extras) extras->add(args, plan, begin, columns, shift, x, stride);
    for (int i = 0; i < kLanes; ++i) {
      const int64_t y = target[i] - begin;
      if (uint64_t(y) >= uint64_t(columns)) continue;
      Real* target_logit = x + y * stride + i;
      target_x[i] = *target_logit;
      *target_logit = -kInfinity<Vec>;
    }
    const auto d = [&](int j) { return Vec::load(x + j * stride) - shift; };
    sums = sums + sum_of<kSquares>(columns, exponential, d, [](int) {});
  }

  void finish(Group<Vec>& group) const {
    store(group.maximum, maximum);
    alignas(64) Real rest[kLanes], rest_sq[kLanes];
    store(rest, sums.rest);
    store(rest_sq, sums.rest_sq);
    for (int i = 0; i < kLanes; ++i) {
      group.rest[i] = rest[i];
      group.rest_sq[i] = rest_sq[i];
    }
    store(group.rest_d, sums.rest_d);
    store(group.target_d, Vec::load(target_x) - maximum);  // NaN where every logit is -inf
  }
};

// Up to kLanes rows. kPlain: one block of contiguous classes, without softcap and extras. Most
// calls are plain, and this instantiation has no code for the rest.
template <class Vec, class T, bool kPlain, bool kSquares>
inline void transpose_rows(const RowStatsArgs& args, const Plan<Vec>& plan, int64_t row, int count,
                           RowStatsResult& result) {
  using Real = typename Vec::Real;
  constexpr int kLanes = Vec::kLanes;
  const int64_t class_stride = kPlain ? 1 : args.class_stride;
  alignas(64) Real x[kTransposeClasses * kLanes];
  const T* logits[kLanes];
  for (int i = 0; i < kLanes; ++i)
    logits[i] = static_cast<const T*>(args.logits) +
                row_offset(args.layout, row + (i < count ? i : count - 1));
  Group<Vec> group;
  LaneSums<Vec> sums;
  sums.start(args, row, count, group, result);
  Extras<Vec> extras;
  if (!kPlain) extras.start();
  for (int64_t begin = 0; begin < args.classes; begin += kTransposeClasses) {
    const int64_t left = args.classes - begin;
    const int columns = int(left < kTransposeClasses ? left : kTransposeClasses);
    for (int i = 0; i < kLanes; ++i) {
      const T* p = logits[i] + begin * class_stride;
      for (int j = 0; j < columns; ++j, p += class_stride) x[j * kLanes + i] = widen(*p);
    }
    if (!kPlain && args.softcap != 0.0) copy_block<Vec>(x, columns * kLanes, Real(args.softcap), x);
    sums.template add<kSquares>(args, plan, begin, columns, x, kLanes,
                                !kPlain && plan.extras ? &extras : nullptr);
    if (kPlain) break;
  }
  sums.finish(group);
  if (!kPlain && plan.extras) extras.finish(args, group);
  finish(args, plan, group, row, count, result);
}

constexpr int kTileGroups = 16;
constexpr int kTileBytes = 16 * 1024;  // of logits, half of L1

// The number of groups of kLanes rows, up to kTileGroups, that are adjacent in memory from `row`
// on.
template <class Vec>
inline int adjacent_groups(const RowLayout& layout, int64_t row, int64_t end) {
  const int inner = layout.dimensions - 1;
  if (layout.stride[inner] != 1) return 0;
  const int64_t left = inner > 0 ? layout.size[inner] - row % layout.size[inner] : end - row;
  const int64_t groups = (left < end - row ? left : end - row) / Vec::kLanes;
  return int(groups < kTileGroups ? groups : kTileGroups);
}

// groups x kLanes rows that are adjacent in memory. A tile is first copied from the classes'
// planes: these are often a power of two apart and would compete for the same few cache lines.
template <class Vec, class T, bool kSquares>
inline void sum_tile(const RowStatsArgs& args, const Plan<Vec>& plan, int64_t row, int groups,
                     RowStatsResult& result) {
  using Real = typename Vec::Real;
  constexpr int kLanes = Vec::kLanes, kTileSize = kTileBytes / int(sizeof(Real));
  alignas(64) Real x[kTileSize];
  Group<Vec> group[kTileGroups];
  LaneSums<Vec> sums[kTileGroups];
  Extras<Vec> extras[kTileGroups];
  const int width = groups * kLanes;
  const T* logits = static_cast<const T*>(args.logits) + row_offset(args.layout, row);
  for (int g = 0; g < groups; ++g) {
    sums[g].start(args, row + g * kLanes, kLanes, group[g], result);
    if (plan.extras) extras[g].start();
  }
  const int64_t most_columns = kTileSize / width;
  for (int64_t begin = 0; begin < args.classes; begin += most_columns) {
    const int columns =
        int(args.classes - begin < most_columns ? args.classes - begin : most_columns);
    for (int j = 0; j < columns; ++j) {
      const T* plane = logits + (begin + j) * args.class_stride;
      for (int i = 0; i < width; i += kLanes) store(x + j * width + i, Vec::load(plane + i));
    }
    if (args.softcap != 0.0) copy_block<Vec>(x, columns * width, Real(args.softcap), x);
    for (int g = 0; g < groups; ++g)
      sums[g].template add<kSquares>(args, plan, begin, columns, x + g * kLanes, width,
                                     plan.extras ? &extras[g] : nullptr);
  }
  for (int g = 0; g < groups; ++g) {
    sums[g].finish(group[g]);
    if (plan.extras) extras[g].finish(args, group[g]);
    finish(args, plan, group[g], row + g * kLanes, kLanes, result);
  }
}

}  // namespace sparse_kernels
