#include "sparse_kernels/cpu/sum_tree.h"

#include <algorithm>
#include <vector>

#include "sparse_kernels/cpu/parallel.h"
#include "sparse_kernels/cpu/philox.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kFan = SumTree::kFan;
constexpr int64_t kGroup = 8;     // kGroup * kGroup is kFan
constexpr int64_t kAbreast = 16;  // draws side by side, whose nodes fit into L1 together
constexpr int64_t kGrain = 1024;  // least number of nodes or draws worth waking a thread for

double value(float leaf) { return leaf == leaf ? double(leaf) : 0.0; }
double value(double sum) { return sum; }

template <class T>
double sum_children(const T* child, int64_t count) {
  double sums[kFan];
  for (int64_t i = 0; i < count; ++i) sums[i] = value(child[i]);
  for (int64_t i = count; i < kFan; ++i) sums[i] = 0.0;
  for (int64_t half = kFan / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

int64_t parents_of(int64_t nodes) { return (nodes + kFan - 1) / kFan; }

// Sums the children of one node of `level`; the level under it has `below` nodes or leaves.
void sum_node(const SumTree& tree, int level, int64_t below, int64_t node) {
  const int64_t begin = node * kFan, count = std::min(kFan, below - begin);
  tree.levels[level][node] = level == 0 ? sum_children(tree.leaves + begin, count)
                                        : sum_children(tree.levels[level - 1] + begin, count);
}

// The first of eight weights at which their running sum is above `target`, from which the sum
// before it is subtracted; where rounding leaves no such weight, the last one that is not 0.
int pick(const double* weight, double& target) {
  double sum_before[kGroup + 1] = {0.0};  // of the weights before each
  int child = 0;
  for (int i = 0; i < kGroup; ++i) {
    sum_before[i + 1] = sum_before[i] + weight[i];
    child += sum_before[i + 1] <= target;
  }
  if (child == kGroup) {
    child = kGroup - 1;
    while (child > 0 && weight[child] == 0.0) --child;
  }
  target -= sum_before[child];
  return child;
}

// The child that holds `target`. Its group of eight is found first, because a running sum over 64
// is one long chain of additions.
template <class T>
int64_t find_child(const T* child, int64_t count, double& target) {
  double weight[kFan], groups[kGroup];
  for (int64_t i = 0; i < count; ++i) weight[i] = value(child[i]);
  for (int64_t i = count; i < kFan; ++i) weight[i] = 0.0;
  for (int64_t g = 0; g < kGroup; ++g) {
    const double* w = weight + g * kGroup;
    groups[g] = ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
  }
  const int64_t first = int64_t(pick(groups, target)) * kGroup;
  return first + pick(weight + first, target);
}

template <class T>
void prefetch(const T* children) {
  for (int64_t i = 0; i < kFan; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(children + i);
}

}  // namespace

void sum_tree_build(const SumTree& tree) {
  int64_t below = tree.size;
  for (int level = 0; level < tree.depth; ++level) {
    const int64_t nodes = parents_of(below);
    parallel_parts(nodes, parts_for(nodes, kGrain), 1, [&](int, int64_t begin, int64_t end) {
      for (int64_t node = begin; node < end; ++node) sum_node(tree, level, below, node);
    });
    below = nodes;
  }
}

void sum_tree_update(const SumTree& tree, const int64_t* index, int64_t count) {
  std::vector<int64_t> nodes(index, index + count);
  int64_t below = tree.size;
  for (int level = 0; level < tree.depth; ++level) {
    for (int64_t& node : nodes) node /= kFan;
    if (level == 0) std::sort(nodes.begin(), nodes.end());  // sorted nodes have sorted parents
    nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());
    const int64_t touched = int64_t(nodes.size());
    parallel_parts(touched, parts_for(touched, kGrain), 1, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum_node(tree, level, below, nodes[i]);
    });
    below = parents_of(below);
  }
}

void sum_tree_find(const SumTree& tree, const double* targets, int64_t count, int64_t* out) {
  int64_t sizes[SumTree::kLevels];
  for (int level = 0; level < tree.depth; ++level)
    sizes[level] = parents_of(level == 0 ? tree.size : sizes[level - 1]);
  parallel_parts(count, parts_for(count, kGrain), 1, [&](int, int64_t begin, int64_t end) {
    // A few draws descend side by side: each node is fetched while the others are searched.
    for (int64_t i = begin; i < end; i += kAbreast) {
      const int64_t abreast = std::min(kAbreast, end - i);
      double target[kAbreast];
      std::copy(targets + i, targets + i + abreast, target);
      std::fill(out + i, out + i + abreast, 0);
      for (int level = tree.depth - 1; level >= 0; --level)
        for (int64_t k = 0; k < abreast; ++k) {
          const int64_t first = out[i + k] * kFan;
          if (level > 0) {
            const int64_t nodes = std::min(kFan, sizes[level - 1] - first);
            const double* below = tree.levels[level - 1];
            const int64_t node = first + find_child(below + first, nodes, target[k]);
            out[i + k] = node;
            if (level > 1)
              prefetch(tree.levels[level - 2] + node * kFan);
            else
              prefetch(tree.leaves + node * kFan);
          } else {
            const int64_t leaves = std::min(kFan, tree.size - first);
            out[i + k] = first + find_child(tree.leaves + first, leaves, target[k]);
          }
        }
    }
  });
}

void philox_uniform(uint64_t seed, uint64_t step, const int64_t* rows, int64_t count, double* out) {
  parallel_parts(count, parts_for(count, 16 * kGrain), 1, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = philox_uniform_double(seed, step, uint64_t(rows[i]));
  });
}

}  // namespace sparse_kernels
