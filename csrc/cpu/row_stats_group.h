// The sums of a group of rows, however they were read, and the outputs and decisions made of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "row_stats_plan.h"
#include "sparse_kernels/cpu/philox.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_math.h"

namespace sparse_kernels {

// The sums of up to kRows rows.
template <class Vec>
struct alignas(64) Group {
  using Real = typename Vec::Real;
  static constexpr int kRows = 8 * Vec::kLanes;

  Real maximum[kRows];  // of the logits
  Real rest[kRows];
  Real rest_d[kRows];
  Real target_d[kRows];
  Real second[kRows];            // second largest logit; only where the margin is requested
  Real mean[kRows];              // of the logits, minus the maximum; only with label smoothing
  double rest_in_double[kRows];  // rest, and
  double rest_sq[kRows];         // these: only where plan.in_double
  int64_t argmax[kRows];         // only where requested
  uint8_t ignored[kRows];        // 1 or 0
  bool any_ignored = false;

  void ignore(int row) {  // any finite values: finish() writes 0
    maximum[row] = rest[row] = rest_d[row] = target_d[row] = second[row] = mean[row] = 0;
    rest_in_double[row] = rest_sq[row] = 0;
    argmax[row] = 0;
    ignored[row] = 1;
    any_ignored = true;
  }
};

// The length of a whole vector is a constant of the compiler's, without a call.
template <int kLanes, class Real>
static inline void copy_rows(void* out, int64_t row, const Real* values, int count) {
  Real* const rows = static_cast<Real*>(out) + row;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) std::memcpy(rows + i, values + i, sizeof(Real) * kLanes);
  for (; i < count; ++i) rows[i] = values[i];
}

// The requested statistics of a group's rows, vector by vector in several short loops: each step
// waits for the one before, and a processor has room for several vectors of a short loop, while one
// vector's steps from the sums to the decision are too many.
template <class Vec>
struct GroupStatistics {
  using Real = typename Vec::Real;
  static constexpr int kLanes = Vec::kLanes, kRows = Group<Vec>::kRows;

  const RowStatsArgs& args;
  const Plan<Vec>& plan;
  const Group<Vec>& group;
  const int64_t row;  // the first
  const int count, lanes = (count + kLanes - 1) / kLanes * kLanes;

  alignas(64) Real value[kStatistics][kRows];
  alignas(64) Real total[kRows];     // S
  alignas(64) Real target_e[kRows];  // e_y
  alignas(64) Real significance[kRows];

  GroupStatistics(const RowStatsArgs& args_, const Plan<Vec>& plan_, const Group<Vec>& group_,
                  int64_t row_, int count_)
      : args(args_), plan(plan_), group(group_), row(row_), count(count_) {}

  template <class Step>
  __attribute__((always_inline)) inline void each_vector(const Step& step) const {
    for (int i = 0; i < lanes; i += kLanes) step(i);
  }

  // always_inline: finish() is one function, in three parts for the reader.
  __attribute__((always_inline)) inline void compute() {
    const Vec zero = Vec::splat(0), one = Vec::splat(1);
    const Vec beta = Vec::splat(Real(args.inverse_temperature));
    const Vec flush_below = Vec::splat(Approximation<Vec>::kFlushBelow);
    const Exponential<Vec> exponential = plan.exponential;
    alignas(64) Real inverse[kRows], total_minus_one[kRows], log_total[kRows];
    each_vector([&](int i) {
      const Vec found = Vec::load(group.rest + i);
      const Vec rest = select_ge(flush_below, found, zero, found);  // NaN stays
      const Vec e = exponential(exponential.clamp(Vec::load(group.target_d + i)));
      const Vec sum = rest + e;
      store(target_e + i, e);
      store(total + i, sum);
      store(inverse + i, one / sum);
      store(total_minus_one + i, rest + (e - one));
    });
    each_vector([&](int i) {
      store(log_total + i, vec_log1p(Vec::load(total_minus_one + i), Vec::load(inverse + i)));
    });

    // Differences are by fms(), which no vector rounds twice.
    const auto& requested = plan.requested;
    if (requested[kLoss])
      each_vector([&](int i) {
        store(value[kLoss] + i,
              zero - fms(Vec::load(group.target_d + i), beta, Vec::load(log_total + i)));
      });
    if (plan.smoothed) smooth(log_total);
    if (requested[kEntropy])
      each_vector([&](int i) {
        const Vec found = Vec::load(group.rest + i);
        const Vec rest_d = select_ge(flush_below, found, zero, Vec::load(group.rest_d + i));
        const Vec target_d = exponential.clamp(Vec::load(group.target_d + i));
        const Vec mean_d = fma(Vec::load(target_e + i), target_d, rest_d) * Vec::load(inverse + i);
        store(value[kEntropy] + i, zero - fms(mean_d, beta, Vec::load(log_total + i)));
      });
    if (plan.in_double) compute_in_double();
    if (requested[kLogSumExp])
      each_vector([&](int i) {
        store(value[kLogSumExp] + i,
              fms(Vec::load(group.maximum + i), beta, zero - Vec::load(log_total + i)));
      });
  }

  void smooth(const Real* log_total) {
    const Vec minus_beta = Vec::splat(Real(-args.inverse_temperature));
    const Vec smoothing = Vec::splat(Real(args.label_smoothing));
    const Vec remainder = Vec::splat(Real(1.0 - args.label_smoothing));
    each_vector([&](int i) {
      // Where all logits are equal, their mean is not left to a sum, which may have overflowed.
      const Vec mean = select_ge(Vec::load(total + i), Vec::splat(Real(args.classes)),
                                 Vec::splat(0), Vec::load(group.mean + i));
      const Vec uniform = fma(mean, minus_beta, Vec::load(log_total + i));
      store(value[kLoss] + i, fma(smoothing, uniform, remainder * Vec::load(value[kLoss] + i)));
    });
  }

  // A float's roundings would add up to more than PyTorch's own.
  void compute_in_double() {
    const Real* const e = target_e;
    double r[kRows], sq[kRows];
    for (int i = 0; i < lanes; ++i) {
      const bool nothing = group.rest_in_double[i] <= Approximation<Vec>::kFlushBelow;
      r[i] = nothing ? 0.0 : group.rest_in_double[i];
      sq[i] = nothing ? 0.0 : group.rest_sq[i];
    }
    const auto per_row = [&](Statistic k, const auto& f) {
      if (!plan.requested[k]) return;
      for (int i = 0; i < lanes; ++i) value[k][i] = Real(f(i, r[i] + e[i]));
    };
    per_row(kGradNorm, [&](int i, double s) { return std::sqrt(r[i] * r[i] + sq[i]) / s; });
    per_row(kSumSquares, [&](int i, double s) { return (double(e[i]) * e[i] + sq[i]) / (s * s); });
    per_row(kMaxProb, [&](int, double s) { return 1.0 / s; });
    if (plan.requested[kMargin]) {
      alignas(64) Real second[kRows];
      each_vector([&](int i) {
        const Vec second_d = Vec::load(group.second + i) - Vec::load(group.maximum + i);
        store(second + i, plan.exponential(plan.exponential.clamp(second_d)));
      });
      per_row(kMargin, [&](int i, double s) { return (1.0 - second[i]) / s; });
    }
  }

  __attribute__((always_inline)) inline void write() {
    if (group.any_ignored) {
      const auto replace = [&](Real* values, Real with) {  // whatever the row holds
        for (int i = 0; i < lanes; ++i) values[i] = group.ignored[i] ? with : values[i];
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
  __attribute__((always_inline)) inline void decide(RowStatsResult& result) {
    const Vec zero = Vec::splat(0), one = Vec::splat(1);
    each_vector([&](int i) {  // NaN for an invalid row, though all weights be 0
      store(significance + i, zero * Vec::load(total + i));
    });
    for (int k = 0; k < kStatistics; ++k) {
      if (args.weights[k] == 0.0) continue;
      const Vec weight = Vec::splat(Real(args.weights[k]));
      each_vector([&](int i) {
        store(significance + i, fma(weight, Vec::load(value[k] + i), Vec::load(significance + i)));
      });
    }
    if (args.offset)
      for (int i = 0; i < count; ++i)
        if (!group.ignored[i]) significance[i] += static_cast<const Real*>(args.offset)[row + i];
    // Without branches, since the decisions cannot be predicted. NaN is not above the threshold.
    const Vec threshold = Vec::splat(Real(args.threshold));
    alignas(64) Real above[kRows];
    Vec any_invalid = zero;
    each_vector([&](int i) {
      const Vec found = Vec::load(significance + i);
      store(above + i, select_ge(threshold, found, zero, select_ge(found, threshold, one, zero)));
      any_invalid = max(any_invalid, select_ge(found, found, zero, one));
    });
    alignas(64) uint8_t mask[kRows];
    for (int i = 0; i < lanes; ++i) mask[i] = uint8_t(above[i]);
    if (group.any_ignored)
      for (int i = 0; i < lanes; ++i) mask[i] &= uint8_t(group.ignored[i] ^ 1);
    if (reduce_max(any_invalid) > 0)
      for (int i = 0; i < count; ++i) result.invalid += significance[i] != significance[i];
    copy_rows<kLanes>(args.mask, row, mask, count);
    if (args.weight)
      for (int i = 0; i < count; ++i) draw(i);
    copy_rows<kLanes>(args.significance, row, significance, count);
  }

  void draw(int i) const {
    // In double, so that the probability agrees with the reference's to nearly the last bit.
    const double above = double(significance[i]) - args.threshold;
    double p = 1.0 / (1.0 + std::exp(-above / args.gate_temperature));
    p = p < args.p_min ? args.p_min : p;
    const uint64_t limit = group.ignored[i] ? 0 : draw_limit(float(p));
    const bool keep = philox(args.seed, args.step, uint64_t(row + i)).word[0] < limit;
    args.mask[row + i] = keep;
    args.weight[row + i] = keep ? draw_weight(limit) : 0.0f;
  }
};

// Turns rows [row, row + count) of the group into outputs and decisions.
template <class Vec>
inline void finish(const RowStatsArgs& args, const Plan<Vec>& plan, const Group<Vec>& group,
                   int64_t row, int count, RowStatsResult& result) {
  GroupStatistics<Vec> statistics(args, plan, group, row, count);
  statistics.compute();
  statistics.write();
  if (args.mask) statistics.decide(result);
}

}  // namespace sparse_kernels
