// The gradient of loss and entropy in the logits, in one pass: the logits are read once and the
// gradient written once. Included by row_stats_kernel.h.
//
// With z the logits after softcap and temperature, p = 2^t / S from the saved maximum and S, H the
// saved entropy, g and h the gradients of loss and entropy, and s the label smoothing,
//   d / d z_j = p_j (g - h (log p_j + H)) - g s / classes - [j = y] g (1 - s)
// and d z / d x is 1 / temperature, times 1 - tanh^2 where there is a softcap.

// Constants of one row in every lane, or of a row in each lane.
struct Slope {
  Vec maximum, inverse_total, log_total, entropy, loss_gradient, entropy_gradient;
  Vec inverse_temperature, uniform;
  Exponential exponential;
  Real softcap;

  Slope(const RowStatsBackwardArgs& args, Vec maximum, Vec total, Vec entropy, Vec g, Vec h)
      : maximum(maximum),
        inverse_total(splat(1) / total),
        log_total(log(total)),
        entropy(entropy),
        loss_gradient(g),
        entropy_gradient(h),
        inverse_temperature(splat(Real(args.inverse_temperature))),
        uniform(g * splat(Real(args.label_smoothing / double(args.classes)))),
        exponential(args.inverse_temperature),
        softcap(Real(args.softcap)) {}

  // ``at_target`` is g (1 - s) in the target's column, else 0.
  Vec operator()(Vec x, Vec at_target) const {
    Vec slope = inverse_temperature;
    if (softcap != 0) {
      Vec steepness;
      x = splat(softcap) * tanh(x / splat(softcap), &steepness);
      slope = slope * steepness;
    }
    const Vec zero = splat(0), d = exponential.clamp(x - maximum);
    Vec p = exponential(d) * inverse_total;
    p = select_ge(exponential.lowest, d, zero, p);  // a masked logit gets exactly 0
    const Vec log_p = fms(d, inverse_temperature, log_total);
    const Vec factor = loss_gradient - entropy_gradient * (log_p + entropy);
    return (fma(p, factor, zero - uniform) - at_target) * slope;
  }
};

inline Real value_at(const void* values, int64_t row) {
  return values ? static_cast<const Real*>(values)[row] : 0;
}

template <class T>
inline void backward_row(const RowStatsBackwardArgs& args, int64_t row, int64_t y, const T* x,
                         T* gradient) {
  const Real g = value_at(args.loss_gradient, row);
  const Slope slope(args, splat(value_at(args.maximum, row)), splat(value_at(args.total, row)),
                    splat(value_at(args.entropy, row)), splat(g),
                    splat(value_at(args.entropy_gradient, row)));
  const Vec zero = splat(0);
  const Real target_x = widen(x[y]);  // before the stores, which may be to the logits
  const int64_t whole = args.classes / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) store(gradient + j, slope(load(x + j), zero));
  T some[kLanes] = {};
  if (whole < args.classes) {
    const size_t tail = sizeof(T) * size_t(args.classes - whole);
    std::memcpy(some, x + whole, tail);
    store(some, slope(load(some), zero));
    std::memcpy(gradient + whole, some, tail);
  }
  store(some, slope(splat(target_x), splat(g * Real(1.0 - args.label_smoothing))));
  gradient[y] = some[0];
}

// Rows in lanes, for classes that are not contiguous.
template <class T>
inline void backward_group(const RowStatsBackwardArgs& args, int64_t row, int count) {
  alignas(64) Real m[kLanes], total[kLanes], entropy[kLanes], g[kLanes], h[kLanes];
  alignas(64) Real active[kLanes], target_x[kLanes], at_target[kLanes];
  const T* x[kLanes];
  T* out[kLanes];
  int64_t y[kLanes];
  bool adjacent = count == kLanes;
  for (int i = 0; i < kLanes; ++i) {
    const int64_t r = row + (i < count ? i : count - 1);
    x[i] = static_cast<const T*>(args.logits) + args.layout.offset(r);
    out[i] = static_cast<T*>(args.gradient) + args.gradient_layout.offset(r);
    adjacent &= x[i] == x[0] + i && out[i] == out[0] + i;
    y[i] = target_of(args, r);
    active[i] = y[i] == args.ignore_index ? 0 : 1;
    if (active[i] == 0) y[i] = 0;
    m[i] = value_at(args.maximum, r);
    total[i] = value_at(args.total, r);
    entropy[i] = value_at(args.entropy, r);
    g[i] = value_at(args.loss_gradient, r);
    h[i] = value_at(args.entropy_gradient, r);
    at_target[i] = g[i] * Real(1.0 - args.label_smoothing);
    target_x[i] = widen(x[i][y[i] * args.class_stride]);
  }
  const Slope slope(args, load(m), load(total), load(entropy), load(g), load(h));
  const Vec zero = splat(0), one = splat(1), is_active = load(active);
  const auto gradient_of = [&](Vec v, Vec hit) {  // an ignored row may hold NaN: selected away
    return select_ge(is_active, one, slope(v, hit), zero);
  };
  T some[kLanes];
  for (int64_t j = 0; j < args.classes; ++j) {
    const int64_t in_at = j * args.class_stride, out_at = j * args.gradient_class_stride;
    if (adjacent) {
      store(out[0] + out_at, gradient_of(load(x[0] + in_at), zero));
      continue;
    }
    for (int i = 0; i < kLanes; ++i) some[i] = x[i][in_at];
    store(some, gradient_of(load(some), zero));
    for (int i = 0; i < count; ++i) out[i][out_at] = some[i];
  }
  store(some, gradient_of(load(target_x), load(at_target)));
  for (int i = 0; i < count; ++i) out[i][y[i] * args.gradient_class_stride] = some[i];
}

template <class T>
void run_backward(const RowStatsBackwardArgs& args, int64_t begin, int64_t end) {
  if (args.class_stride != 1 || args.gradient_class_stride != 1) {
    for (int64_t row = begin; row < end; row += kLanes)
      backward_group<T>(args, row, int(end - row < kLanes ? end - row : kLanes));
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.logits) + args.layout.offset(row);
    T* gradient = static_cast<T*>(args.gradient) + args.gradient_layout.offset(row);
    const int64_t y = target_of(args, row);
    if (y == args.ignore_index)
      std::memset(static_cast<void*>(gradient), 0, sizeof(T) * size_t(args.classes));
    else
      backward_row(args, row, y, x, gradient);
  }
}
