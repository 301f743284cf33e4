// What a call requests, decided once for all its rows, and where a row's logits and target are.
#pragma once

#include <cstdint>

#include "row_stats_functions.h"
#include "sparse_kernels/cpu/row_stats.h"
#include "vec_math.h"

namespace sparse_kernels {

constexpr int kBlock = 1024;  // classes; 4 KB of float32, which stay in L1 between the two reads
// Up to this number of classes rows in lanes is faster: the transpose costs a scalar move per
// element, but columns in lanes cost their reductions whatever the row's length.
constexpr int kTransposeClasses = 32;
// Logits from which on planes are fetched past the outer caches, which would not hold them anyway.
constexpr int64_t kPastCaches = 16 << 20;

template <class Vec>
struct Plan {
  bool requested[kStatistics];  // as an output or in the significance
  bool squares;
  bool in_double;  // one of the statistics that are computed in double
  bool smoothed;   // the mean of the logits is needed
  bool extras;     // the margin, the argmax or the mean is needed
  bool past_caches;
  Exponential<Vec> exponential;

  explicit Plan(const RowStatsArgs& args) : exponential(args.inverse_temperature) {
    for (int k = 0; k < kStatistics; ++k)
      requested[k] = args.outputs[k] || (args.mask && args.weights[k] != 0.0);
    squares = requested[kGradNorm] || requested[kSumSquares];
    in_double = squares || requested[kMaxProb] || requested[kMargin];
    smoothed = requested[kLoss] && args.label_smoothing != 0.0;
    extras = requested[kMargin] || args.argmax || smoothed;
    // Where sums take as long as with AVX2, lines leave the innermost cache before their use.
    past_caches = sizeof(Vec) == 64 && Vec::kInRegisters &&
                  args.rows * args.classes >= kPastCaches && fetches_past_caches();
  }
};

// Where the logits of a row begin, in elements.
static inline int64_t row_offset(const RowLayout& layout, int64_t row) {
  int64_t offset = 0;
  for (int d = layout.dimensions - 1; d > 0; --d) {
    offset += row % layout.size[d] * layout.stride[d];
    row /= layout.size[d];
  }
  return offset + row * layout.stride[0];
}

// True where the target is ignore_index, which may be a class, and where it is out of range; the
// first such row is recorded in `result`.
static inline bool is_ignored(const RowStatsArgs& args, int64_t row, int64_t target,
                              RowStatsResult& result) {
  if (target == args.ignore_index) return true;
  if (uint64_t(target) < uint64_t(args.classes)) return false;
  if (result.bad_target_row < 0) result.bad_target_row = row;  // rows come in ascending order
  return true;
}

}  // namespace sparse_kernels
