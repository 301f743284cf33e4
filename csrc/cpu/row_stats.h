// Row statistics and the gate's decision, in one pass over the logits. No PyTorch here: pointers,
// sizes, strides.
//
// Bytes: the logits once (a block of a row is read twice, the second time from L1), and 4 bytes a
// row for each output.
//
// With m the row's maximum, c = log2(e) / temperature, t_j = (x_j - m) c (base 2, never above 0),
// e_j = 2^t_j, and y the target, one pass keeps
//   rest    = sum_{j != y} e_j
//   rest_t  = sum_{j != y} e_j t_j
//   rest_sq = sum_{j != y} e_j^2
// from which, with e_y = 2^t_y and S = rest + e_y,
//   loss      = log1p(rest / e_y) where e_y >= rest, else log(S) - t_y ln 2
//   entropy   = log(S) - ln 2 (rest_t + e_y t_y) / S
//   grad_norm = sqrt(rest^2 + rest_sq) / S
// When a block raises the maximum by delta (in base 2, f = 2^-delta), what was kept before becomes
//   rest_t' = f (rest_t - delta rest),  rest' = f rest,  rest_sq' = f^2 rest_sq.
// The target stays out of the sums because 1 - p_y and 1 - 2 p_y + sum p^2 cancel on a confident
// row.
//
// Hazards: NaN must survive every maximum and clamp (a lost NaN would be a row silently kept);
// -inf must add 0 and never 0 * -inf; both are said where they are handled.
#pragma once

#include <cstdint>

namespace sparse_kernels {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Statistics that can be weighted into the significance, in the order of RowStatsArgs::weights.
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

// Where the logits of a row begin, in elements: the rows' dimensions, outermost first.
struct RowLayout {
  static constexpr int kDimensions = 4;
  int dimensions;
  int64_t size[kDimensions];  // the first is not needed
  int64_t stride[kDimensions];

  int64_t offset(int64_t row) const {
    int64_t sum = 0;
    for (int d = dimensions - 1; d > 0; --d) {
      sum += row % size[d] * stride[d];
      row /= size[d];
    }
    return sum + row * stride[0];
  }
};

struct RowStatsArgs {
  const void* logits;  // [rows, classes] by layout and class_stride
  DType dtype;
  int64_t rows;
  int64_t classes;
  int64_t class_stride;  // in elements
  RowLayout layout;
  const void* targets;  // [rows], contiguous int64, or int32
  bool targets_are_int32;
  int64_t ignore_index;
  float inverse_temperature;
  float softcap;  // 0: none
  float label_smoothing;
  float* outputs[kStatistics];  // [rows] each; null where not wanted
  int64_t* argmax;              // [rows], or null
  float* saved_maximum;         // [rows], of the capped logits, for a backward; or null
  float* saved_total;           // [rows], S

  // The gate; not applied where mask is null.
  uint8_t* mask;               // [rows]
  float* significance;         // [rows]
  float* weight;               // [rows], 1/p; null for a plain threshold
  const float* offset;         // [rows] or null
  float weights[kStatistics];  // 0 where the statistic does not count
  float threshold;
  float gate_temperature;
  float p_min;
  uint64_t seed;
  uint64_t step;
};

struct RowStatsBackwardArgs {
  const void* logits;
  void* gradient;  // written whole; of the logits' type
  DType dtype;
  int64_t rows;
  int64_t classes;
  int64_t class_stride;
  RowLayout layout;
  int64_t gradient_class_stride;
  RowLayout gradient_layout;
  const void* targets;  // checked by the forward
  bool targets_are_int32;
  int64_t ignore_index;
  float inverse_temperature;
  float softcap;
  float label_smoothing;
  const float* maximum;  // [rows], saved by the forward
  const float* total;
  const float* entropy;           // null without entropy_gradient
  const float* loss_gradient;     // [rows], or null for zeros
  const float* entropy_gradient;  // [rows], or null for zeros
};

struct RowStatsResult {
  int64_t bad_target_row = -1;  // lowest row with a target out of range: nothing else is then valid
  int64_t invalid = 0;          // rows of NaN
};

// Reads and writes rows [begin, end). One function for each instruction set.
using RowStatsFunction = RowStatsResult (*)(const RowStatsArgs&, int64_t begin, int64_t end);
using RowStatsBackwardFunction = void (*)(const RowStatsBackwardArgs&, int64_t begin, int64_t end);

namespace portable {
RowStatsResult row_stats(const RowStatsArgs& args, int64_t begin, int64_t end);
void row_stats_backward(const RowStatsBackwardArgs& args, int64_t begin, int64_t end);
}  // namespace portable
namespace avx2 {
RowStatsResult row_stats(const RowStatsArgs& args, int64_t begin, int64_t end);
void row_stats_backward(const RowStatsBackwardArgs& args, int64_t begin, int64_t end);
}  // namespace avx2
namespace avx512 {
RowStatsResult row_stats(const RowStatsArgs& args, int64_t begin, int64_t end);
void row_stats_backward(const RowStatsBackwardArgs& args, int64_t begin, int64_t end);
}  // namespace avx512

// All rows, in parallel, with the widest instruction set in use.
RowStatsResult row_stats(const RowStatsArgs& args);
void row_stats_backward(const RowStatsBackwardArgs& args);

}  // namespace sparse_kernels
