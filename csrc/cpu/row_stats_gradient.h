// The gradient in the logits as a function of them and of their rows' numbers;
// row_stats_backward.h derives it.
#pragma once

#include <cstdint>

#include "row_stats_plan.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_math.h"

namespace sparse_kernels {

// values[row] to values[row + count - 1], a number of each row; a single row's in every lane; zeros
// for null. A step of 0: all rows have the first.
template <class Vec>
__attribute__((always_inline)) inline Vec of_rows(const void* values, int64_t row, int count,
                                                  int64_t step = 1) {
  using Real = typename Vec::Real;
  if (!values) return Vec::splat(0);
  const Real* from = static_cast<const Real*>(values) + row * step;
  if (step == 0 || count == 1) return Vec::splat(*from);
  if (count == Vec::kLanes) return Vec::load(from);
  alignas(64) Real lanes[Vec::kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return Vec::load(lanes);
}

// The upstream gradients of rows in lanes.
template <class Vec>
struct UpstreamOfRows {
  Vec loss, entropy;

  UpstreamOfRows(const RowStatsBackwardArgs& args, int64_t row, int count)
      : loss(of_rows<Vec>(args.loss_gradient, row, count, args.loss_gradient_step)),
        entropy(of_rows<Vec>(args.entropy_gradient, row, count, args.entropy_gradient_step)) {}

  // What the target's gradient has in addition, before the softcap's slope.
  Vec at_target(const RowStatsBackwardArgs& args) const {
    using Real = typename Vec::Real;
    return loss * Vec::splat(Real(1.0 - args.label_smoothing)) *
           Vec::splat(Real(args.inverse_temperature));
  }
};

// The numbers of rows in lanes, or of one row in every lane. With d = x - maximum,
//   p (g - h (log p + H)) / temperature = e^(d / temperature) (slope d + level)
template <class Vec>
struct RowConstants {
  using Real = typename Vec::Real;

  Vec maximum;
  Vec slope, level;
  Vec minus_uniform;  // of the label smoothing, over the temperature

  RowConstants(const RowStatsBackwardArgs& args, int64_t row, int count,
               const UpstreamOfRows<Vec>& upstream)
      : maximum(of_rows<Vec>(args.maximum, row, count)) {
    const Vec total = of_rows<Vec>(args.total, row, count);
    const Vec inverse_temperature = Vec::splat(Real(args.inverse_temperature));
    const Vec weight = inverse_temperature / total;
    const Vec minus_entropy_gradient = Vec::splat(0) - upstream.entropy;
    const Vec shift = of_rows<Vec>(args.entropy, row, count) - vec_log(total);
    const Vec share = Vec::splat(Real(args.label_smoothing / double(args.classes)));
    maximum = plain_nan(maximum);
    slope = plain_nan(minus_entropy_gradient * weight * inverse_temperature);
    level = plain_nan(weight * fma(minus_entropy_gradient, shift, upstream.loss));
    minus_uniform = plain_nan((Vec::splat(0) - upstream.loss * share) * inverse_temperature);
  }

  // The same of a pair.
  template <class Half>
  explicit RowConstants(const RowConstants<Half>& half)
      : maximum(Vec::twice(half.maximum)),
        slope(Vec::twice(half.slope)),
        level(Vec::twice(half.level)),
        minus_uniform(Vec::twice(half.minus_uniform)) {}

  // Lane i gets the numbers of lane lanes[i].
  RowConstants permuted(const int32_t* lanes) const {
    RowConstants out = *this;
    out.maximum = permute(maximum, lanes);
    out.slope = permute(slope, lanes);
    out.level = permute(level, lanes);
    out.minus_uniform = permute(minus_uniform, lanes);
    return out;
  }

 private:
  // A caller's NaN may have any bits; store_pair() needs this one's.
  static Vec plain_nan(Vec x) { return select_ge(x, x, x, Vec::splat(kNaN<Vec>)); }
};

// What all rows of a call share. always_inline: a call for each vector would pass the rows' numbers
// and the result through memory. Whether there is a softcap is known when this is compiled, because
// loops that test for it need more registers than there are.
template <class Vec, bool kCapped>
struct LogitGradient {
  using Real = typename Vec::Real;
  template <class Other>
  using Of = LogitGradient<Other, kCapped>;

  Exponential<Vec> exponential;
  Real softcap;

  explicit LogitGradient(const RowStatsBackwardArgs& args)
      : exponential(args.inverse_temperature), softcap(Real(args.softcap)) {}
  // The same of a pair.
  template <class Half>
  explicit LogitGradient(const LogitGradient<Half, kCapped>& half)
      : exponential(half.exponential), softcap(half.softcap) {}

  // Of logits that are not their rows' targets.
  __attribute__((always_inline)) Vec operator()(const RowConstants<Vec>& row, Vec x) const {
    return end(row, begin(row, x));
  }
  // Of the targets; `part` is UpstreamOfRows::at_target.
  Vec at_target(const RowConstants<Vec>& row, Vec x, Vec part) const {
    const Begun begun = begin(row, x);
    return sloped(of_softmax(row, begun) - part, begun);
  }

  // The same in two halves, as Exponential has them.
  struct Begun {
    Vec d, tanh_slope;  // the latter only where there is a softcap
    typename Exponential<Vec>::Begun power;
  };
  __attribute__((always_inline)) Begun begin(const RowConstants<Vec>& row, Vec x) const {
    Begun begun;
    if constexpr (kCapped)
      x = Vec::splat(softcap) * vec_tanh(x / Vec::splat(softcap), &begun.tanh_slope);
    begun.d = exponential.clamp(x - row.maximum);
    begun.power = exponential.begin(begun.d);
    return begun;
  }
  __attribute__((always_inline)) Vec end(const RowConstants<Vec>& row, const Begun& begun) const {
    return sloped(of_softmax(row, begun), begun);
  }

 private:
  __attribute__((always_inline)) Vec of_softmax(const RowConstants<Vec>& row,
                                                const Begun& begun) const {
    // A masked logit gets exactly 0.
    const Vec power =
        select_ge(exponential.lowest, begun.d, Vec::splat(0), exponential.end(begun.power));
    return fma(power, fma(row.slope, begun.d, row.level), row.minus_uniform);
  }
  __attribute__((always_inline)) Vec sloped(Vec gradient, const Begun& begun) const {
    if constexpr (kCapped) return gradient * begun.tanh_slope;
    return gradient;
  }
};

template <class Vec>
inline typename Vec::Real upstream_of_row(const void* values, int64_t row, int64_t step) {
  return values ? static_cast<const typename Vec::Real*>(values)[row * step] : 0;
}

// True for a row whose gradient is 0 whatever its logits. NaN is not 0.
template <class Vec>
inline bool has_zero_gradient(const RowStatsBackwardArgs& args, int64_t row) {
  return target_of(args, row) == args.ignore_index ||
         (upstream_of_row<Vec>(args.loss_gradient, row, args.loss_gradient_step) == 0 &&
          upstream_of_row<Vec>(args.entropy_gradient, row, args.entropy_gradient_step) == 0);
}

// Which of the rows in lanes have a gradient: 1 in their lanes, 0 elsewhere. The target of the
// others is taken to be 0, a column that there is.
template <class Vec>
struct ActiveRows {
  alignas(64) typename Vec::Real active[Vec::kLanes];
  int64_t target[Vec::kLanes];
  bool any = false, all = true;

  ActiveRows(const RowStatsBackwardArgs& args, int64_t row, int count) {
    for (int i = 0; i < Vec::kLanes; ++i) {
      const bool is_active = i < count && !has_zero_gradient<Vec>(args, row + i);
      active[i] = is_active ? 1 : 0;
      target[i] = is_active ? target_of(args, row + i) : 0;
      any |= is_active;
      all &= is_active;
    }
  }
};

}  // namespace sparse_kernels
