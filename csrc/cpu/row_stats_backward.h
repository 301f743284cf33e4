// The gradient of loss and entropy in the logits, in one pass: the logits are read once and the
// gradient is written once.
//
// With z the logits after softcap and temperature, p the softmax from the saved maximum and S, H
// the saved entropy, g and h the gradients of loss and entropy, and s the label smoothing,
//   d / d z_j = p_j (g - h (log p_j + H)) - g s / classes - [j = y] g (1 - s)
// and d z / d x is 1 / temperature, times 1 - tanh^2 where there is a softcap.
//
// There are three ways through the logits:
//   backward_row     many contiguous classes: columns in lanes
//   backward_packed  few contiguous classes (row_stats_backward_packed.h)
//   backward_group   classes that are not contiguous: rows in lanes
//
// A row that is ignored, or whose g and h are both 0, has the gradient 0: its logits are not read,
// and nothing is written where the memory is known to hold zeros.
// Where the whole gradient would not stay in the caches, it is written past them, unless it takes
// the memory of the logits, which are in them.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_stats_backward_packed.h"
#include "row_stats_gradient.h"
#include "row_stats_plan.h"
#include "scalar_types.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "wide_copy.h"

namespace sparse_kernels {

template <class Vec, class T>
inline void backward_row(const RowStatsBackwardArgs& args, const LogitGradient<Vec>& in_memory,
                         int64_t row, const T* x, T* gradient, bool streaming) {
  using Real = typename Vec::Real;
  constexpr int kLanes = Vec::kLanes;
  const LogitGradient<Vec> gradient_of = in_memory;
  const UpstreamOfRows<Vec> upstream(args, row, 1);
  const RowConstants<Vec> constants(args, row, 1, upstream);
  Real at_target[kLanes];
  store(at_target, upstream.at_target(args));
  const int64_t target = target_of(args, row);
  const auto gradient_at = [&](int64_t j, const T* from) {
    Vec here = Vec::splat(0);
    if (uint64_t(target - j) < uint64_t(kLanes)) {
      Real lanes[kLanes] = {};
      lanes[target - j] = at_target[0];
      here = Vec::load(lanes);
    }
    return gradient_of(constants, Vec::load(from), here);
  };
  const auto part = [&](int64_t j, int64_t columns) {  // of a vector
    T copy[kLanes] = {};
    std::memcpy(copy, x + j, sizeof(T) * size_t(columns));
    store(copy, gradient_at(j, copy));
    std::memcpy(gradient + j, copy, sizeof(T) * size_t(columns));
  };
  int64_t j = 0;
  if (streaming) {
    j = int64_t(-reinterpret_cast<uintptr_t>(gradient) % kStreamAlignment / sizeof(T));
    for (int64_t i = 0; i < j; i += kLanes) part(i, j - i < kLanes ? j - i : kLanes);
    for (; j + kLanes <= args.classes; j += kLanes) stream(gradient + j, gradient_at(j, x + j));
  } else {
    for (; j + kLanes <= args.classes; j += kLanes) store(gradient + j, gradient_at(j, x + j));
  }
  if (j < args.classes) part(j, args.classes - j);
}

// Rows in lanes, for classes that are not contiguous.
template <class Vec, class T>
inline void backward_group(const RowStatsBackwardArgs& args, const LogitGradient<Vec>& gradient_of,
                           int64_t row, int count) {
  using Real = typename Vec::Real;
  constexpr int kLanes = Vec::kLanes;
  const T* x[kLanes];
  T* out[kLanes];
  alignas(64) Real target_x[kLanes];
  bool adjacent = count == kLanes;
  const ActiveRows<Vec> rows(args, row, count);
  for (int i = 0; i < kLanes; ++i) {
    const int64_t r = row + (i < count ? i : count - 1);
    x[i] = static_cast<const T*>(args.logits) + row_offset(args.layout, r);
    out[i] = static_cast<T*>(args.gradient) + row_offset(args.gradient_layout, r);
    adjacent &= x[i] == x[0] + i && out[i] == out[0] + i;
    target_x[i] = widen(x[i][rows.target[i] * args.class_stride]);
  }
  if (!rows.any) {
    for (int64_t j = 0; j < args.classes; ++j)
      for (int i = 0; i < count; ++i) out[i][j * args.gradient_class_stride] = T{};
    return;
  }
  const UpstreamOfRows<Vec> upstream(args, row, count);
  const RowConstants<Vec> constants(args, row, count, upstream);
  const Vec zero = Vec::splat(0), one = Vec::splat(1), is_active = Vec::load(rows.active);
  // An unused row may hold NaN, so it is not multiplied by 0 but replaced.
  const auto gradient_at = [&](Vec x, Vec at_target) {
    return select_ge(is_active, one, gradient_of(constants, x, at_target), zero);
  };
  T part[kLanes];
  for (int64_t j = 0; j < args.classes; ++j) {
    const int64_t in_offset = j * args.class_stride, out_offset = j * args.gradient_class_stride;
    if (adjacent) {
      store(out[0] + out_offset, gradient_at(Vec::load(x[0] + in_offset), zero));
      continue;
    }
    for (int i = 0; i < kLanes; ++i) part[i] = x[i][in_offset];
    store(part, gradient_at(Vec::load(part), zero));
    for (int i = 0; i < count; ++i) out[i][out_offset] = part[i];
  }
  store(part, gradient_at(Vec::load(target_x), upstream.at_target(args)));
  for (int i = 0; i < count; ++i) out[i][rows.target[i] * args.gradient_class_stride] = part[i];
}

// RowStatsFunctions::backward for logits of type T.
template <class Vec, class T>
void backward(const RowStatsBackwardArgs& args, int64_t begin, int64_t end) {
  constexpr int kLanes = Vec::kLanes;
  const LogitGradient<Vec> gradient_of(args);
  if (args.class_stride != 1 || args.gradient_class_stride != 1) {
    for (int64_t row = begin; row < end; row += kLanes)
      backward_group<Vec, T>(args, gradient_of, row, int(end - row < kLanes ? end - row : kLanes));
    return;
  }
  if (args.classes <= kPackedClasses) return backward_packed<Vec, T>(args, gradient_of, begin, end);
  const int64_t bytes = int64_t(sizeof(T)) * args.classes;
  const bool streaming = args.gradient != args.logits && args.rows * bytes >= kStreamed;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.logits) + row_offset(args.layout, row);
    T* gradient = static_cast<T*>(args.gradient) + row_offset(args.gradient_layout, row);
    if (!has_zero_gradient<Vec>(args, row))
      backward_row<Vec>(args, gradient_of, row, x, gradient, streaming);
    else if (!args.zeroed)
      zero_bytes(reinterpret_cast<char*>(gradient), bytes, streaming);
  }
  if (streaming) finish_streaming();
}

}  // namespace sparse_kernels
