// The body of row_stats for one instruction set: included by row_stats_<isa>.cpp after its vec_*.h,
// inside that instruction set's namespace. row_stats.h derives what is computed here.
//
// Two ways through the logits:
//   rows in lanes     few classes, or classes that are not contiguous: kTransposeClasses columns of
//                     kLanes rows are transposed into L1, then every sum is vertical. No reduction
//                     across lanes, no tails.
//   columns in lanes  many classes: blocks of kBlock columns, each read for its maximum, then again
//                     from L1 for its sums.
// Both fill a Group, and finish() turns a Group into outputs, also with rows in lanes.

constexpr int kLanes = Vec::kLanes;
constexpr int kBlock = 1024;  // 4 KB of float32: stays in L1 between the two reads
// Up to here rows in lanes wins: the transpose costs a scalar move an element, but a row in the
// other form costs four reductions whatever its length.
constexpr int kTransposeClasses = 64;
// A sum that is only terms of 2^kLowestPower is flushed to 0.
constexpr float kFlushBelow = 1e-30f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// clang-format off: each needs those before it
#include "vec_math.h"
#include "row_stats_group.h"
#include "row_stats_columns.h"
#include "row_stats_rows.h"
#include "row_stats_backward.h"
// clang-format on

template <class T>
RowStatsResult run(const RowStatsArgs& args, int64_t begin, int64_t end) {
  const Plan plan(args);
  RowStatsResult result;
  const bool plain = args.classes <= kTransposeClasses && args.class_stride == 1 &&
                     args.softcap == 0.0f && !plan.extras;
  for (int64_t row = begin; row < end; row += kLanes) {
    const int count = int(end - row < kLanes ? end - row : kLanes);
    Group group;
    if (args.classes <= kTransposeClasses || args.class_stride != 1) {
      if (plain)
        gather_group<T, true>(args, plan, row, count, group, result);
      else
        gather_group<T, false>(args, plan, row, count, group, result);
    } else {
      for (int i = 0; i < kLanes; ++i) {
        const int64_t y = i < count ? target_of(args, row + i) : args.ignore_index;
        if (is_left_out(args, row + i, y, result)) {
          group.ignore(i);
          continue;
        }
        const T* logits = static_cast<const T*>(args.logits) + args.layout.offset(row + i);
        if (plan.squares)
          sum_row<T, true>(args, plan, logits, y, i, group);
        else
          sum_row<T, false>(args, plan, logits, y, i, group);
      }
    }
    finish(args, plan, group, row, count, result);
  }
  return result;
}

RowStatsResult row_stats(const RowStatsArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return run<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return run<Float16>(args, begin, end);
    default:
      return run<float>(args, begin, end);
  }
}
