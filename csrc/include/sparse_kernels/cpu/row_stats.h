// Row statistics and the gate's decision, in one pass over the logits.
//
// Bytes: the logits once (a block of a row is read twice, the second time from L1), and 4 or 8
// bytes per row for each output.
//
// Let m be the row's maximum, d_j = x_j - m, T the temperature, e_j = exp(d_j / T), y the target.
// One pass accumulates
//   rest    = sum_{j != y} e_j
//   rest_d  = sum_{j != y} e_j d_j
//   rest_sq = sum_{j != y} e_j^2
// and from these, with S = rest + e_y and log(S) = log1p(rest + (e_y - 1)), follow
//   loss      = log(S) - d_y / T
//   entropy   = log(S) - (rest_d + e_y d_y) / (S T)
//   grad_norm = sqrt(rest^2 + rest_sq) / S
// When a block raises the maximum by delta, the earlier sums are rescaled with f = exp(-delta / T):
//   rest_d' = f (rest_d - delta rest),  rest' = f rest,  rest_sq' = f^2 rest_sq
// Two parts of a row are merged in the same way.
// The target stays out of the sums because 1 - p_y and 1 - 2 p_y + sum p^2 cancel on a confident
// row; there e_y - 1 is 0, so the logarithm keeps even a small rest. d stays in the logits' own
// units, so that the rounding of log2(e) / T enters the exponent alone and never the result.
//
// Hazards: NaN must survive every maximum and clamp (where it is lost, an invalid row may be kept
// in silence); -inf must add 0 and never 0 * -inf. Comments mark where each is handled.
#pragma once

#include <cstdint>

namespace sparse_kernels {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// The statistics that the significance can weigh, in the order of RowStatsArgs::weights.
enum Statistic : int {
  kLoss,
  kEntropy,
  kGradNorm,
  kSumSquares,
  kMaxProb,
  kMargin,
  kLogSumExp,
  kStatistics
};

// The dimensions of the rows, outermost first: where the logits of each row begin.
struct RowLayout {
  static constexpr int kDimensions = 4;
  int dimensions;
  int64_t size[kDimensions];    // the first is not read
  int64_t stride[kDimensions];  // in elements
};

// The inputs that forward and backward share. A pointer to void points to values of the logits'
// type or, for outputs and all values of which there is one per row, to double where the logits are
// float64 and to float otherwise.
struct RowStatsInput {
  const void* logits;  // [rows, classes] by layout and class_stride
  DType dtype;
  int64_t rows;
  int64_t classes;
  int64_t class_stride;  // in elements
  RowLayout layout;
  const void* targets;  // [rows], contiguous; int64 or int32
  bool targets_are_int32;
  int64_t ignore_index;
  double inverse_temperature;
  double softcap;  // 0: none
  double label_smoothing;
};

static inline int64_t target_of(const RowStatsInput& args, int64_t row) {
  return args.targets_are_int32 ? static_cast<const int32_t*>(args.targets)[row]
                                : static_cast<const int64_t*>(args.targets)[row];
}

struct RowStatsArgs : RowStatsInput {
  void* outputs[kStatistics];  // [rows] each; null where not requested
  int64_t* argmax;             // [rows], or null
  void* saved_maximum;         // [rows], of the capped logits, for the backward; or null
  void* saved_total;           // [rows], S, for the backward

  // The gate's decision; omitted where mask is null.
  uint8_t* mask;                // [rows]
  void* significance;           // [rows]
  float* weight;                // [rows], philox.h's draw_weight; null for a plain threshold
  const void* offset;           // [rows] or null
  double weights[kStatistics];  // of each statistic in the significance
  double threshold;
  double gate_temperature;
  double p_min;
  uint64_t seed;
  uint64_t step;
};

struct RowStatsBackwardArgs : RowStatsInput {  // the forward has checked the targets
  void* gradient;                              // every element is written; the logits' type
  int64_t gradient_class_stride;
  RowLayout gradient_layout;
  const void* maximum;  // [rows], saved by the forward
  const void* total;
  const void* entropy;           // null without entropy_gradient
  const void* loss_gradient;     // [rows], or null for zeros
  const void* entropy_gradient;  // [rows], or null for zeros
  // 0 where all rows have the same, which is one number in memory.
  int64_t loss_gradient_step = 1;
  int64_t entropy_gradient_step = 1;
  bool zeroed = false;  // the gradient's memory holds zeros, so that nothing need be written there
};

struct RowStatsResult {
  int64_t bad_target_row = -1;  // lowest row whose target is out of range; outputs are then invalid
  int64_t invalid = 0;          // number of rows whose significance is NaN
};

// All rows, in parallel, with the instruction set in use.
RowStatsResult row_stats(const RowStatsArgs& args);
void row_stats_backward(const RowStatsBackwardArgs& args);

}  // namespace sparse_kernels
