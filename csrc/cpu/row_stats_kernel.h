// The body of row_stats for one instruction set and precision: included by row_stats_<isa>.cpp
// after its vec_*.h, inside that instruction set's f32 or f64. row_stats.h derives what is computed
// here.
//
// Three ways through the logits:
//   rows in lanes     few contiguous classes, or rows that lie anyhow: kTransposeClasses columns of
//                     kLanes rows are transposed into L1, then every sum is vertical. No reduction
//                     across lanes, no tails.
//   tiles             classes that are not contiguous, of rows that are adjacent (pixels): as rows
//   in
//                     lanes, but of kTileGroups x kLanes rows, so that each class's plane is read
//                     in runs of several cache lines.
//   columns in lanes  many classes: blocks of kBlock columns, each read for its maximum, then again
//                     from L1 for its sums.
// All fill a Group of kLanes rows, and finish() turns a Group into outputs, also with rows in
// lanes.

constexpr int kLanes = Vec::kLanes;
constexpr int kBlock = 1024;  // 4 KB of float32: stays in L1 between the two reads
// Up to here rows in lanes wins: the transpose costs a scalar move an element, but a row in the
// other form costs its reductions whatever its length.
constexpr int kTransposeClasses = 32;
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
constexpr Real kLargest = std::numeric_limits<Real>::max();
constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();

// clang-format off: each needs those before it
#include "vec_math.h"
#include "row_stats_group.h"
#include "row_stats_columns.h"
#include "row_stats_rows.h"
#include "row_stats_backward.h"
// clang-format on

template <class T, bool kSquares>
RowStatsResult run(const RowStatsArgs& args, const Plan& plan, int64_t begin, int64_t end,
                   const PartSums* parts) {
  RowStatsResult result;
  const bool contiguous = args.class_stride == 1;
  const bool plain = contiguous && args.softcap == 0.0 && !plan.extras;
  for (int64_t row = begin; row < end;) {
    const int count = int(end - row < kLanes ? end - row : kLanes);
    if (contiguous && args.classes > kTransposeClasses) {
      sum_rows<T, kSquares>(args, plan, row, count, parts, result);
    } else if (plain) {
      transpose_rows<T, true, kSquares>(args, plan, row, count, result);
    } else if (const int groups = contiguous ? 0 : adjacent_groups(args.layout, row, end)) {
      sum_tile<T, kSquares>(args, plan, row, groups, result);
      row += groups * kLanes;
      continue;
    } else {
      transpose_rows<T, false, kSquares>(args, plan, row, count, result);
    }
    row += count;
  }
  return result;
}

template <class T>
RowStatsResult run(const RowStatsArgs& args, int64_t begin, int64_t end, const PartSums* parts) {
  const Plan plan(args);
  return plan.squares ? run<T, true>(args, plan, begin, end, parts)
                      : run<T, false>(args, plan, begin, end, parts);
}
