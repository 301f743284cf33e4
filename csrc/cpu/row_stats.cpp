#include "row_stats.h"

#include <vector>

#include "instruction_set.h"
#include "parallel.h"

namespace sparse_kernels {
namespace {

// Logits a thread must have for it to be worth waking: about 10 us of work.
constexpr int64_t kGrain = 32 * 1024;
// The longest group of rows that any instruction set handles together.
constexpr int64_t kGroup = 16;

struct Functions {
  RowStatsFunction forward;
  RowStatsBackwardFunction backward;
};

Functions implementation() {
  switch (instruction_set()) {
#if defined(SPARSE_KERNELS_X86)
    case InstructionSet::kAvx512:
      return {avx512::row_stats, avx512::row_stats_backward};
    case InstructionSet::kAvx2:
      return {avx2::row_stats, avx2::row_stats_backward};
#endif
    default:
      return {portable::row_stats, portable::row_stats_backward};
  }
}

// Few rows are split evenly even where that splits a group.
int64_t alignment(int64_t rows) {
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  return groups >= 4 * max_threads() ? kGroup : 1;
}

int parts_of(int64_t rows, int64_t classes) {
  const int parts = parts_for(rows * classes, kGrain);
  return parts <= rows ? parts : rows > 0 ? int(rows) : 1;
}

}  // namespace

RowStatsResult row_stats(const RowStatsArgs& args) {
  const RowStatsFunction function = implementation().forward;
  const int parts = parts_of(args.rows, args.classes);
  if (parts == 1) return function(args, 0, args.rows);
  std::vector<RowStatsResult> results(parts);
  parallel_parts(args.rows, parts, alignment(args.rows), [&](int part, int64_t begin, int64_t end) {
    results[part] = function(args, begin, end);
  });
  RowStatsResult total;
  for (const RowStatsResult& result : results) {
    total.invalid += result.invalid;
    if (total.bad_target_row < 0) total.bad_target_row = result.bad_target_row;
  }
  return total;
}

void row_stats_backward(const RowStatsBackwardArgs& args) {
  const RowStatsBackwardFunction function = implementation().backward;
  parallel_parts(args.rows, parts_of(args.rows, args.classes), alignment(args.rows),
                 [&](int, int64_t begin, int64_t end) { function(args, begin, end); });
}

}  // namespace sparse_kernels
