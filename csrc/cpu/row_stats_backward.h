// The gradient of loss and entropy in the logits, in one pass: the logits are read once and the
// gradient is written once.
//
// With z the logits after softcap and temperature, p the softmax from the saved maximum and S, H
// the saved entropy, g and h the gradients of loss and entropy, and s the label smoothing,
//   d / d z_j = p_j (g - h (log p_j + H)) - g s / classes - [j = y] g (1 - s)
// and d z / d x is 1 / temperature, times 1 - tanh^2 where there is a softcap.
//
// A row that is ignored, or whose g and h are both 0, has the gradient 0: its logits are not read,
// and zeros are written past the caches where the whole gradient would not stay in them.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_stats_plan.h"
#include "scalar_types.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_math.h"
#include "wide_copy.h"

namespace sparse_kernels {

// The gradient in the logits as a function of them. Its constants are those of one row, in every
// lane, or those of kLanes rows, one in each lane.
template <class Vec>
struct LogitGradient {
  using Real = typename Vec::Real;

  Vec maximum, inverse_total, log_total, entropy, loss_gradient, entropy_gradient;
  Vec inverse_temperature, uniform;
  Exponential<Vec> exponential;
  Real softcap;

  LogitGradient(const RowStatsBackwardArgs& args, Vec maximum, Vec total, Vec entropy, Vec g, Vec h)
      : maximum(maximum),
        inverse_total(Vec::splat(1) / total),
        log_total(vec_log(total)),
        entropy(entropy),
        loss_gradient(g),
        entropy_gradient(h),
        inverse_temperature(Vec::splat(Real(args.inverse_temperature))),
        uniform(g * Vec::splat(Real(args.label_smoothing / double(args.classes)))),
        exponential(args.inverse_temperature),
        softcap(Real(args.softcap)) {}

  // `at_target` is g (1 - s) in the target's column and 0 elsewhere.
  Vec operator()(Vec x, Vec at_target) const {
    Vec dz_dx = inverse_temperature;
    if (softcap != 0) {
      Vec tanh_slope;
      x = Vec::splat(softcap) * vec_tanh(x / Vec::splat(softcap), &tanh_slope);
      dz_dx = dz_dx * tanh_slope;
    }
    const Vec zero = Vec::splat(0), d = exponential.clamp(x - maximum);
    Vec p = exponential(d) * inverse_total;
    p = select_ge(exponential.lowest, d, zero, p);  // a masked logit gets exactly 0
    const Vec log_p = fms(d, inverse_temperature, log_total);
    const Vec factor = loss_gradient - entropy_gradient * (log_p + entropy);
    return (fma(p, factor, zero - uniform) - at_target) * dz_dx;
  }
};

template <class Real>
static inline Real value_or_zero(const void* values, int64_t row) {
  return values ? static_cast<const Real*>(values)[row] : 0;
}

// True for a row whose gradient is 0 whatever its logits. NaN is not 0.
template <class Real>
static inline bool has_zero_gradient(const RowStatsBackwardArgs& args, int64_t row) {
  return target_of(args, row) == args.ignore_index ||
         (value_or_zero<Real>(args.loss_gradient, row) == 0 &&
          value_or_zero<Real>(args.entropy_gradient, row) == 0);
}

template <class Vec, class T>
inline void backward_row(const RowStatsBackwardArgs& args, int64_t row, int64_t target, const T* x,
                         T* gradient) {
  using Real = typename Vec::Real;
  constexpr int kLanes = Vec::kLanes;
  const Real g = value_or_zero<Real>(args.loss_gradient, row);
  const LogitGradient<Vec> gradient_of(args, Vec::splat(value_or_zero<Real>(args.maximum, row)),
                                       Vec::splat(value_or_zero<Real>(args.total, row)),
                                       Vec::splat(value_or_zero<Real>(args.entropy, row)),
                                       Vec::splat(g),
                                       Vec::splat(value_or_zero<Real>(args.entropy_gradient, row)));
  const Vec zero = Vec::splat(0);
  // Before the stores: the gradient may be written over the logits.
  const Real target_x = widen(x[target]);
  const int64_t whole = args.classes / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes)
    store(gradient + j, gradient_of(Vec::load(x + j), zero));
  T part[kLanes] = {};
  if (whole < args.classes) {
    const size_t tail = sizeof(T) * size_t(args.classes - whole);
    std::memcpy(part, x + whole, tail);
    store(part, gradient_of(Vec::load(part), zero));
    std::memcpy(gradient + whole, part, tail);
  }
  store(part, gradient_of(Vec::splat(target_x), Vec::splat(g * Real(1.0 - args.label_smoothing))));
  gradient[target] = part[0];
}

// Rows in lanes, for classes that are not contiguous.
template <class Vec, class T>
inline void backward_group(const RowStatsBackwardArgs& args, int64_t row, int count) {
  using Real = typename Vec::Real;
  constexpr int kLanes = Vec::kLanes;
  alignas(64) Real m[kLanes], total[kLanes], entropy[kLanes], g[kLanes], h[kLanes];
  alignas(64) Real active[kLanes], target_x[kLanes], at_target[kLanes];
  const T* x[kLanes];
  T* out[kLanes];
  int64_t target[kLanes];
  bool adjacent = count == kLanes, any_active = false;
  for (int i = 0; i < kLanes; ++i) {
    const int64_t r = row + (i < count ? i : count - 1);
    x[i] = static_cast<const T*>(args.logits) + row_offset(args.layout, r);
    out[i] = static_cast<T*>(args.gradient) + row_offset(args.gradient_layout, r);
    adjacent &= x[i] == x[0] + i && out[i] == out[0] + i;
    active[i] = has_zero_gradient<Real>(args, r) ? 0 : 1;
    any_active |= active[i] != 0;
    target[i] = active[i] == 0 ? 0 : target_of(args, r);
    m[i] = value_or_zero<Real>(args.maximum, r);
    total[i] = value_or_zero<Real>(args.total, r);
    entropy[i] = value_or_zero<Real>(args.entropy, r);
    g[i] = value_or_zero<Real>(args.loss_gradient, r);
    h[i] = value_or_zero<Real>(args.entropy_gradient, r);
    at_target[i] = g[i] * Real(1.0 - args.label_smoothing);
    target_x[i] = widen(x[i][target[i] * args.class_stride]);
  }
  if (!any_active) {
    for (int64_t j = 0; j < args.classes; ++j)
      for (int i = 0; i < count; ++i) out[i][j * args.gradient_class_stride] = T{};
    return;
  }
  const LogitGradient<Vec> row_gradient(args, Vec::load(m), Vec::load(total), Vec::load(entropy),
                                        Vec::load(g), Vec::load(h));
  const Vec zero = Vec::splat(0), one = Vec::splat(1), is_active = Vec::load(active);
  // An unused row may hold NaN, so it is not multiplied by 0 but replaced.
  const auto gradient_of = [&](Vec x, Vec at_target) {
    return select_ge(is_active, one, row_gradient(x, at_target), zero);
  };
  T part[kLanes];
  for (int64_t j = 0; j < args.classes; ++j) {
    const int64_t in_offset = j * args.class_stride, out_offset = j * args.gradient_class_stride;
    if (adjacent) {
      store(out[0] + out_offset, gradient_of(Vec::load(x[0] + in_offset), zero));
      continue;
    }
    for (int i = 0; i < kLanes; ++i) part[i] = x[i][in_offset];
    store(part, gradient_of(Vec::load(part), zero));
    for (int i = 0; i < count; ++i) out[i][out_offset] = part[i];
  }
  store(part, gradient_of(Vec::load(target_x), Vec::load(at_target)));
  for (int i = 0; i < count; ++i) out[i][target[i] * args.gradient_class_stride] = part[i];
}

// RowStatsFunctions::backward for logits of type T.
template <class Vec, class T>
void backward(const RowStatsBackwardArgs& args, int64_t begin, int64_t end) {
  constexpr int kLanes = Vec::kLanes;
  if (args.class_stride != 1 || args.gradient_class_stride != 1) {
    for (int64_t row = begin; row < end; row += kLanes)
      backward_group<Vec, T>(args, row, int(end - row < kLanes ? end - row : kLanes));
    return;
  }
  const int64_t bytes = int64_t(sizeof(T)) * args.classes;
  const bool streaming = args.rows * bytes >= kStreamed;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.logits) + row_offset(args.layout, row);
    T* gradient = static_cast<T*>(args.gradient) + row_offset(args.gradient_layout, row);
    if (has_zero_gradient<typename Vec::Real>(args, row))
      zero_bytes(reinterpret_cast<char*>(gradient), bytes, streaming);
    else
      backward_row<Vec>(args, row, target_of(args, row), x, gradient);
  }
  if (streaming) finish_streaming();
}

}  // namespace sparse_kernels
