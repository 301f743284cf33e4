// The law that moves a gate's threshold: scalar arithmetic on a packed state, for any processor.
// The specification, with the derivation, is sparse_kernels/control_law.py; names are the same.
//
// Sums are kept in double, so that they may be taken in any order; the law itself is float, as its
// state is. A kernel accumulates sums over rows, merges them, and one thread calls control_advance.
//
// Hazards: a threshold of -inf makes every excess infinite, so rows that do not count are left out
// by selection, never by a factor of 0; NaN is kept out where a row is added, and a threshold that
// is not finite is never stored but by a set-point of 1.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define SPARSE_KERNELS_HOST_DEVICE __host__ __device__
#else
#define SPARSE_KERNELS_HOST_DEVICE
#endif

namespace sparse_kernels {

// The order of control_law.py's VALUES and COUNTERS: float32 and int64.
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

// What a batch's rows add up to. A row counts by its mass, 1 where the set-point is a rate. Some
// hundreds of rows of mass 1 may be summed in float, on their way to a sum in double.
template <class Real>
struct ControlSumsOf {
  Real mass = 0;      // of the valid rows
  Real mass_sq = 0;   // sum of their squares
  Real kept = 0;      // mass of the rows kept; a soft gate's expectation
  Real selected = 0;  // mass above the threshold
  Real rejected = 0;  // the other valid mass
  Real finite = 0;    // mass of the rows of finite significance, which alone count below
  Real total = 0;     // of mass times significance
  Real excess = 0;    // of mass times the way above the threshold
  Real deficit = 0;   // of mass times the way below it
  float low = INFINITY;
  float high = -INFINITY;
  int64_t invalid = 0;  // rows of NaN
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

// Adds a row that is not ignored. A mass of NaN, infinity, 0 or less does not count.
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

// One step of the law. ``overflow``: rows that the batch selected beyond the gate's capacity.
SPARSE_KERNELS_HOST_DEVICE inline void control_advance(float* values, int64_t* counters,
                                                       const ControlSums& sums, float setpoint,
                                                       int64_t overflow) {
  constexpr float kPositionVariance0 = 4.0f, kDriftVariance0 = 3e-4f;
  constexpr float kPositionNoise = 5e-6f, kDriftNoise = 1e-8f;
  constexpr float kSmoothing = 0.1f, kJump = 3.0f, kJumpOfDrift = 0.01f;
  constexpr float kUnitGain = 0.2f, kReach = 0.8f, kDriftLimit = 1.0f;
  constexpr float kSurpriseLimit = 11.0f, kSurprisePerBatch = 6.0f, kEdge = 1e-6f;
  constexpr float kRateSmoothing = 0.05f, kMissSmoothing = 1.0f / 32, kMissLimit = 0.6f;
  constexpr float kTiny = 1.17549435e-38f;

  const int64_t steps = counters[kSteps]++;
  counters[kInvalid] += sums.invalid;
  // The batch that an automatic start keeps whole says nothing about the capacity.
  const bool starting = values[kRate] != values[kRate] && values[kThreshold] == -INFINITY;
  if (!starting) counters[kOverflow] += overflow;
  if (!(sums.mass > 0)) return;

  const float p = setpoint, q = 1.0f - p;
  const double all = sums.mass;
  const float rate = float(sums.kept / all);
  const float gain = fmaxf(1.0f / (float(steps) + 1.0f), kRateSmoothing);
  const float observed = values[kRate];
  values[kRate] = observed != observed ? rate : observed + gain * (rate - observed);
  if (!(p < 1.0f)) {  // everything, and a fresh start once less is wanted
    values[kThreshold] = -INFINITY;
    values[kPositionVariance] = kPositionVariance0;
    values[kDriftVariance] = kDriftVariance0;
    values[kDrift] = values[kCovariance] = values[kUnit] = values[kError] = 0.0f;
    values[kErrorVariance] = values[kSurprise] = 0.0f;
    values[kMisses] -= kMissSmoothing * values[kMisses];
    return;
  }

  const float rows = float(all / sums.mass_sq * all);  // as many equal ones as would be as noisy
  const float told = rows * p * q;
  const float w = told / (told + 1.0f), blind = 1.0f / (told + 1.0f), noise = w * blind;
  const float left_out = float((all - sums.kept) / all);
  const float error =
      logf((w * rate + blind * p) * q / ((w * left_out + blind * q) * p)) + (0.5f - p) * noise;

  const float selected = float(sums.selected / all), rejected = float(sums.rejected / all);
  const bool none = selected < kEdge * p;
  const bool edge = none || rejected < kEdge * q || values[kThreshold] == -INFINITY;
  const float odds = -rows * logf(none ? q : p);
  float surprise = edge ? values[kSurprise] + fminf(odds, kSurprisePerBatch) : 0.0f;
  const bool first = values[kUnit] == 0.0f;
  const bool restart = surprise > kSurpriseLimit || (edge && first);

  float smooth = values[kError] + kSmoothing * (error - values[kError]);
  float smooth_noise = (1 - kSmoothing) * (1 - kSmoothing) * values[kErrorVariance] +
                       kSmoothing * kSmoothing * noise;
  const float unexplained = smooth * smooth - kJump * kJump * smooth_noise;
  const float growth = fmaxf(unexplained / values[kPositionVariance], 1.0f);
  float pp = growth * values[kPositionVariance], pd = growth * values[kCovariance];
  float dd = fmaxf(growth * values[kDriftVariance], kJumpOfDrift * unexplained);

  const float spread = w * pp + blind;
  const float k_p = pp / spread, k_i = pd / spread, left = blind / spread;
  dd -= k_i * w * pd;
  pp *= left;
  pd *= left;
  pp = pp + 2 * pd + dd + kPositionNoise;
  pd = pd + dd;
  dd = dd + kDriftNoise;

  const float above = float(sums.excess / all / fmaxf(selected, kTiny));
  const float below = float(sums.deficit / all / fmaxf(rejected, kTiny));
  const float measured = fminf(above, below);
  float unit = values[kUnit];
  if (!edge) unit = first ? measured : unit + control_clamp(k_p, kUnitGain, 1) * (measured - unit);
  float drift = control_clamp(values[kDrift] + k_i * error, -kDriftLimit, kDriftLimit);
  float threshold;
  if (restart) {
    const float mean = sums.finite > 0 ? float(sums.total / sums.finite) : 0.0f;
    threshold = sums.low - (mean - sums.low) * logf(p);
    if (!(threshold < sums.high)) threshold = sums.high + (sums.high - mean) * log1pf(-p);
  } else {
    threshold = values[kThreshold] +
                control_clamp(unit * (k_p * error + drift), -kReach * below, kReach * above);
  }
  if (fabsf(threshold) < INFINITY) values[kThreshold] = threshold;

  const float missed = restart || unexplained > 0.0f ? 1.0f : 0.0f;
  values[kMisses] += kMissSmoothing * (missed - values[kMisses]);
  if (values[kMisses] > kMissLimit) ++counters[kSaturated];

  if (restart) {  // keeps the threshold, the misses and the rate alone
    drift = pd = unit = smooth = smooth_noise = surprise = 0.0f;
    pp = kPositionVariance0;
    dd = kDriftVariance0;
  }
  values[kDrift] = drift;
  values[kPositionVariance] = pp;
  values[kCovariance] = pd;
  values[kDriftVariance] = dd;
  values[kUnit] = unit;
  values[kError] = smooth;
  values[kErrorVariance] = smooth_noise;
  values[kSurprise] = surprise;
}

}  // namespace sparse_kernels
