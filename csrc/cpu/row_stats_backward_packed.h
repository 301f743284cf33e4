// The gradient of few contiguous classes. The logits of kLanes rows are as many vectors as there
// are classes; each vector crosses rows, so the rows' numbers are permuted to the lanes of their
// logits. No logit is moved, no vector has idle lanes, and a logarithm serves kLanes rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_stats_gradient.h"
#include "row_stats_plan.h"
#include "scalar_types.h"
#include "sparse_kernels/cpu/row_stats.h"

namespace sparse_kernels {

// In longer rows six permutations a vector take longer than a logarithm and a remainder a row.
constexpr int kPackedClasses = 128;

// kLanes rows whose logits and gradients follow one another.
template <class Vec, class T, class Gradient>
inline void backward_packed_rows(const RowStatsBackwardArgs& args, const Gradient& in_memory,
                                 const ActiveRows<Vec>& rows, const int32_t* row_of, int64_t row,
                                 int count, const T* x, T* gradient) {
  using Real = typename Vec::Real;
  constexpr int kLanes = Vec::kLanes;
  const Gradient gradient_of = in_memory;
  const int classes = int(args.classes);
  const UpstreamOfRows<Vec> upstream(args, row, count);
  const RowConstants<Vec> constants(args, row, count, upstream);
  const Vec zero = Vec::splat(0), one = Vec::splat(1), is_active = Vec::load(rows.active);
  // Before the stores: the gradient may be written over the logits.
  alignas(64) Real target_x[kLanes];
  for (int i = 0; i < kLanes; ++i) target_x[i] = widen(x[i * classes + rows.target[i]]);
  for (int v = 0; v < classes; ++v) {
    const int32_t* lanes = row_of + v * kLanes;
    Vec found = gradient_of(constants.permuted(lanes), Vec::load(x + v * kLanes));
    // An unused row may hold NaN, so it is not multiplied by 0 but replaced.
    if (!rows.all) found = select_ge(permute(is_active, lanes), one, found, zero);
    store(gradient + v * kLanes, found);
  }
  T of_target[kLanes];
  store(of_target, gradient_of.at_target(constants, Vec::load(target_x), upstream.at_target(args)));
  for (int i = 0; i < kLanes; ++i)
    if (rows.active[i] != 0) gradient[i * classes + rows.target[i]] = of_target[i];
}

// Rows [begin, end), up to kPackedClasses classes.
template <class Vec, class T, class Gradient>
inline void backward_packed(const RowStatsBackwardArgs& args, const Gradient& gradient_of,
                            int64_t begin, int64_t end) {
  constexpr int kLanes = Vec::kLanes;
  const int64_t classes = args.classes;
  alignas(64) int32_t row_of[kPackedClasses * kLanes];  // of each of kLanes rows' logits
  for (int i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < classes; ++j) row_of[i * classes + j] = i;
  const auto follow = [&](const RowLayout& layout) {
    return layout.dimensions == 1 && layout.stride[0] == classes;
  };
  const bool packed = follow(args.layout) && follow(args.gradient_layout);
  for (int64_t row = begin; row < end; row += kLanes) {
    const int count = int(end - row < kLanes ? end - row : kLanes);
    const auto in = [&](int i) {
      return static_cast<const T*>(args.logits) + row_offset(args.layout, row + i);
    };
    const auto out = [&](int i) {
      return static_cast<T*>(args.gradient) + row_offset(args.gradient_layout, row + i);
    };
    const ActiveRows<Vec> rows(args, row, count);
    if (packed && count == kLanes && rows.any) {
      backward_packed_rows(args, gradient_of, rows, row_of, row, count, in(0), out(0));
      continue;
    }
    T copy[kPackedClasses * kLanes] = {};
    const size_t bytes = sizeof(T) * size_t(classes);
    if (rows.any) {
      for (int i = 0; i < count; ++i) std::memcpy(copy + i * classes, in(i), bytes);
      backward_packed_rows(args, gradient_of, rows, row_of, row, count, copy, copy);
    }
    for (int i = 0; i < count; ++i) std::memcpy(out(i), copy + i * classes, bytes);
  }
}

}  // namespace sparse_kernels
