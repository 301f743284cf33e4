// A tree of partial sums over float32 leaves, 64 children a node, to draw rows in proportion to
// their leaves. Drawing a row or changing a leaf touches a few hundred bytes a level. A NaN leaf
// counts as 0.
//
// Every sum is a function of the leaves alone, whatever the order in which they were written:
// children are added by halving (x[i] + x[i + 32], then 16, ...), and an update adds up a node's
// children again instead of adding a difference. So sums do not drift, results do not depend on
// the number of threads, only the leaves need saving, and the tensor arithmetic of
// sparse_kernels/sum_tree.py finds the same rows.
#pragma once

#include <cstdint>

namespace sparse_kernels {

struct SumTree {
  static constexpr int64_t kFan = 64;
  static constexpr int kLevels = 11;  // 64^11 is beyond 64 bits

  const float* leaves;
  int64_t size;             // number of leaves, at least 1
  double* levels[kLevels];  // levels[0][b] sums leaves [64 b, 64 b + 64); the last holds the total
  int depth;                // number of levels in use, at least 1
};

// Computes all sums from the leaves.
void sum_tree_build(const SumTree& tree);

// Computes again the sums above the `count` leaves in `index`, which were changed.
void sum_tree_update(const SumTree& tree, const int64_t* index, int64_t count);

// out[i] is the first leaf at which the running sum of the leaves is above targets[i], in
// [0, total); where rounding leaves no such leaf, the last one that is not 0.
void sum_tree_find(const SumTree& tree, const double* targets, int64_t count, int64_t* out);

// out[i] = philox_uniform_double(seed, step, rows[i]).
void philox_uniform(uint64_t seed, uint64_t step, const int64_t* rows, int64_t count, double* out);

}  // namespace sparse_kernels
