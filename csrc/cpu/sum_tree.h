// Partial sums over float32 leaves, 64 children a node: rows are drawn in proportion to their leaf,
// and a leaf changed, in a few hundred bytes a level. A NaN leaf counts as 0.
//
// Every sum is a function of the leaves alone, whatever order they were written in: children are
// added by halving (x[i] + x[i + 32], then 16, ...), and an update adds a node's children again
// instead of a difference. So nothing drifts, no thread matters, the leaves are all there is to
// save, and sparse_kernels/sum_tree.py's tensor arithmetic finds the same rows.
#pragma once

#include <cstdint>

namespace sparse_kernels {

struct SumTree {
  static constexpr int64_t kFan = 64;
  static constexpr int kLevels = 11;  // 64^11 is beyond 64 bits

  const float* leaves;
  int64_t size;             // of the leaves, at least 1
  double* levels[kLevels];  // levels[0][b] sums leaves [64 b, 64 b + 64); the last holds the total
  int depth;                // levels in use, at least 1
};

// All sums, from the leaves.
void sum_tree_build(const SumTree& tree);

// The sums above the leaves in ``index``, which were changed.
void sum_tree_update(const SumTree& tree, const int64_t* index, int64_t count);

// out[i] is the first leaf at which the running sum of the leaves is above targets[i], in
// [0, total). Where rounding leaves none, the last one that is not 0.
void sum_tree_find(const SumTree& tree, const double* targets, int64_t count, int64_t* out);

// philox_uniform_double of each row.
void philox_uniform(uint64_t seed, uint64_t step, const int64_t* rows, int64_t count, double* out);

}  // namespace sparse_kernels
