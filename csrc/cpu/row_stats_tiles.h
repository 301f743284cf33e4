// Row statistics with rows in lanes, up to kRows at a time: few contiguous classes, or rows in
// any layout. A block of the tile's columns, kTileBytes at most, is copied into L1 such that each
// column's rows are adjacent; the steps that follow go through all groups of kLanes rows one after
// the other, so that no group waits for another's.
//
// Planes of pixels are often a power of two apart: without the copy their lines would compete for
// the same few places of L1 between the read for the maximum and that for the sums.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_stats_ahead.h"
#include "row_stats_blocks.h"
#include "row_stats_group.h"
#include "row_stats_lanes.h"
#include "row_stats_plan.h"
#include "scalar_types.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_math.h"

namespace sparse_kernels {

constexpr int kTileBytes = 32 * 1024;

template <class Vec, class T>
class Tile {
  using Real = typename Vec::Real;
  using Lanes = Pair<Vec>;
  static constexpr int kLanes = Lanes::kLanes, kTileGroups = 8, kRows = kTileGroups * kLanes;
  static constexpr int kSize = kTileBytes / int(sizeof(Real));
  // The sums leave targets out: -inf is in their places from the copy on, which makes the loop of
  // the sums shorter. Not where memory is what binds: nothing is fetched during the copy.
  static constexpr bool kTaken = sizeof(T) == 2;
  // Copied together: as many as stay in registers, so that runs in each plane are long. AVX-512 has
  // twice as many.
  static constexpr int kTakenGroups = kTaken || sizeof(Vec) < 64 ? 2 : 4;

 public:
  // Of rows from `row` on, before `end`.
  Tile(const RowStatsArgs& args, const Plan<Vec>& plan, const RowsAhead<Vec>& rows_ahead,
       int64_t row, int64_t end)
      : args_(args), plan_(plan), rows_ahead_(rows_ahead), row_(row) {
    const RowLayout& layout = args.layout;
    const int inner = layout.dimensions - 1;
    int64_t left = end - row;
    if (args.class_stride != 1 && layout.stride[inner] == 1) {
      const int64_t run = inner > 0 ? layout.size[inner] - row % layout.size[inner] : left;
      adjacent_ = run >= kLanes && left >= kLanes;
      if (adjacent_) left = (run < left ? run : left) / kLanes * kLanes;
    }
    count_ = int(left < kRows ? left : kRows);
    groups_ = (count_ + kLanes - 1) / kLanes;
    width_ = groups_ * kLanes;
  }

  int rows() const { return count_; }

  template <bool kSquares>
  void compute(RowStatsResult& result) {
    start(result);
    const int64_t most_columns = kSize / width_;
    const int64_t blocks = (args_.classes + most_columns - 1) / most_columns;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = args_.classes * block / blocks;
      const int columns = int(args_.classes * (block + 1) / blocks - begin);
      for (int i = 0; i < width_; ++i) target_column_[i] = Real(target_[i] - begin);
      if (adjacent_ && args_.softcap == 0.0) {
        take<false>(logits_of(row_) + begin * args_.class_stride, args_.class_stride, columns);
      } else {
        copy(begin, columns);
        take<true>(x_, width_, columns);
      }
      for (int g = 0; g < groups_; ++g)
        sums_[g].rescale(plan_.exponential, Lanes::load(maximum_ + g * kLanes), begin > 0);
      if (plan_.extras) add_extras(begin, columns);
      add<kSquares>(begin, columns, result);
    }
  }

 private:
  void start(RowStatsResult& result) {
    if (args_.targets_are_int32)
      copy_targets(static_cast<const int32_t*>(args_.targets) + row_, result);
    else
      copy_targets(static_cast<const int64_t*>(args_.targets) + row_, result);
    for (int i = 0; i < width_; ++i) {
      maximum_[i] = -kInfinity<Vec>;
      target_x_[i] = 0;
    }
    for (int g = 0; g < groups_; ++g) {
      sums_[g].start();
      if (plan_.extras) extras_[g].start();
    }
  }

  // Lanes past the last row repeat it.
  template <class Integer>
  void copy_targets(const Integer* from, RowStatsResult& result) {
    for (int i = 0; i < count_; ++i) target_[i] = from[i];
    for (int i = count_; i < width_; ++i) target_[i] = target_[count_ - 1];
    const auto unusual = [&](int i) {
      return (target_[i] == args_.ignore_index) | (uint64_t(target_[i]) >= uint64_t(args_.classes));
    };
    int64_t any = 0;
    for (int i = 0; i < width_; ++i) any |= unusual(i);
    any_ignored_ = any != 0;
    if (!any_ignored_) return;
    for (int i = 0; i < width_; ++i) {
      ignored_[i] = unusual(i);
      if (!ignored_[i]) continue;
      if (i < count_) is_ignored(args_, row_ + i, target_[i], result);
      target_[i] = 0;
    }
  }

  const T* logits_of(int64_t row) const {
    return static_cast<const T*>(args_.logits) + row_offset(args_.layout, row);
  }

  // Moves columns from `from`, `stride` apart, into the tile, and raises the maxima to theirs.
  template <bool kInPlace, class Logit>
  void take(const Logit* from, int64_t stride, int columns) {
    int g = 0;
    for (; g + kTakenGroups <= groups_; g += kTakenGroups)
      take_groups<kTakenGroups, kInPlace>(g * kLanes, from + g * kLanes, stride, columns);
    for (; g < groups_; ++g)
      take_groups<1, kInPlace>(g * kLanes, from + g * kLanes, stride, columns);
  }
  template <int kGroups, bool kInPlace, class Logit>
  void take_groups(int first, const Logit* from, int64_t stride, int columns) {
    const Lanes one = Lanes::splat(1), nothing = Lanes::splat(-kInfinity<Vec>);
    Lanes target[kGroups], maximum[kGroups], target_x[kGroups];
    for (int i = 0; i < kGroups; ++i) {
      target[i] = Lanes::load(target_column_ + first + i * kLanes);
      maximum[i] = Lanes::load(maximum_ + first + i * kLanes);
      target_x[i] = Lanes::load(target_x_ + first + i * kLanes);
    }
    Lanes column = Lanes::splat(0);
    Real* x = x_ + first;
    for (int j = 0; j < columns; ++j, from += stride, x += width_, column = column + one) {
      Lanes logits[kGroups];  // all are under way before the first is stored
      for (int i = 0; i < kGroups; ++i) logits[i] = Lanes::load(from + i * kLanes);
      for (int i = 0; i < kGroups; ++i) {
        maximum[i] = max(maximum[i], logits[i]);
        if (kTaken) {
          target_x[i] = select_eq(target[i], column, logits[i], target_x[i]);
          logits[i] = select_eq(target[i], column, nothing, logits[i]);
        }
        if (kTaken || !kInPlace) store(x + i * kLanes, logits[i]);
      }
    }
    for (int i = 0; i < kGroups; ++i) {
      store(maximum_ + first + i * kLanes, maximum[i]);
      if (kTaken) store(target_x_ + first + i * kLanes, target_x[i]);
    }
  }

  void copy(int64_t begin, int columns) {
    const bool evenly_spaced = args_.class_stride == 1 && args_.layout.dimensions == 1;
    int i = 0;
    if (evenly_spaced)
      for (; i + kLanes <= count_; i += kLanes)
        transpose(Lanes(), logits_of(row_ + i) + begin, args_.layout.stride[0], columns, x_ + i,
                  width_);
    for (; i < width_; ++i) {
      const T* p = logits_of(row_ + (i < count_ ? i : count_ - 1)) + begin * args_.class_stride;
      for (int j = 0; j < columns; ++j, p += args_.class_stride) x_[j * width_ + i] = widen(*p);
    }
    if (args_.softcap != 0.0) copy_block<Vec>(x_, columns * width_, Real(args_.softcap), x_);
  }

  // Extras are of all logits: those of targets are back in the tile meanwhile.
  void add_extras(int64_t begin, int columns) {
    const auto put = [&](const auto& logit) {
      if (!kTaken) return;
      for (int i = 0; i < width_; ++i)
        if (target_column_[i] >= 0 && target_column_[i] < columns)
          x_[int(target_column_[i]) * width_ + i] = logit(i);
    };
    put([&](int i) { return target_x_[i]; });
    for (int g = 0; g < groups_; ++g)
      extras_[g].add(args_, plan_, begin, columns, sums_[g].shift, x_ + g * kLanes, width_);
    put([&](int) { return -kInfinity<Vec>; });
  }

  // Finishes rows soon after their last block, so that memory is at work meanwhile, too.
  template <bool kSquares>
  void add(int64_t begin, int columns, RowStatsResult& result) {
    const Exponential<Vec> exponential = plan_.exponential;
    const int64_t next_row = row_ + count_;
    const T* next = nullptr;
    if (adjacent_ && begin + columns < args_.classes)
      next = logits_of(row_) + (begin + columns) * args_.class_stride;
    else if (adjacent_ && next_row < args_.rows)
      next = logits_of(next_row);
    PlanesAhead<Vec> ahead(next, args_.class_stride, columns, width_, groups_ * (columns / 4),
                           plan_.past_caches);
    constexpr int kAtOnce = Group<Vec>::kRows / kLanes;
    for (int g = 0; g < groups_; ++g) {
      if (begin == 0) rows_ahead_(next_row + g * kLanes, kLanes);
      const Real* x = x_ + g * kLanes;
      const auto fetch = [&]() __attribute__((always_inline)) { ahead(); };
      if constexpr (kTaken) {
        sums_[g].template add<kSquares>(exponential, columns, x, width_, fetch);
      } else {
        sums_[g].template add_others<kSquares>(exponential, columns, target_column_ + g * kLanes,
                                               target_x_ + g * kLanes, x, width_, fetch);
      }
      if (begin + columns == args_.classes && (g % kAtOnce == kAtOnce - 1 || g == groups_ - 1))
        finish(g / kAtOnce * kAtOnce, g + 1, result);
    }
  }

  // Groups [g, end).
  void finish(int g, int end, RowStatsResult& result) const {
    const int first = g * kLanes, rows = (end - g) * kLanes;
    Group<Vec> group;
    for (int i = 0; g + i < end; ++i) {
      const Lanes maximum = Lanes::load(maximum_ + (g + i) * kLanes);
      const Lanes target_x = Lanes::load(target_x_ + (g + i) * kLanes);
      store(group.maximum + i * kLanes, maximum);
      store(group.target_d + i * kLanes, target_x - maximum);  // NaN where every logit is -inf
      sums_[g + i].finish(plan_, group, i * kLanes);
      if (plan_.extras) extras_[g + i].finish(args_, group, i * kLanes);
    }
    group.any_ignored = any_ignored_;
    if (any_ignored_)
      std::memcpy(group.ignored, ignored_ + first, rows);
    else
      std::memset(group.ignored, 0, sizeof group.ignored);
    const int count = count_ - first < rows ? count_ - first : rows;
    sparse_kernels::finish(args_, plan_, group, row_ + first, count, result);
  }

  const RowStatsArgs& args_;
  const Plan<Vec>& plan_;
  const RowsAhead<Vec>& rows_ahead_;
  int64_t row_;
  int count_, groups_, width_;  // rows; groups of kLanes; the lanes of all groups
  bool adjacent_ = false;       // pixels: a class's logits are adjacent in memory
  bool any_ignored_;
  // Aligned: whole vectors of these are read and written.
  alignas(64) uint8_t ignored_[kRows];
  alignas(64) int64_t target_[kRows];      // a class, also where the row is ignored
  alignas(64) Real target_column_[kRows];  // of the block; no column of it where it is in another
  alignas(64) Real target_x_[kRows];       // the target's logit
  alignas(64) Real maximum_[kRows];        // of the logits so far
  LaneSums<Vec> sums_[kTileGroups];
  Extras<Vec> extras_[kTileGroups];
  alignas(64) Real x_[kSize];
};

}  // namespace sparse_kernels
