// What either way through the logits leaves of kLanes rows, and what is made of it. Included by
// row_stats_kernel.h.

// What one pass leaves of kLanes rows.
struct Group {
  float maximum[kLanes];  // of the raw logits
  float rest[kLanes];
  float rest_t[kLanes];
  float rest_sq[kLanes];
  float target_t[kLanes];
  float second[kLanes];    // second largest logit; only where the margin is wanted
  float mean[kLanes];      // of the logits, less the maximum; only with label smoothing
  int64_t argmax[kLanes];  // only where wanted
  bool ignored[kLanes];

  void ignore(int lane) {  // any finite values: finish() writes 0
    maximum[lane] = rest[lane] = rest_t[lane] = rest_sq[lane] = target_t[lane] = 0.0f;
    second[lane] = mean[lane] = 0.0f;
    argmax[lane] = 0;
    ignored[lane] = true;
  }
};

struct Plan {
  bool wanted[kStatistics];  // as an output or in the significance
  bool squares;
  bool smoothed;      // the mean of the logits is needed
  bool extras;        // the margin, the argmax or the mean
  float power_scale;  // c = log2(e) / temperature

  explicit Plan(const RowStatsArgs& args) : power_scale(kLog2E * args.inverse_temperature) {
    for (int k = 0; k < kStatistics; ++k)
      wanted[k] = args.outputs[k] || (args.mask && args.weights[k] != 0.0f);
    squares = wanted[kGradNorm] || wanted[kSumSquares];
    smoothed = wanted[kLoss] && args.label_smoothing != 0.0f;
    extras = wanted[kMargin] || args.argmax || smoothed;
  }
};

template <class Args>
inline int64_t target_of(const Args& args, int64_t row) {
  return args.targets_are_int32 ? static_cast<const int32_t*>(args.targets)[row]
                                : static_cast<const int64_t*>(args.targets)[row];
}

// Whether the row is ignored; so is one with a bad target, which is noted. ignore_index may be a
// class.
inline bool is_left_out(const RowStatsArgs& args, int64_t row, int64_t y, RowStatsResult& result) {
  if (y == args.ignore_index) return true;
  if (y >= 0 && y < args.classes) return false;
  if (result.bad_target_row < 0) result.bad_target_row = row;  // rows come in ascending order
  return true;
}

// Turns rows [row, row + count) of the group into outputs and decisions.
inline void finish(const RowStatsArgs& args, const Plan& plan, const Group& group, int64_t row,
                   int count, RowStatsResult& result) {
  const Vec zero = splat(0.0f), one = splat(1.0f), ln2 = splat(kLn2);
  const Vec raw_rest = load(group.rest), flush = splat(kFlushBelow);
  const Vec rest = select_ge(flush, raw_rest, zero, raw_rest);
  const Vec rest_t = select_ge(flush, raw_rest, zero, load(group.rest_t));
  const Vec rest_sq = select_ge(flush, raw_rest, zero, load(group.rest_sq));
  const Vec target_t = load(group.target_t);
  const Vec target_clamped = clamp_power(target_t);
  const Vec target_e = exp2_clamped(target_clamped);
  const Vec total = rest + target_e;
  const Vec inverse = one / total;
  // Where the target is the largest, e_y = 1 and this is log(S) too, without losing a small rest.
  const Vec log_ratio = log1p(rest / target_e);
  const Vec log_total = select_ge(target_t, zero, log_ratio, log(total));

  float value[kStatistics][kLanes];
  const auto& wanted = plan.wanted;
  if (wanted[kLoss]) {
    Vec loss = select_ge(target_e, rest, log_ratio, log_total - target_t * ln2);
    if (plan.smoothed) {
      const Vec uniform = log_total - load(group.mean) * splat(args.inverse_temperature);
      loss = fma(splat(args.label_smoothing), uniform, splat(1.0f - args.label_smoothing) * loss);
    }
    store(value[kLoss], loss);
  }
  if (wanted[kEntropy])
    store(value[kEntropy], log_total - ln2 * (fma(target_e, target_clamped, rest_t) * inverse));
  if (wanted[kGradNorm]) store(value[kGradNorm], sqrt(fma(rest, rest, rest_sq)) * inverse);
  if (wanted[kSumSquares])
    store(value[kSumSquares], fma(target_e, target_e, rest_sq) * inverse * inverse);
  if (wanted[kMaxProb]) store(value[kMaxProb], inverse);
  if (wanted[kMargin]) {
    const Vec second_t = (load(group.second) - load(group.maximum)) * splat(plan.power_scale);
    store(value[kMargin], (one - exp2_clamped(clamp_power(second_t))) * inverse);
  }
  if (wanted[kLogSumExp])
    store(value[kLogSumExp], fma(load(group.maximum), splat(args.inverse_temperature), log_total));

  bool any_ignored = false;
  for (int i = 0; i < count; ++i) any_ignored |= group.ignored[i];
  if (any_ignored)
    for (int k = 0; k < kStatistics; ++k)
      for (int i = 0; wanted[k] && i < count; ++i)
        if (group.ignored[i]) value[k][i] = 0.0f;

  float totals[kLanes];
  store(totals, total);
  if (args.argmax)
    for (int i = 0; i < count; ++i)
      args.argmax[row + i] = group.ignored[i] ? 0 : totals[i] != totals[i] ? -1 : group.argmax[i];
  if (args.saved_maximum) {
    std::memcpy(args.saved_maximum + row, group.maximum, sizeof(float) * count);
    std::memcpy(args.saved_total + row, totals, sizeof(float) * count);
  }
  for (int k = 0; k < kStatistics; ++k)
    if (args.outputs[k]) std::memcpy(args.outputs[k] + row, value[k], sizeof(float) * count);
  if (!args.mask) return;

  Vec sum = zero;
  for (int k = 0; k < kStatistics; ++k)
    if (args.weights[k] != 0.0f) sum = fma(splat(args.weights[k]), load(value[k]), sum);
  float significance[kLanes];
  store(significance, sum);
  for (int i = 0; i < count; ++i) {
    if (args.offset && !group.ignored[i]) significance[i] += args.offset[row + i];
    const float s = significance[i];
    result.invalid += s != s;
    bool keep = s > args.threshold;  // false for NaN
    if (args.weight) {
      // In double, so that the probability agrees with the reference's to the last bit or nearly.
      double p = 1.0 / (1.0 + std::exp(-(double(s) - args.threshold) / args.gate_temperature));
      p = p < args.p_min ? args.p_min : p;
      keep = philox_uniform(args.seed, args.step, uint64_t(row + i)) < p;  // false for NaN
      args.weight[row + i] = keep && !group.ignored[i] ? float(1.0 / p) : 0.0f;
    }
    args.mask[row + i] = keep && !group.ignored[i];
  }
  std::memcpy(args.significance + row, significance, sizeof(float) * count);
}
