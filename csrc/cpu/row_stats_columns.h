// Row statistics with columns in lanes: many contiguous classes, kBlock at a time. Each block is
// read for its maximum, then again from L1 for its sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "row_stats_blocks.h"
#include "row_stats_functions.h"
#include "row_stats_group.h"
#include "row_stats_plan.h"
#include "scalar_types.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_math.h"

namespace sparse_kernels {

// The sums of a part of a row, block by block. They are in double, which costs nothing for a few
// blocks.
template <class Vec>
struct RowSums : PartSums {
  using Real = typename Vec::Real;

  RowSums() : PartSums{-kInfinity<Vec>, 0, 0, 0, -kInfinity<Vec>, -kInfinity<Vec>, 0, 0} {}
  explicit RowSums(const PartSums& part) : PartSums(part) {}

  void raise_maximum(double to, double inverse_temperature) {
    if (!(to > maximum)) return;
    if (rest != 0.0) {
      const double delta = to - maximum;
      const double f = std::exp(-delta * inverse_temperature);
      rest_d = f > 0.0 ? f * (rest_d - delta * rest) : 0.0 * rest;  // 0 * rest: NaN stays
      rest *= f;
      rest_sq *= f * f;
    }
    maximum = to;
  }

  void add_to_two_largest(double x) {
    second = x > largest ? largest : x > second ? x : second;
    largest = x > largest ? x : largest;
  }

  // A block of whole pairs of vectors, or a copy; `target` points into the copy, or is null.
  // `next`: the block that follows in memory.
  template <bool kSquares, class X, class T>
  void add_block(const RowStatsArgs& args, const Plan<Vec>& plan, const X* x, int64_t begin,
                 int columns, X* target, const T* next) {
    const int vectors = vectors_of<Vec>(columns);
    const Real block_maximum = max_block<Vec>(x, vectors);
    if (plan.extras) add_extras(args, plan, x, begin, columns, block_maximum);
    raise_maximum(block_maximum, args.inverse_temperature);
    if (maximum == -kInfinity<Vec>) {  // only -inf so far: d would be NaN, or hide one
      if (has_nan<Vec>(x, vectors)) rest = kNaN<Vec>;
      return;
    }
    if (target) narrow(-kInfinity<Vec>, target);  // stays out of the sums
    const Sums<Vec> block =
        sum_block<Vec, kSquares>(x, vectors, Real(maximum), plan.exponential, next);
    rest += reduce_add(block.rest);
    rest_d += reduce_add(block.rest_d);
    if (kSquares) rest_sq += reduce_add(block.rest_sq);
  }

  template <class T>
  void add_extras(const RowStatsArgs& args, const Plan<Vec>& plan, const T* x, int64_t begin,
                  int columns, Real block_maximum) {
    if (plan.requested[kMargin]) {
      const TwoLargest<Vec> two_of_block = two_largest<Vec>(x, vectors_of<Vec>(columns));
      add_to_two_largest(two_of_block.largest);
      add_to_two_largest(two_of_block.second);
    }
    if (args.argmax && block_maximum > maximum) {
      int j = 0;
      while (widen(x[j]) != block_maximum) ++j;
      argmax = begin + column_at<Vec>(j, columns);
    }
    if (plan.smoothed) {
      const bool masked = block_maximum == -kInfinity<Vec>;
      sum += masked ? -double(kInfinity<Vec>)
                    : sum_differences<Vec>(x, columns, block_maximum) +
                          double(block_maximum) * columns;
    }
  }

  // Adds the sums of a later part.
  void merge(RowSums part, double inverse_temperature) {
    if (part.maximum > maximum) argmax = part.argmax;
    raise_maximum(part.maximum, inverse_temperature);
    part.raise_maximum(maximum, inverse_temperature);
    rest += part.rest;
    rest_d += part.rest_d;
    rest_sq += part.rest_sq;
    add_to_two_largest(part.largest);
    add_to_two_largest(part.second);
    sum += part.sum;
  }
};

// One part of a row; `logits` and `target` are the row's.
template <class Vec, bool kSquares, class T>
inline RowSums<Vec> sum_part(const RowStatsArgs& args, const Plan<Vec>& plan, const T* logits,
                             int64_t target, int64_t part) {
  using Real = typename Vec::Real;
  constexpr int kLanes = Vec::kLanes;
  const int64_t first = part * kPartClasses;
  const int64_t end = part + 1 == parts_of_row(args.classes) ? args.classes : first + kPartClasses;
  RowSums<Vec> sums;
  // Blocks of 16-bit logits have as many bytes as those of float32.
  constexpr int kColumns = sizeof(T) == 2 ? 2 * kBlock : kBlock;
  for (int64_t begin = first; begin < end;) {
    const T* x = logits + begin;
    // The last block includes a remainder of less than a vector.
    const int columns = int(end - begin < kColumns + kLanes ? end - begin : kColumns);
    const bool has_target = target >= begin && target < begin + columns;
    if (args.softcap != 0.0 || columns % (2 * kLanes)) {
      alignas(64) Real copy[kColumns + kLanes];
      copy_block<Vec>(x, columns, Real(args.softcap), copy);
      sums.template add_block<kSquares>(
          args, plan, copy, begin, columns,
          has_target ? copy + position_in_copy<Vec>(int(target - begin), columns) : nullptr,
          x + kColumns);
    } else if (has_target) {
      alignas(64) T copy[kColumns];
      std::memcpy(copy, x, sizeof(T) * size_t(columns));
      sums.template add_block<kSquares>(args, plan, copy, begin, columns, copy + (target - begin),
                                        x + kColumns);
    } else {
      sums.template add_block<kSquares>(args, plan, x, begin, columns, static_cast<T*>(nullptr),
                                        x + kColumns);
    }
    begin += columns;
  }
  return sums;
}

// The sums over the lanes of kLanes vectors, those at lanes[i * kLanes]: into total[i]. In double,
// as reduce_add().
template <class Vec>
inline void add_lanes(const typename Vec::Real* lanes, double* total) {
  constexpr int kLanes = Vec::kLanes;
  alignas(64) typename Vec::Real column[kLanes * kLanes];
  transpose(Vec(), lanes, kLanes, kLanes, column, kLanes);
  for (int i = 0; i < kLanes; ++i) total[i] = column[i];
  for (int j = 1; j < kLanes; ++j)
    for (int i = 0; i < kLanes; ++i) total[i] += double(column[j * kLanes + i]);
}

// Rows of one block, into lanes [at, at + kLanes) of the group; several at a time, so that no row
// waits for another's reductions, which are done for all rows at once.
//
// noinline, here and below: with all of forward() in one function the numbers of other loops take
// the registers that this one needs.
template <class Vec, bool kSquares, class T>
__attribute__((noinline)) void sum_short_rows(const RowStatsArgs& args, const Plan<Vec>& plan,
                                              const T* const* logits, const int64_t* target,
                                              int count, Group<Vec>& group, int at) {
  using Real = typename Vec::Real;
  constexpr int kLanes = Vec::kLanes;
  constexpr int kCopies = kLanes * (kBlock / 4 + kLanes);  // stays in L1
  alignas(64) Real copies[kCopies];
  alignas(64) Real rest[kLanes * kLanes], rest_d[kLanes * kLanes], rest_sq[kLanes * kLanes];
  const int columns = int(args.classes), vectors = vectors_of<Vec>(columns);
  const int width = vectors * kLanes;
  const int step = kCopies / width < kLanes ? kCopies / width : kLanes;
  const int64_t to_next = args.layout.dimensions == 1 ? step * args.layout.stride[0] : 0;
  for (int first = 0; first < kLanes; first += step) {
    const int last = first + step < kLanes ? first + step : kLanes;
    for (int i = first; i < last && i < count; ++i) {
      if (group.ignored[at + i]) continue;
      Real* copy = copies + (i - first) * width;
      group.maximum[at + i] = copy_block<Vec>(logits[i], columns, Real(args.softcap), copy);
      Real& target_x = copy[position_in_copy<Vec>(int(target[i]), columns)];
      group.target_d[at + i] = target_x - group.maximum[at + i];
      target_x = -kInfinity<Vec>;
    }
    for (int i = first; i < last; ++i) {
      Sums<Vec> sums;
      if (!group.ignored[at + i])
        sums =
            sum_block<Vec, kSquares>(copies + (i - first) * width, vectors, group.maximum[at + i],
                                     plan.exponential, logits[i] + to_next);
      store(rest + i * kLanes, sums.rest);
      store(rest_d + i * kLanes, sums.rest_d);
      if (kSquares) store(rest_sq + i * kLanes, sums.rest_sq);
    }
  }
  alignas(64) double total_d[kLanes];
  add_lanes<Vec>(rest, group.rest_in_double + at);
  add_lanes<Vec>(rest_d, total_d);
  if (kSquares) add_lanes<Vec>(rest_sq, group.rest_sq + at);
  for (int i = 0; i < kLanes; ++i) {
    if (group.maximum[at + i] == -kInfinity<Vec>) group.rest_in_double[at + i] = kNaN<Vec>;
    group.rest[at + i] = Real(group.rest_in_double[at + i]);
    group.rest_d[at + i] = Real(total_d[i]);
  }
}

// The same of rows of several blocks, or with extras. Where `parts` is not null, it holds the sums.
template <class Vec, bool kSquares, class T>
__attribute__((noinline)) void sum_long_rows(const RowStatsArgs& args, const Plan<Vec>& plan,
                                             const T* const* logits, const int64_t* target,
                                             int64_t row, int count, const PartSums* parts,
                                             Group<Vec>& group, int at) {
  using Real = typename Vec::Real;
  const int64_t parts_per_row = parts_of_row(args.classes);
  for (int i = 0; i < count; ++i) {
    if (group.ignored[at + i]) continue;
    RowSums<Vec> sums;
    for (int64_t part = 0; part < parts_per_row; ++part) {
      const RowSums<Vec> more =
          parts ? RowSums<Vec>(parts[(row + i) * parts_per_row + part])
                : sum_part<Vec, kSquares>(args, plan, logits[i], target[i], part);
      if (part == 0)
        sums = more;
      else
        sums.merge(more, args.inverse_temperature);
    }
    const bool masked = sums.maximum == -kInfinity<Vec>;  // every logit: no distribution
    group.maximum[at + i] = Real(sums.maximum);
    group.rest_in_double[at + i] = masked ? kNaN<Vec> : sums.rest;
    group.rest[at + i] = Real(group.rest_in_double[at + i]);
    group.rest_d[at + i] = Real(sums.rest_d);
    group.rest_sq[at + i] = sums.rest_sq;
    group.second[at + i] = Real(sums.second);
    group.mean[at + i] = Real(sums.sum / double(args.classes) - sums.maximum);
    group.argmax[at + i] = sums.argmax;
    group.target_d[at + i] = widen(logits[i][target[i]]);
  }
  Vec target_x = Vec::load(group.target_d + at);
  if (args.softcap != 0.0) target_x = vec_cap(target_x, Real(args.softcap));
  store(group.target_d + at, target_x - Vec::load(group.maximum + at));
}

// Rows [row, row + count), at most kLanes of them, into lanes [at, at + kLanes) of the group.
template <class Vec, class T, bool kSquares>
inline void sum_rows(const RowStatsArgs& args, const Plan<Vec>& plan, int64_t row, int count,
                     const PartSums* parts, Group<Vec>& group, int at, RowStatsResult& result) {
  constexpr int kLanes = Vec::kLanes;
  const T* logits[kLanes];
  int64_t target[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    target[i] = i < count ? target_of(args, row + i) : args.ignore_index;
    group.ignored[at + i] = 0;
    if (is_ignored(args, row + i, target[i], result)) {
      group.ignore(at + i);
      continue;
    }
    logits[i] = static_cast<const T*>(args.logits) + row_offset(args.layout, row + i);
  }
  if (args.classes <= kBlock && !plan.extras)
    sum_short_rows<Vec, kSquares, T>(args, plan, logits, target, count, group, at);
  else
    sum_long_rows<Vec, kSquares, T>(args, plan, logits, target, row, count, parts, group, at);
}

// RowStatsFunctions::sum_parts for logits of type T.
template <class Vec, class T>
void sum_parts(const RowStatsArgs& args, int64_t begin, int64_t end, PartSums* parts) {
  const Plan<Vec> plan(args);
  const int64_t parts_per_row = parts_of_row(args.classes);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / parts_per_row, part = i % parts_per_row, target = target_of(args, row);
    if (target == args.ignore_index) continue;  // its parts are not read
    const T* logits = static_cast<const T*>(args.logits) + row_offset(args.layout, row);
    parts[i] = plan.squares ? sum_part<Vec, true>(args, plan, logits, target, part)
                            : sum_part<Vec, false>(args, plan, logits, target, part);
  }
}

}  // namespace sparse_kernels
