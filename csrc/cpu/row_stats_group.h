// What any way through the logits leaves of kLanes rows, and what is made of it. Included by
// row_stats_kernel.h.

// What one pass leaves of kLanes rows.
struct alignas(64) Group {
  Real maximum[kLanes];  // of the logits
  double rest[kLanes];
  double rest_sq[kLanes];
  Real rest_d[kLanes];
  Real target_d[kLanes];
  Real second[kLanes];     // second largest logit; only where the margin is wanted
  Real mean[kLanes];       // of the logits, less the maximum; only with label smoothing
  int64_t argmax[kLanes];  // only where wanted
  bool ignored[kLanes];

  void ignore(int lane) {  // any finite values: finish() writes 0
    maximum[lane] = rest[lane] = rest_d[lane] = rest_sq[lane] = target_d[lane] = 0;
    second[lane] = mean[lane] = 0;
    argmax[lane] = 0;
    ignored[lane] = true;
  }
};

// Sums of e, e d and e^2, in every lane.
struct Sums {
  Vec rest = splat(0), rest_d = splat(0), rest_sq = splat(0);

  template <bool kSquares>
  void add(Vec d, const Exponential& exponential) {
    d = exponential.clamp(d);
    const Vec e = exponential(d);
    rest = rest + e;
    rest_d = fma(e, d, rest_d);
    if (kSquares) rest_sq = fma(e, e, rest_sq);
  }

  Sums operator+(const Sums& other) const {
    return {rest + other.rest, rest_d + other.rest_d, rest_sq + other.rest_sq};
  }
};

// Vectors added one to another before their sum joins the rest: equal terms round the same way each
// time, and the error of one long sum would grow with the square of its terms.
constexpr int kRun = 32;

// d(0) to d(count - 1), in two sums: more would not fit into AVX2's registers, and with one each
// term would wait for the one before. ahead(i) is called before every fourth.
template <bool kSquares, class D, class Ahead>
inline Sums sum_of(int count, const Exponential& exponential, const D& d, const Ahead& ahead) {
  Sums total;
  for (int i = 0; i < count;) {
    const int end = count - i < kRun ? count : i + kRun;
    Sums even, odd;
    for (; i + 4 <= end; i += 4) {
      ahead(i);
      even.add<kSquares>(d(i), exponential);
      odd.add<kSquares>(d(i + 1), exponential);
      even.add<kSquares>(d(i + 2), exponential);
      odd.add<kSquares>(d(i + 3), exponential);
    }
    for (; i < end; ++i) even.add<kSquares>(d(i), exponential);
    total = total + (even + odd);
  }
  return total;
}

struct Plan {
  bool wanted[kStatistics];  // as an output or in the significance
  bool squares;
  bool smoothed;  // the mean of the logits is needed
  bool extras;    // the margin, the argmax or the mean
  Exponential exponential;

  explicit Plan(const RowStatsArgs& args) : exponential(args.inverse_temperature) {
    for (int k = 0; k < kStatistics; ++k)
      wanted[k] = args.outputs[k] || (args.mask && args.weights[k] != 0.0);
    squares = wanted[kGradNorm] || wanted[kSumSquares];
    smoothed = wanted[kLoss] && args.label_smoothing != 0.0;
    extras = wanted[kMargin] || args.argmax || smoothed;
  }
};

inline int64_t target_of(const RowStatsInput& args, int64_t row) {
  return args.targets_are_int32 ? static_cast<const int32_t*>(args.targets)[row]
                                : static_cast<const int64_t*>(args.targets)[row];
}

// Whether the row is ignored; so is one with a bad target, which is noted. ignore_index may be a
// class.
inline bool is_left_out(const RowStatsArgs& args, int64_t row, int64_t y, RowStatsResult& result) {
  if (y == args.ignore_index) return true;
  if (uint64_t(y) < uint64_t(args.classes)) return false;
  if (result.bad_target_row < 0) result.bad_target_row = row;  // rows come in ascending order
  return true;
}

inline void copy_rows(void* out, int64_t row, const Real* values, int count) {
  std::memcpy(static_cast<Real*>(out) + row, values, sizeof(Real) * count);
}

// Turns rows [row, row + count) of the group into outputs and decisions.
inline void finish(const RowStatsArgs& args, const Plan& plan, const Group& group, int64_t row,
                   int count, RowStatsResult& result) {
  const Vec zero = splat(0), one = splat(1), minus_beta = splat(Real(-args.inverse_temperature));
  alignas(64) double r[kLanes], sq[kLanes];
  alignas(64) Real rest_of[kLanes], rest_d_of[kLanes], e[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const bool nothing = group.rest[i] <= kFlushBelow;
    r[i] = nothing ? 0.0 : group.rest[i];
    sq[i] = nothing ? 0.0 : group.rest_sq[i];
    rest_of[i] = Real(r[i]);
    rest_d_of[i] = nothing ? 0 : group.rest_d[i];
  }
  const Vec rest = load(rest_of), rest_d = load(rest_d_of);
  const Vec target_d = load(group.target_d);
  const Vec target_clamped = plan.exponential.clamp(target_d);
  const Vec target_e = plan.exponential(target_clamped);
  const Vec total = rest + target_e;
  const Vec inverse = one / total;
  const Vec log_total = log1p(rest + (target_e - one));

  Real value[kStatistics][kLanes];
  const auto& wanted = plan.wanted;
  if (wanted[kLoss]) {
    Vec loss = fma(target_d, minus_beta, log_total);
    if (plan.smoothed) {
      const Vec uniform = fma(load(group.mean), minus_beta, log_total);
      const Real smoothing = Real(args.label_smoothing);
      loss = fma(splat(smoothing), uniform, splat(Real(1.0 - args.label_smoothing)) * loss);
    }
    store(value[kLoss], loss);
  }
  if (wanted[kEntropy]) {
    const Vec mean_d = fma(target_e, target_clamped, rest_d) * inverse;
    store(value[kEntropy], fma(mean_d, minus_beta, log_total));
  }
  // In double: a float's roundings would add up to more than PyTorch's own.
  store(e, target_e);
  const auto per_lane = [&](Statistic k, const auto& f) {
    if (!wanted[k]) return;
    for (int i = 0; i < kLanes; ++i) value[k][i] = Real(f(i, r[i] + e[i]));
  };
  per_lane(kGradNorm, [&](int i, double s) { return std::sqrt(r[i] * r[i] + sq[i]) / s; });
  per_lane(kSumSquares, [&](int i, double s) { return (double(e[i]) * e[i] + sq[i]) / (s * s); });
  per_lane(kMaxProb, [&](int, double s) { return 1.0 / s; });
  if (wanted[kMargin]) {
    const Vec second_d = plan.exponential.clamp(load(group.second) - load(group.maximum));
    alignas(64) Real second[kLanes];
    store(second, plan.exponential(second_d));
    per_lane(kMargin, [&](int i, double s) { return (1.0 - second[i]) / s; });
  }
  if (wanted[kLogSumExp])
    store(value[kLogSumExp],
          fma(load(group.maximum), splat(Real(args.inverse_temperature)), log_total));

  bool any_ignored = false;
  for (int i = 0; i < count; ++i) any_ignored |= group.ignored[i];
  if (any_ignored)
    for (int k = 0; k < kStatistics; ++k)
      for (int i = 0; wanted[k] && i < count; ++i)
        if (group.ignored[i]) value[k][i] = 0;

  Real totals[kLanes];
  store(totals, total);
  if (args.argmax)
    for (int i = 0; i < count; ++i)
      args.argmax[row + i] = group.ignored[i] ? 0 : totals[i] != totals[i] ? -1 : group.argmax[i];
  if (args.saved_maximum) {
    copy_rows(args.saved_maximum, row, group.maximum, count);
    copy_rows(args.saved_total, row, totals, count);
  }
  for (int k = 0; k < kStatistics; ++k)
    if (args.outputs[k]) copy_rows(args.outputs[k], row, value[k], count);
  if (!args.mask) return;

  Vec sum = zero;
  for (int k = 0; k < kStatistics; ++k)
    if (args.weights[k] != 0.0) sum = fma(splat(Real(args.weights[k])), load(value[k]), sum);
  Real significance[kLanes];
  store(significance, sum);
  if (args.offset)
    for (int i = 0; i < count; ++i)
      if (!group.ignored[i]) significance[i] += static_cast<const Real*>(args.offset)[row + i];
  // Without branches, since which rows are kept cannot be foreseen. Not above the threshold is NaN.
  for (int i = 0; i < count; ++i) {
    result.invalid += significance[i] != significance[i];
    args.mask[row + i] = (significance[i] > Real(args.threshold)) & !group.ignored[i];
  }
  if (args.weight)
    for (int i = 0; i < count; ++i) {
      // In double, so that the probability agrees with the reference's to the last bit or nearly.
      const double above = double(significance[i]) - args.threshold;
      double p = 1.0 / (1.0 + std::exp(-above / args.gate_temperature));
      p = p < args.p_min ? args.p_min : p;
      const bool keep = philox_uniform(args.seed, args.step, uint64_t(row + i)) < p &&  // not NaN
                        !group.ignored[i];
      args.mask[row + i] = keep;
      args.weight[row + i] = keep ? float(1.0 / p) : 0.0f;
    }
  copy_rows(args.significance, row, significance, count);
}
