#include "sparse_kernels/cpu/row_stats.h"

#include <vector>

#include "row_stats_functions.h"
#include "sparse_kernels/cpu/instruction_set.h"
#include "sparse_kernels/cpu/parallel.h"

namespace sparse_kernels {
namespace {

// The least number of logits that is worth waking a thread for, and what a row costs besides its
// own, in logits: decisions and logarithms.
constexpr int64_t kGrain = 24 * 1024;
constexpr int64_t kRowCost = 24;
// The largest group of rows that any instruction set handles together.
constexpr int64_t kGroup = 32;

const RowStatsFunctions& implementation() {
  switch (instruction_set()) {
#if defined(SPARSE_KERNELS_X86)
    case InstructionSet::kAvx512:
      return avx512::row_stats_functions;
    case InstructionSet::kAvx2:
      return avx2::row_stats_functions;
#elif defined(SPARSE_KERNELS_NEON)
    case InstructionSet::kNeon:
      return neon::row_stats_functions;
#endif
    default:
      return portable::row_stats_functions;
  }
}

// A thread's rows are whole groups, unless there are so few that threads would get unequal shares.
int64_t alignment(int64_t rows) {
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  return groups >= 4 * max_threads() ? kGroup : 1;
}

int parts_of(int64_t rows, int64_t classes) {
  const int parts = parts_for(rows * (classes + kRowCost), kGrain);
  return parts <= rows ? parts : rows > 0 ? int(rows) : 1;
}

// Where there are too few rows to keep the threads evenly busy, threads sum parts of rows instead:
// the sums of all parts, or none where whole rows serve.
std::vector<PartSums> sums_of_parts(const RowStatsArgs& args, const RowStatsFunctions& functions) {
  const int threads = parts_for(args.rows * args.classes, kGrain);
  const int64_t parts = args.rows * parts_of_row(args.classes);
  std::vector<PartSums> sums;
  if (args.class_stride != 1 || threads == 1 || parts == args.rows || args.rows >= 8 * threads)
    return sums;
  sums.resize(parts);
  const int threads_used = parts < threads ? int(parts) : threads;
  parallel_parts(parts, threads_used, 1, [&](int, int64_t begin, int64_t end) {
    functions.sum_parts(args, begin, end, sums.data());
  });
  return sums;
}

}  // namespace

bool fetches_past_caches() {
#if defined(SPARSE_KERNELS_X86)
  static const bool amd = [] {
    __builtin_cpu_init();
    return bool(__builtin_cpu_is("amd"));
  }();
  return amd;
#else
  return false;
#endif
}

RowStatsResult row_stats(const RowStatsArgs& args) {
  const RowStatsFunctions& functions = implementation();
  const int parts = parts_of(args.rows, args.classes);
  if (const std::vector<PartSums> sums = sums_of_parts(args, functions); !sums.empty())
    return functions.forward(args, 0, args.rows, sums.data());
  if (parts == 1) return functions.forward(args, 0, args.rows, nullptr);
  std::vector<RowStatsResult> results(parts);
  parallel_parts(args.rows, parts, alignment(args.rows), [&](int part, int64_t begin, int64_t end) {
    results[part] = functions.forward(args, begin, end, nullptr);
  });
  RowStatsResult total;
  for (const RowStatsResult& result : results) {
    total.invalid += result.invalid;
    if (total.bad_target_row < 0) total.bad_target_row = result.bad_target_row;
  }
  return total;
}

void row_stats_backward(const RowStatsBackwardArgs& args) {
  const RowStatsFunctions& functions = implementation();
  parallel_parts(args.rows, parts_of(args.rows, args.classes), alignment(args.rows),
                 [&](int, int64_t begin, int64_t end) { functions.backward(args, begin, end); });
}

}  // namespace sparse_kernels
