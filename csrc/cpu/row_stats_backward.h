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
#include "vec_any_order.h"
#include "wide_copy.h"

namespace sparse_kernels {

// Bytes by which logits are fetched before they are used where the gradient is streamed: the
// processor by itself looks less far ahead. The memory after a row is most often the next one's.
constexpr int64_t kReadAhead = 4096;

template <class Vec, class T, class Gradient>
inline void backward_row(const RowStatsBackwardArgs& args, const Gradient& in_memory, int64_t row,
                         const T* x, T* gradient, bool streaming) {
  constexpr int kLanes = Vec::kLanes;
  const Gradient gradient_of = in_memory;
  const UpstreamOfRows<Vec> upstream(args, row, 1);
  const RowConstants<Vec> constants(args, row, 1, upstream);
  // Before the stores: the gradient may be written over the logits.
  T of_target[kLanes] = {x[target_of(args, row)]};
  store(of_target,
        gradient_of.at_target(constants, Vec::load(of_target), upstream.at_target(args)));
  const auto some = [&](int64_t j, int64_t columns) {
    for (int64_t end = j + columns; j < end; j += kLanes) {
      T copy[kLanes] = {};
      const size_t bytes = sizeof(T) * size_t(end - j < kLanes ? end - j : kLanes);
      std::memcpy(copy, x + j, bytes);
      store(copy, gradient_of(constants, Vec::load(copy)));
      std::memcpy(gradient + j, copy, bytes);
    }
  };
  const auto batches = [&](int64_t j, auto write) {
    using Logits = Batch<Vec>;
    constexpr int64_t kStep = 2 * Logits::kLanes;
    const typename Gradient::template Of<Logits> of_batch(gradient_of);
    const RowConstants<Logits> row_constants(constants);
    const auto begin = [&](int64_t at) {
      Logits logits;
      load_in_any_order(x + at, logits);
      return of_batch.begin(row_constants, logits);
    };
    const auto end = [&](int64_t at, const auto& begun) {
      write(gradient + at, of_batch.end(row_constants, begun));
    };
    for (; j + kStep <= args.classes; j += kStep) {
      const char* ahead = reinterpret_cast<const char*>(x + j) + kReadAhead;
      if (streaming)
        for (int i = 0; i < int(kStep * sizeof(T)); i += 64) __builtin_prefetch(ahead + i);
      const int64_t next = j + Logits::kLanes;
      if constexpr (vectors_in<Logits> > 1) {  // overlapped, as in row_stats_sums.h
        const auto first = begin(j), second = begin(next);
        end(j, first);
        end(next, second);
      } else {
        end(j, begin(j));
        end(next, begin(next));
      }
    }
    some(j, args.classes - j);
  };
  if (streaming) {
    const auto head =
        int64_t(-reinterpret_cast<uintptr_t>(gradient) % kStreamAlignment / sizeof(T));
    some(0, head);
    batches(head, [](T* to, auto found) { stream_in_any_order(to, found); });
  } else {
    batches(0, [](T* to, auto found) { store_in_any_order(to, found); });
  }
  gradient[target_of(args, row)] = of_target[0];
}

// Rows in lanes, for classes that are not contiguous.
template <class Vec, class T, class Gradient>
inline void backward_group(const RowStatsBackwardArgs& args, const Gradient& gradient_of,
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
  const auto of_active = [&](Vec found) { return select_ge(is_active, one, found, zero); };
  T part[kLanes];
  for (int64_t j = 0; j < args.classes; ++j) {
    const int64_t in_offset = j * args.class_stride, out_offset = j * args.gradient_class_stride;
    if (adjacent) {
      store(out[0] + out_offset, of_active(gradient_of(constants, Vec::load(x[0] + in_offset))));
      continue;
    }
    for (int i = 0; i < kLanes; ++i) part[i] = x[i][in_offset];
    store(part, of_active(gradient_of(constants, Vec::load(part))));
    for (int i = 0; i < count; ++i) out[i][out_offset] = part[i];
  }
  store(part,
        of_active(gradient_of.at_target(constants, Vec::load(target_x), upstream.at_target(args))));
  for (int i = 0; i < count; ++i) out[i][rows.target[i] * args.gradient_class_stride] = part[i];
}

template <class Vec, class T, class Gradient>
inline void backward_rows(const RowStatsBackwardArgs& args, const Gradient& gradient_of,
                          int64_t begin, int64_t end) {
  constexpr int kLanes = Vec::kLanes;
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

// RowStatsFunctions::backward for logits of type T.
template <class Vec, class T>
void backward(const RowStatsBackwardArgs& args, int64_t begin, int64_t end) {
  if (args.softcap != 0)
    backward_rows<Vec, T>(args, LogitGradient<Vec, true>(args), begin, end);
  else
    backward_rows<Vec, T>(args, LogitGradient<Vec, false>(args), begin, end);
}

}  // namespace sparse_kernels
