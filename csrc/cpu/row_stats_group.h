// The sums of kLanes rows, however they were read, and the outputs and decisions made of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "row_stats_plan.h"
#include "sparse_kernels/cpu/philox.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_math.h"

namespace sparse_kernels {

// The sums of kLanes rows.
template <class Vec>
struct alignas(64) Group {
  using Real = typename Vec::Real;
  static constexpr int kLanes = Vec::kLanes;

  Real maximum[kLanes];  // of the logits
  Real rest[kLanes];
  Real rest_d[kLanes];
  Real target_d[kLanes];
  Real second[kLanes];            // second largest logit; only where the margin is requested
  Real mean[kLanes];              // of the logits, minus the maximum; only with label smoothing
  double rest_in_double[kLanes];  // rest, and
  double rest_sq[kLanes];         // these: only where plan.in_double
  int64_t argmax[kLanes];         // only where requested
  uint8_t ignored[kLanes];        // 1 or 0
  bool any_ignored = false;

  void ignore(int lane) {  // any finite values: finish() writes 0
    maximum[lane] = rest[lane] = rest_d[lane] = target_d[lane] = second[lane] = mean[lane] = 0;
    rest_in_double[lane] = rest_sq[lane] = 0;
    argmax[lane] = 0;
    ignored[lane] = 1;
    any_ignored = true;
  }
};

// The length of a whole group is a constant of the compiler's, without a call.
template <int kLanes, class Real>
static inline void copy_rows(void* out, int64_t row, const Real* values, int count) {
  Real* const rows = static_cast<Real*>(out) + row;
  if (count == kLanes)
    std::memcpy(rows, values, sizeof(Real) * kLanes);
  else
    std::memcpy(rows, values, sizeof(Real) * count);
}

// The requested statistics of a group's rows.
template <class Vec>
struct GroupStatistics {
  using Real = typename Vec::Real;
  static constexpr int kLanes = Vec::kLanes;

  alignas(64) Real value[kStatistics][kLanes];
  alignas(64) Real total[kLanes];  // S

  // always_inline: finish() is one function, in three parts for the reader.
  __attribute__((always_inline)) inline void compute(const RowStatsArgs& args,
                                                     const Plan<Vec>& plan,
                                                     const Group<Vec>& group) {
    const Vec zero = Vec::splat(0), one = Vec::splat(1);
    const Vec minus_beta = Vec::splat(Real(-args.inverse_temperature));
    const Vec flush_below = Vec::splat(Approximation<Vec>::kFlushBelow);
    const Vec found = Vec::load(group.rest);
    const Vec rest = select_ge(flush_below, found, zero, found);  // NaN stays
    const Vec rest_d = select_ge(flush_below, found, zero, Vec::load(group.rest_d));
    const Vec target_d = Vec::load(group.target_d);
    const Vec target_clamped = plan.exponential.clamp(target_d);
    const Vec target_e = plan.exponential(target_clamped);
    const Vec sum = rest + target_e;
    const Vec inverse = one / sum;
    const Vec log_total = vec_log1p(rest + (target_e - one), inverse);

    const auto& requested = plan.requested;
    if (requested[kLoss]) {
      Vec loss = fma(target_d, minus_beta, log_total);
      if (plan.smoothed) {
        // Where all logits are equal, their mean is not left to a sum, which may have overflowed.
        const Vec mean =
            select_ge(sum, Vec::splat(Real(args.classes)), Vec::splat(0), Vec::load(group.mean));
        const Vec uniform = fma(mean, minus_beta, log_total);
        const Real smoothing = Real(args.label_smoothing);
        loss = fma(Vec::splat(smoothing), uniform,
                   Vec::splat(Real(1.0 - args.label_smoothing)) * loss);
      }
      store(value[kLoss], loss);
    }
    if (requested[kEntropy]) {
      const Vec mean_d = fma(target_e, target_clamped, rest_d) * inverse;
      store(value[kEntropy], fma(mean_d, minus_beta, log_total));
    }
    if (plan.in_double) compute_in_double(plan, group, target_e);
    if (requested[kLogSumExp])
      store(value[kLogSumExp],
            fma(Vec::load(group.maximum), Vec::splat(Real(args.inverse_temperature)), log_total));
    store(total, sum);
  }

  // A float's roundings would add up to more than PyTorch's own.
  void compute_in_double(const Plan<Vec>& plan, const Group<Vec>& group, Vec target_e) {
    alignas(64) Real e[kLanes];
    alignas(64) double r[kLanes], sq[kLanes];
    store(e, target_e);
    for (int i = 0; i < kLanes; ++i) {
      const bool nothing = group.rest_in_double[i] <= Approximation<Vec>::kFlushBelow;
      r[i] = nothing ? 0.0 : group.rest_in_double[i];
      sq[i] = nothing ? 0.0 : group.rest_sq[i];
    }
    const auto per_lane = [&](Statistic k, const auto& f) {
      if (!plan.requested[k]) return;
      for (int i = 0; i < kLanes; ++i) value[k][i] = Real(f(i, r[i] + e[i]));
    };
    per_lane(kGradNorm, [&](int i, double s) { return std::sqrt(r[i] * r[i] + sq[i]) / s; });
    per_lane(kSumSquares, [&](int i, double s) { return (double(e[i]) * e[i] + sq[i]) / (s * s); });
    per_lane(kMaxProb, [&](int, double s) { return 1.0 / s; });
    if (plan.requested[kMargin]) {
      const Vec second_d =
          plan.exponential.clamp(Vec::load(group.second) - Vec::load(group.maximum));
      alignas(64) Real second[kLanes];
      store(second, plan.exponential(second_d));
      per_lane(kMargin, [&](int i, double s) { return (1.0 - second[i]) / s; });
    }
  }

  // Writes the outputs of rows [row, row + count).
  __attribute__((always_inline)) inline void write(const RowStatsArgs& args, const Plan<Vec>& plan,
                                                   const Group<Vec>& group, int64_t row,
                                                   int count) {
    if (group.any_ignored) {
      const auto replace = [&](Real* values, Real with) {  // whatever the row holds
        for (int i = 0; i < kLanes; ++i) values[i] = group.ignored[i] ? with : values[i];
      };
      replace(total, 1);
      for (int k = 0; k < kStatistics; ++k)
        if (plan.requested[k]) replace(value[k], 0);
    }

    if (args.argmax)
      for (int i = 0; i < count; ++i)
        args.argmax[row + i] = group.ignored[i] ? 0 : total[i] != total[i] ? -1 : group.argmax[i];
    if (args.saved_maximum) {
      copy_rows<kLanes>(args.saved_maximum, row, group.maximum, count);
      copy_rows<kLanes>(args.saved_total, row, total, count);
    }
    for (int k = 0; k < kStatistics; ++k)
      if (args.outputs[k]) copy_rows<kLanes>(args.outputs[k], row, value[k], count);
  }

  // Weighs the statistics into the significance and decides which of the rows are kept.
  __attribute__((always_inline)) inline void decide(const RowStatsArgs& args,
                                                    const Group<Vec>& group, int64_t row, int count,
                                                    RowStatsResult& result) const {
    Vec sum = Vec::splat(0) * Vec::load(total);  // NaN for an invalid row, though all weights be 0
    for (int k = 0; k < kStatistics; ++k)
      if (args.weights[k] != 0.0)
        sum = fma(Vec::splat(Real(args.weights[k])), Vec::load(value[k]), sum);
    alignas(64) Real significance[kLanes];
    store(significance, sum);
    if (args.offset)
      for (int i = 0; i < count; ++i)
        if (!group.ignored[i]) significance[i] += static_cast<const Real*>(args.offset)[row + i];
    // Without branches, since the decisions cannot be predicted. NaN is not above the threshold.
    const Vec zero = Vec::splat(0), one = Vec::splat(1), found = Vec::load(significance);
    const Vec threshold = Vec::splat(Real(args.threshold));
    alignas(64) Real above[kLanes];
    store(above, select_ge(threshold, found, zero, select_ge(found, threshold, one, zero)));
    alignas(64) uint8_t mask[kLanes];
    for (int i = 0; i < kLanes; ++i) mask[i] = uint8_t(above[i]);
    if (group.any_ignored)
      for (int i = 0; i < kLanes; ++i) mask[i] &= uint8_t(group.ignored[i] ^ 1);
    if (reduce_max(select_ge(found, found, zero, one)) > 0)
      for (int i = 0; i < count; ++i) result.invalid += significance[i] != significance[i];
    copy_rows<kLanes>(args.mask, row, mask, count);
    if (args.weight)
      for (int i = 0; i < count; ++i) {
        // In double, so that the probability agrees with the reference's to nearly the last bit.
        const double above = double(significance[i]) - args.threshold;
        double p = 1.0 / (1.0 + std::exp(-above / args.gate_temperature));
        p = p < args.p_min ? args.p_min : p;
        const uint64_t limit = group.ignored[i] ? 0 : draw_limit(float(p));
        const bool keep = philox(args.seed, args.step, uint64_t(row + i)).word[0] < limit;
        args.mask[row + i] = keep;
        args.weight[row + i] = keep ? draw_weight(limit) : 0.0f;
      }
    copy_rows<kLanes>(args.significance, row, significance, count);
  }
};

// Turns rows [row, row + count) of the group into outputs and decisions.
template <class Vec>
inline void finish(const RowStatsArgs& args, const Plan<Vec>& plan, const Group<Vec>& group,
                   int64_t row, int count, RowStatsResult& result) {
  GroupStatistics<Vec> statistics;
  statistics.compute(args, plan, group);
  statistics.write(args, plan, group, row, count);
  if (args.mask) statistics.decide(args, group, row, count, result);
}

}  // namespace sparse_kernels
