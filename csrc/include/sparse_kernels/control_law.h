// The control law of the gate's threshold: scalar arithmetic on a packed state, for any processor.
// sparse_kernels/control_law.py is the specification and has the derivation.
//
// A kernel sums over the rows of a batch (control_add_row), merges the sums (control_merge), and
// one thread takes one step of the law (control_advance). Sums are in double, so that their order
// does not matter; the law is in float, as its state is.
//
// Hazards: with a threshold of -inf every excess is infinite, so rows that do not count are left
// out by a branch, never by a factor of 0. NaN is excluded where a row is added. A threshold that
// is not finite is stored only where the set-point is 1.
#pragma once

#include <math.h>
#include <stdint.h>  // not <cmath> and <cstdint>: device code calls the functions of the global namespace

#ifdef __CUDACC__
#define SPARSE_KERNELS_HOST_DEVICE __host__ __device__
#else
#define SPARSE_KERNELS_HOST_DEVICE
#endif

namespace sparse_kernels {

// The state of a controller, float32 values and int64 counters, in the order of
// sparse_kernels/types.py.
enum ControlValue : int {
  kThreshold,
  kDrift,
  kPositionVariance,
  kCovariance,
  kDriftVariance,
  kUnit,
  kError,
  kErrorVariance,
  kSurprise,
  kMisses,
  kRate,
  kControlValues
};
enum ControlCounter : int { kSteps, kSaturated, kInvalid, kOverflow, kControlCounters };

struct ControlSettings {
  float gate_temperature;  // 0: a plain threshold
  float p_min;
};

// Sums over the rows of a batch. Each row is weighted by its mass, which is 1 where the set-point
// is a rate. A few hundred rows of mass 1 may be summed in float before they are added to a sum in
// double.
template <class Real>
struct ControlSumsOf {
  Real mass = 0;      // of the valid rows
  Real mass_sq = 0;   // sum of the squares of these masses
  Real kept = 0;      // mass of the rows kept; its expectation for a soft gate
  Real selected = 0;  // mass above the threshold
  Real rejected = 0;  // the other valid mass
  Real finite = 0;    // mass of the rows with finite significance; only these count below
  Real total = 0;     // of mass times significance
  Real excess = 0;    // of mass times the distance above the threshold
  Real deficit = 0;   // of mass times the distance below it
  float low = INFINITY;
  float high = -INFINITY;
  int64_t invalid = 0;  // number of rows whose significance is NaN
};
using ControlSums = ControlSumsOf<double>;

template <class Real, class Part>
SPARSE_KERNELS_HOST_DEVICE inline void control_merge(ControlSumsOf<Real>& sums,
                                                     const ControlSumsOf<Part>& other) {
  sums.mass += other.mass;
  sums.mass_sq += other.mass_sq;
  sums.kept += other.kept;
  sums.selected += other.selected;
  sums.rejected += other.rejected;
  sums.finite += other.finite;
  sums.total += other.total;
  sums.excess += other.excess;
  sums.deficit += other.deficit;
  sums.low = fminf(sums.low, other.low);
  sums.high = fmaxf(sums.high, other.high);
  sums.invalid += other.invalid;
}

// Adds a row that is not ignored. A row whose mass is NaN, infinite, 0 or less does not count.
template <class Real>
SPARSE_KERNELS_HOST_DEVICE inline void control_add_row(ControlSumsOf<Real>& sums,
                                                       float significance, float mass,
                                                       float threshold,
                                                       const ControlSettings& settings) {
  if (significance != significance) {
    ++sums.invalid;
    return;
  }
  if (!(mass > 0.0f && mass < INFINITY)) return;
  // -inf is below even a threshold of -inf.
  const float above = significance == -INFINITY ? -INFINITY : significance - threshold;
  const bool finite = fabsf(significance) < INFINITY;
  sums.mass += mass;
  sums.mass_sq += Real(mass) * mass;
  float excess, deficit;
  if (settings.gate_temperature > 0.0f) {
    const float scaled = above / settings.gate_temperature;
    const float e = expf(-fabsf(scaled));  // never above 1
    const float likely = 1.0f / (1.0f + e), unlikely = e / (1.0f + e);
    const float near = log1pf(e) * settings.gate_temperature;
    const float p = scaled > 0.0f ? likely : unlikely;
    sums.selected += Real(mass) * p;
    sums.kept += Real(mass) * fmaxf(p, settings.p_min);
    sums.rejected += Real(mass) * (scaled > 0.0f ? unlikely : likely);
    excess = near + fmaxf(above, 0.0f);
    deficit = near + fmaxf(-above, 0.0f);
  } else {
    const Real selected = above > 0.0f ? mass : 0.0f;
    sums.selected += selected;
    sums.kept += selected;
    sums.rejected += above > 0.0f ? 0.0f : mass;
    excess = fmaxf(above, 0.0f);
    deficit = fmaxf(-above, 0.0f);
  }
  if (!finite) return;
  sums.finite += mass;
  sums.total += Real(mass) * significance;
  sums.excess += Real(mass) * excess;
  sums.deficit += Real(mass) * deficit;
  sums.low = fminf(sums.low, significance);
  sums.high = fmaxf(sums.high, significance);
}

SPARSE_KERNELS_HOST_DEVICE inline float control_clamp(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

namespace control_constants {

// control_law.py describes each of them; variances and noise are in logits^2 of the rate.
constexpr float kPositionVariance0 = 4.0f, kDriftVariance0 = 3e-4f;
constexpr float kPositionNoise = 5e-6f, kDriftNoise = 1e-8f;
constexpr float kSmoothing = 0.1f, kJump = 3.0f, kJumpOfDrift = 0.01f;
constexpr float kUnitGain = 0.2f, kReach = 0.8f, kDriftLimit = 1.0f;
constexpr float kSurpriseLimit = 11.0f, kSurprisePerBatch = 6.0f, kEdge = 1e-6f;
constexpr float kRateSmoothing = 0.05f, kMissSmoothing = 1.0f / 32, kMissLimit = 0.6f;
constexpr float kLeastSetPoint = 1e-12f;
constexpr float kTiny = 1.17549435e-38f;

}  // namespace control_constants

// A set-point of 1 keeps everything, and starts afresh once less is requested.
SPARSE_KERNELS_HOST_DEVICE inline void control_keep_everything(float* values) {
  using namespace control_constants;
  values[kThreshold] = -INFINITY;
  values[kPositionVariance] = kPositionVariance0;
  values[kDriftVariance] = kDriftVariance0;
  values[kDrift] = values[kCovariance] = values[kUnit] = values[kError] = 0.0f;
  values[kErrorVariance] = values[kSurprise] = 0.0f;
  values[kMisses] -= kMissSmoothing * values[kMisses];
}

// The error of the rate in logits, shrunk to the set-point by the share that a batch does not tell.
struct ControlError {
  float w, shrinkage;  // w + shrinkage = 1
  float noise;         // variance of the error
  float error;

  SPARSE_KERNELS_HOST_DEVICE ControlError(float p, float rows, float rate, float left_out) {
    const float q = 1.0f - p;
    const float information = rows * p * q;
    w = information / (information + 1.0f);
    shrinkage = 1.0f / (information + 1.0f);
    noise = w * shrinkage;
    error = logf((w * rate + shrinkage * p) * q / ((w * left_out + shrinkage * q) * p)) +
            (0.5f - p) * noise;
  }
};

// The covariance of position and drift, and the gains, of the Kalman filter that sees the error.
struct ControlFilter {
  float pp, pd, dd;
  float k_p, k_i;

  // Grows the covariance until it explains the `unexplained` part of the squared error, then
  // updates it with the batch and predicts the next.
  SPARSE_KERNELS_HOST_DEVICE ControlFilter(const float* values, const ControlError& batch,
                                           float unexplained) {
    using namespace control_constants;
    const float growth = fmaxf(unexplained / values[kPositionVariance], 1.0f);
    pp = growth * values[kPositionVariance];
    pd = growth * values[kCovariance];
    dd = fmaxf(growth * values[kDriftVariance], kJumpOfDrift * unexplained);

    const float spread = batch.w * pp + batch.shrinkage;
    k_p = pp / spread;
    k_i = pd / spread;
    const float remaining = batch.shrinkage / spread;  // 1 - w k_p
    dd -= k_i * batch.w * pd;
    pp *= remaining;
    pd *= remaining;
    pp = pp + 2 * pd + dd + kPositionNoise;
    pd = pd + dd;
    dd = dd + kDriftNoise;
  }
};

// The threshold of a restart: the p-quantile of an exponential distribution that begins at the
// smallest significance or, where that is above the greatest, of one that ends there.
SPARSE_KERNELS_HOST_DEVICE inline float control_restart_threshold(const ControlSums& sums,
                                                                  float p) {
  const float mean = sums.finite > 0 ? float(sums.total / sums.finite) : 0.0f;
  const float threshold = sums.low - (mean - sums.low) * logf(p);
  if (threshold < sums.high) return threshold;
  return sums.high + (sums.high - mean) * log1pf(-p);
}

// One step of the law. `overflow`: rows that the batch selected beyond the gate's capacity.
SPARSE_KERNELS_HOST_DEVICE inline void control_advance(float* values, int64_t* counters,
                                                       const ControlSums& sums, float setpoint,
                                                       int64_t overflow) {
  using namespace control_constants;
  const int64_t steps = counters[kSteps]++;
  counters[kInvalid] += sums.invalid;
  // An automatic start keeps the first batch whole, so its overflow does not count.
  const bool starting = values[kRate] != values[kRate] && values[kThreshold] == -INFINITY;
  if (!starting) counters[kOverflow] += overflow;
  // A set-point of NaN says nothing, and 0 or less is the least one: their logits would stay in the
  // drift for ever.
  if (!(sums.mass > 0) || setpoint != setpoint) return;

  const float p = fmaxf(setpoint, kLeastSetPoint), q = 1.0f - p;
  const double all = sums.mass;
  const float rate = float(sums.kept / all);
  const float gain = fmaxf(1.0f / (float(steps) + 1.0f), kRateSmoothing);
  const float observed = values[kRate];
  values[kRate] = observed != observed ? rate : observed + gain * (rate - observed);
  if (!(p < 1.0f)) {
    control_keep_everything(values);
    return;
  }

  const float rows = float(all / sums.mass_sq * all);  // equal rows that would be as noisy
  const ControlError batch(p, rows, rate, float((all - sums.kept) / all));

  // At an edge, where nothing or everything is selected, the error carries no information. A run of
  // such batches that is too improbable restarts the controller.
  const float selected = float(sums.selected / all), rejected = float(sums.rejected / all);
  const bool none = selected < kEdge * p;
  const bool edge = none || rejected < kEdge * q || values[kThreshold] == -INFINITY;
  const float improbability = -rows * logf(none ? q : p);
  float surprise = edge ? values[kSurprise] + fminf(improbability, kSurprisePerBatch) : 0.0f;
  const bool first = values[kUnit] == 0.0f;
  const bool restart = surprise > kSurpriseLimit || (edge && first);

  float smooth = values[kError] + kSmoothing * (batch.error - values[kError]);
  float smooth_noise = (1 - kSmoothing) * (1 - kSmoothing) * values[kErrorVariance] +
                       kSmoothing * kSmoothing * batch.noise;
  const float unexplained = smooth * smooth - kJump * kJump * smooth_noise;
  ControlFilter filter(values, batch, unexplained);

  const float above = float(sums.excess / all / fmaxf(selected, kTiny));
  const float below = float(sums.deficit / all / fmaxf(rejected, kTiny));
  const float measured = fminf(above, below);
  float unit = values[kUnit];
  if (!edge)
    unit = first ? measured : unit + control_clamp(filter.k_p, kUnitGain, 1) * (measured - unit);
  float drift = control_clamp(values[kDrift] + filter.k_i * batch.error, -kDriftLimit, kDriftLimit);
  const float threshold =
      restart ? control_restart_threshold(sums, p)
              : values[kThreshold] + control_clamp(unit * (filter.k_p * batch.error + drift),
                                                   -kReach * below, kReach * above);
  if (fabsf(threshold) < INFINITY) values[kThreshold] = threshold;

  const float missed = restart || unexplained > 0.0f ? 1.0f : 0.0f;
  values[kMisses] += kMissSmoothing * (missed - values[kMisses]);
  if (values[kMisses] > kMissLimit) ++counters[kSaturated];

  if (restart) {  // only the threshold, the misses and the rate are kept
    drift = filter.pd = unit = smooth = smooth_noise = surprise = 0.0f;
    filter.pp = kPositionVariance0;
    filter.dd = kDriftVariance0;
  }
  values[kDrift] = drift;
  values[kPositionVariance] = filter.pp;
  values[kCovariance] = filter.pd;
  values[kDriftVariance] = filter.dd;
  values[kUnit] = unit;
  values[kError] = smooth;
  values[kErrorVariance] = smooth_noise;
  values[kSurprise] = surprise;
}

}  // namespace sparse_kernels
