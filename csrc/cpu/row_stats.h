// Row statistics and the gate's decision, in one pass over the logits. No PyTorch here: pointers,
// sizes, strides.
//
// Bytes: the logits once (a block of a row is read twice, the second time from L1), and 4 or 8
// bytes a row for each output.
//
// With m the row's maximum, d_j = x_j - m, T the temperature, e_j = exp(d_j / T), and y the target,
// one pass keeps
//   rest    = sum_{j != y} e_j
//   rest_d  = sum_{j != y} e_j d_j
//   rest_sq = sum_{j != y} e_j^2
// from which, with S = rest + e_y and log(S) = log1p(rest + (e_y - 1)),
//   loss      = log(S) - d_y / T
//   entropy   = log(S) - (rest_d + e_y d_y) / (S T)
//   grad_norm = sqrt(rest^2 + rest_sq) / S
// When a block raises the maximum by delta, with f = exp(-delta / T), what was kept before becomes
//   rest_d' = f (rest_d - delta rest),  rest' = f rest,  rest_sq' = f^2 rest_sq
// and in the same way two parts of a row become one.
// The target stays out of the sums because 1 - p_y and 1 - 2 p_y + sum p^2 cancel on a confident
// row; there e_y - 1 is 0, so the logarithm keeps a small rest too. d is kept in the logits' own
// units, so that a rounded log2(e) / T meets only the exponent, never the result.
//
// Hazards: NaN must survive every maximum and clamp (a lost NaN would be a row silently kept);
// -inf must add 0 and never 0 * -inf; both are said where they are handled.
#pragma once

#include <cstdint>

namespace sparse_kernels {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

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

// What forward and backward are both given. Where a pointer is to void, it is to values of the
// logits' type, or (outputs and everything that is one a row) to double for float64 and to float
// for the rest.
struct RowStatsInput {
  const void* logits;  // [rows, classes] by layout and class_stride
  DType dtype;
  int64_t rows;
  int64_t classes;
  int64_t class_stride;  // in elements
  RowLayout layout;
  const void* targets;  // [rows], contiguous int64, or int32
  bool targets_are_int32;
  int64_t ignore_index;
  double inverse_temperature;
  double softcap;  // 0: none
  double label_smoothing;
};

struct RowStatsArgs : RowStatsInput {
  void* outputs[kStatistics];  // [rows] each; null where not wanted
  int64_t* argmax;             // [rows], or null
  void* saved_maximum;         // [rows], of the capped logits, for a backward; or null
  void* saved_total;           // [rows], S

  // The gate; not applied where mask is null.
  uint8_t* mask;                // [rows]
  void* significance;           // [rows]
  float* weight;                // [rows], 1/p; null for a plain threshold
  const void* offset;           // [rows] or null
  double weights[kStatistics];  // 0 where the statistic does not count
  double threshold;
  double gate_temperature;
  double p_min;
  uint64_t seed;
  uint64_t step;
};

struct RowStatsBackwardArgs : RowStatsInput {  // targets were checked by the forward
  void* gradient;                              // written whole; of the logits' type
  int64_t gradient_class_stride;
  RowLayout gradient_layout;
  const void* maximum;  // [rows], saved by the forward
  const void* total;
  const void* entropy;           // null without entropy_gradient
  const void* loss_gradient;     // [rows], or null for zeros
  const void* entropy_gradient;  // [rows], or null for zeros
};

struct RowStatsResult {
  int64_t bad_target_row = -1;  // lowest row with a target out of range: nothing else is then valid
  int64_t invalid = 0;          // rows of NaN
};

// Sums over a part of a row's classes: kPartClasses of them, and in the last part what is left. A
// row is summed part by part however many threads there are, so its result does not depend on them.
constexpr int64_t kPartClasses = 8 * 1024;

inline int64_t parts_of_row(int64_t classes) {
  return classes < 2 * kPartClasses ? 1 : classes / kPartClasses;
}

struct PartSums {
  double maximum, rest, rest_d, rest_sq;
  double largest, second;  // only where the margin is wanted
  double sum;              // of the logits; only with label smoothing
  int64_t argmax;          // only where wanted
};

// One set of functions for each instruction set.
struct RowStatsFunctions {
  // Rows [begin, end); with the sums of their parts, of every row of args, the logits of classes
  // are not read again.
  RowStatsResult (*forward)(const RowStatsArgs&, int64_t begin, int64_t end, const PartSums*);
  // Parts [begin, end) of all rows' parts, numbered row by row; for contiguous classes.
  void (*sum_parts)(const RowStatsArgs&, int64_t begin, int64_t end, PartSums*);
  void (*backward)(const RowStatsBackwardArgs&, int64_t begin, int64_t end);
};

#define SPARSE_KERNELS_DECLARE(isa)                                                           \
  namespace isa {                                                                             \
  RowStatsResult row_stats(const RowStatsArgs&, int64_t begin, int64_t end, const PartSums*); \
  void sum_parts(const RowStatsArgs&, int64_t begin, int64_t end, PartSums*);                 \
  void row_stats_backward(const RowStatsBackwardArgs&, int64_t begin, int64_t end);           \
  constexpr RowStatsFunctions kRowStats{row_stats, sum_parts, row_stats_backward};            \
  }
SPARSE_KERNELS_DECLARE(portable)
SPARSE_KERNELS_DECLARE(avx2)
SPARSE_KERNELS_DECLARE(avx512)
#undef SPARSE_KERNELS_DECLARE

// All rows, in parallel, with the widest instruction set in use.
RowStatsResult row_stats(const RowStatsArgs& args);
void row_stats_backward(const RowStatsBackwardArgs& args);

}  // namespace sparse_kernels
