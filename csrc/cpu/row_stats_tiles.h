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
#include <type_traits>

#include "row_stats_ahead.h"
#include "row_stats_blocks.h"
#include "row_stats_group.h"
#include "row_stats_lanes.h"
#include "row_stats_plan.h"
#include "scalar_types.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_any_order.h"
#include "vec_math.h"

namespace sparse_kernels {

constexpr int kTileBytes = 32 * 1024;

// X is what the tile holds a logit as: Real, or T where logits of 16 bits stay as they are. Twice
// as many of those are compared at a time then, so their targets are taken out of the tile by the
// copy: -inf is in their places. A softcap or a transposition gives logits of type Real.
template <class Vec, class T, class X>
class Tile {
  using Real = typename Vec::Real;
  using Lanes = Pair<Vec>;
  static constexpr int kLanes = Lanes::kLanes, kTileGroups = 8, kRows = kTileGroups * kLanes;
  static constexpr int kSize = kTileBytes / int(sizeof(X));
  static constexpr bool kInWords = sizeof(X) == 2;
  using Column = std::conditional_t<kInWords, int16_t, Real>;
  static_assert(kSize / kLanes < 1 << 15, "columns are counted in 16 bits");
  // Copied together: as many as stay in registers, so that runs in each plane are long. AVX-512 has
  // twice as many.
  static constexpr int kCopiedGroups = sizeof(Vec) < 64 ? 2 : 4;

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
      find_targets(begin, columns);
      if (adjacent_ && args_.softcap == 0.0) {
        measure<false>(logits_of(row_) + begin * args_.class_stride, args_.class_stride, columns);
      } else {
        copy(begin, columns);
        measure<true>(x_, width_, columns);
      }
      for (int g = 0; g < groups_; ++g) {
        Lanes maximum;
        load_in_any_order(maximum_ + g * kLanes, maximum);
        sums_[g].rescale(plan_.exponential, maximum, begin > 0);
      }
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
      maximum_[i] = minus_infinity();
      target_x_[i] = X{};
    }
    for (int g = 0; g < groups_; ++g) {
      sums_[g].start();
      if (plan_.extras) extras_[g].start();
    }
  }

  // Lanes past the last row repeat it.
  template <class Integer>
  void copy_targets(const Integer* from, RowStatsResult& result) {
    const int64_t ignore_index = args_.ignore_index;
    const uint64_t classes = uint64_t(args_.classes);
    const auto unusual = [&](int64_t target) {
      return (target == ignore_index) | (uint64_t(target) >= classes);
    };
    int64_t any = 0;
    for (int i = 0; i < count_; ++i) {
      const int64_t target = from[i];
      target_[i] = target;
      any |= unusual(target);
    }
    for (int i = count_; i < width_; ++i) target_[i] = target_[count_ - 1];
    any_ignored_ = any != 0;
    if (!any_ignored_) return;
    for (int i = 0; i < width_; ++i) {
      ignored_[i] = unusual(target_[i]);
      if (!ignored_[i]) continue;
      if (i < count_) is_ignored(args_, row_ + i, target_[i], result);
      target_[i] = 0;
    }
  }

  void find_targets(int64_t begin, int columns) {
    for (int i = 0; i < width_; ++i) {
      const int64_t column = target_[i] - begin;
      target_column_[i] = Column(!kInWords || uint64_t(column) < uint64_t(columns) ? column : -1);
    }
  }

  static X minus_infinity() {
    X x;
    narrow(-kInfinity<Vec>, &x);
    return x;
  }
  const T* logits_of(int64_t row) const {
    return static_cast<const T*>(args_.logits) + row_offset(args_.layout, row);
  }

  // Moves columns from `from`, `stride` apart, into the tile unless they are there, and raises the
  // maxima to theirs.
  template <bool kInPlace, class Logit>
  void measure(const Logit* from, int64_t stride, int columns) {
    int g = 0;
    for (; g + kCopiedGroups <= groups_; g += kCopiedGroups)
      measure_groups<kCopiedGroups, kInPlace>(g * kLanes, from + g * kLanes, stride, columns);
    for (; g < groups_; ++g)
      measure_groups<1, kInPlace>(g * kLanes, from + g * kLanes, stride, columns);
  }
  template <int kGroups, bool kInPlace, class Logit>
  void measure_groups(int first, const Logit* from, int64_t stride, int columns) {
    if constexpr (kInWords)
      take_targets<kGroups>(first, from, stride, columns);
    else
      copy_groups<kGroups, kInPlace>(first, from, stride, columns);
  }
  template <int kGroups, bool kInPlace, class Logit>
  void copy_groups(int first, const Logit* from, int64_t stride, int columns) {
    Lanes maximum[kGroups];
    for (int i = 0; i < kGroups; ++i) maximum[i] = Lanes::load(maximum_ + first + i * kLanes);
    X* x = x_ + first;
    for (int j = 0; j < columns; ++j, from += stride, x += width_) {
      Lanes logits[kGroups];  // all are under way before the first is stored
      for (int i = 0; i < kGroups; ++i) logits[i] = Lanes::load(from + i * kLanes);
      for (int i = 0; i < kGroups; ++i) {
        maximum[i] = max(maximum[i], logits[i]);
        if (!kInPlace) store(x + i * kLanes, logits[i]);
      }
    }
    for (int i = 0; i < kGroups; ++i) store(maximum_ + first + i * kLanes, maximum[i]);
  }
  template <int kGroups>
  void take_targets(int first, const X* from, int64_t stride, int columns) {
    using Words = typename Vec::Words;
    const Words one = Words::splat(1), nothing = Words::splat(minus_infinity().bits);
    Words target[kGroups], maximum[kGroups], target_x[kGroups];
    for (int i = 0; i < kGroups; ++i) {
      target[i] = Words::load(target_column_ + first + i * kLanes);
      maximum[i] = in_signed_order(Words::load(maximum_ + first + i * kLanes));
      target_x[i] = Words::load(target_x_ + first + i * kLanes);
    }
    Words column = Words::splat(0);
    X* x = x_ + first;
    for (int j = 0; j < columns; ++j, from += stride, x += width_, column = column + one) {
      Words logits[kGroups];
      for (int i = 0; i < kGroups; ++i) logits[i] = Words::load(from + i * kLanes);
      for (int i = 0; i < kGroups; ++i) {
        maximum[i] = max_signed(maximum[i], in_signed_order(logits[i]));
        target_x[i] = select_eq(target[i], column, logits[i], target_x[i]);
        store(x + i * kLanes, select_eq(target[i], column, nothing, logits[i]));
      }
    }
    for (int i = 0; i < kGroups; ++i) {
      store(maximum_ + first + i * kLanes, in_signed_order(maximum[i]));
      store(target_x_ + first + i * kLanes, target_x[i]);
    }
  }

  void copy(int64_t begin, int columns) {
    int i = 0;
    if constexpr (!kInWords) {
      const bool evenly_spaced = args_.class_stride == 1 && args_.layout.dimensions == 1;
      if (evenly_spaced)
        for (; i + kLanes <= count_; i += kLanes)
          transpose(Lanes(), logits_of(row_ + i) + begin, args_.layout.stride[0], columns, x_ + i,
                    width_);
    }
    for (; i < width_; ++i) {
      const T* p = logits_of(row_ + (i < count_ ? i : count_ - 1)) + begin * args_.class_stride;
      for (int j = 0; j < columns; ++j, p += args_.class_stride) put(*p, x_[j * width_ + i]);
    }
    if constexpr (!kInWords)
      if (args_.softcap != 0.0) copy_block<Vec>(x_, columns * width_, Real(args_.softcap), x_);
  }
  static void put(T logit, T& x) { x = logit; }
  template <class Wide>
  static void put(T logit, Wide& x) {
    x = widen(logit);
  }

  // Extras are of all logits: those of targets are back in the tile meanwhile.
  void add_extras(int64_t begin, int columns) {
    const auto replace_targets = [&](const auto& logit) {
      if (!kInWords) return;
      for (int i = 0; i < width_; ++i)
        if (target_column_[i] >= 0) x_[int(target_column_[i]) * width_ + i] = logit(i);
    };
    replace_targets([&](int i) { return target_x_[i]; });
    for (int g = 0; g < groups_; ++g)
      extras_[g].add(args_, plan_, begin, columns, in_order<X>(sums_[g].shift), x_ + g * kLanes,
                     width_);
    replace_targets([&](int) { return minus_infinity(); });
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
      const X* x = x_ + g * kLanes;
      const auto fetch = [&]() __attribute__((always_inline)) { ahead(); };
      if constexpr (kInWords) {
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
  alignas(64) int64_t target_[kRows];        // a class, also where the row is ignored
  alignas(64) Column target_column_[kRows];  // of the block; no column where it is in another
  alignas(64) X target_x_[kRows];            // the target's logit
  alignas(64) X maximum_[kRows];             // of the logits so far
  LaneSums<Vec, X> sums_[kTileGroups];
  Extras<Vec> extras_[kTileGroups];
  alignas(64) X x_[kSize];
};

}  // namespace sparse_kernels
