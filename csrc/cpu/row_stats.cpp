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

RowStatsFunction implementation() {
  switch (instruction_set()) {
#if defined(SPARSE_KERNELS_X86)
    case InstructionSet::kAvx512:
      return avx512::row_stats;
    case InstructionSet::kAvx2:
      return avx2::row_stats;
#endif
    default:
      return portable::row_stats;
  }
}

}  // namespace

RowStatsResult row_stats(const RowStatsArgs& args) {
  const RowStatsFunction function = implementation();
  const int64_t groups = (args.rows + kGroup - 1) / kGroup;
  // Few rows are split evenly even where that splits a group.
  const int64_t align = groups >= 4 * max_threads() ? kGroup : 1;
  int parts = parts_for(args.rows * args.classes, kGrain);
  if (parts > args.rows) parts = args.rows > 0 ? int(args.rows) : 1;
  if (parts == 1) return function(args, 0, args.rows);
  std::vector<RowStatsResult> results(parts);
  parallel_parts(args.rows, parts, align, [&](int part, int64_t begin, int64_t end) {
    results[part] = function(args, begin, end);
  });
  RowStatsResult total;
  for (const RowStatsResult& result : results) {
    total.invalid += result.invalid;
    if (total.bad_target_row < 0) total.bad_target_row = result.bad_target_row;
  }
  return total;
}

}  // namespace sparse_kernels
