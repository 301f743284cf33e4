#include "sum_tree.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "philox.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kFan = SumTree::kFan;
constexpr int64_t kGrain = 1024;  // nodes or draws a thread must have to be worth waking

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

// Sums the children of one node of ``level``, which has ``below`` nodes or leaves under it.
void sum_node(const SumTree& tree, int level, int64_t below, int64_t node) {
  const int64_t begin = node * kFan, count = std::min(kFan, below - begin);
  tree.levels[level][node] = level == 0 ? sum_children(tree.leaves + begin, count)
                                        : sum_children(tree.levels[level - 1] + begin, count);
}

// The child that holds ``target``, made relative to it.
template <class T>
int64_t find_child(const T* child, int64_t count, double& target) {
  double before = 0.0, before_last = 0.0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = value(child[i]), after = before + weight;
    if (after > target) {
      target -= before;
      return i;
    }
    if (weight > 0.0) {
      last = i;
      before_last = before;
    }
    before = after;
  }
  target -= before_last;
  return last;
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
    for (int64_t i = begin; i < end; ++i) {
      double target = targets[i];
      int64_t node = 0;
      for (int level = tree.depth - 1; level > 0; --level) {
        const int64_t first = node * kFan, nodes = std::min(kFan, sizes[level - 1] - first);
        node = first + find_child(tree.levels[level - 1] + first, nodes, target);
      }
      const int64_t first = node * kFan, leaves = std::min(kFan, tree.size - first);
      out[i] = first + find_child(tree.leaves + first, leaves, target);
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
