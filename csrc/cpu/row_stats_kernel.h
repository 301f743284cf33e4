// The row statistics of one instruction set. sparse_kernels/cpu/row_stats.h derives what is
// computed; there are two ways through the logits:
//   rows in lanes     few contiguous classes, or rows in any layout (row_stats_tiles.h)
//   columns in lanes  many contiguous classes (row_stats_columns.h)
// Each fills a Group of rows, and finish() turns it into outputs (row_stats_group.h).
//
// instruction_set.h gives the rule for linkage that holds in all of these headers.
#pragma once

#include <cstdint>

#include "row_stats_ahead.h"
#include "row_stats_backward.h"
#include "row_stats_columns.h"
#include "row_stats_functions.h"
#include "row_stats_plan.h"
#include "row_stats_tiles.h"
#include "scalar_types.h"
#include "sparse_kernels/cpu/row_stats.h"

namespace sparse_kernels {

// The rows of the tile that begins at `row`; returns their number. X: see row_stats_tiles.h.
template <class Vec, class T, class X, bool kSquares>
int compute_tile(const RowStatsArgs& args, const Plan<Vec>& plan, const RowsAhead<Vec>& rows_ahead,
                 int64_t row, int64_t end, RowStatsResult& result) {
  Tile<Vec, T, X> tile(args, plan, rows_ahead, row, end);
  tile.template compute<kSquares>(result);
  return tile.rows();
}

template <class Vec, class T, bool kSquares>
RowStatsResult forward(const RowStatsArgs& args, const Plan<Vec>& plan, int64_t begin, int64_t end,
                       const PartSums* parts) {
  constexpr int kLanes = Vec::kLanes;
  RowStatsResult result;
  const RowsAhead<Vec> rows_ahead(args);
  const bool in_columns = args.class_stride == 1 && args.classes > kTransposeClasses;
  const bool in_words = sizeof(T) == 2 && args.class_stride != 1 && args.softcap == 0.0;
  for (int64_t row = begin; row < end;) {
    if (in_columns) {
      Group<Vec> group;
      const int count = int(end - row < group.kRows ? end - row : group.kRows);
      for (int i = 0; i < count; i += kLanes)
        sum_rows<Vec, T, kSquares>(args, plan, row + i, count - i < kLanes ? count - i : kLanes,
                                   parts, group, i, result);
      finish(args, plan, group, row, count, result);
      row += count;
    } else if (in_words) {
      row += compute_tile<Vec, T, T, kSquares>(args, plan, rows_ahead, row, end, result);
    } else {
      using Real = typename Vec::Real;
      row += compute_tile<Vec, T, Real, kSquares>(args, plan, rows_ahead, row, end, result);
    }
  }
  return result;
}

// RowStatsFunctions::forward for logits of type T.
template <class Vec, class T>
RowStatsResult forward(const RowStatsArgs& args, int64_t begin, int64_t end,
                       const PartSums* parts) {
  const Plan<Vec> plan(args);
  return plan.squares ? forward<Vec, T, true>(args, plan, begin, end, parts)
                      : forward<Vec, T, false>(args, plan, begin, end, parts);
}

// The functions of an instruction set whose vectors of float and double are F32 and F64.
template <class F32, class F64>
struct RowStatsOf {
  static RowStatsResult forward(const RowStatsArgs& args, int64_t begin, int64_t end,
                                const PartSums* parts) {
    switch (args.dtype) {
      case DType::kFloat64:
        return sparse_kernels::forward<F64, double>(args, begin, end, parts);
      case DType::kBFloat16:
        return sparse_kernels::forward<F32, BFloat16>(args, begin, end, parts);
      case DType::kFloat16:
        return sparse_kernels::forward<F32, Float16>(args, begin, end, parts);
      default:
        return sparse_kernels::forward<F32, float>(args, begin, end, parts);
    }
  }

  static void sum_parts(const RowStatsArgs& args, int64_t begin, int64_t end, PartSums* parts) {
    switch (args.dtype) {
      case DType::kFloat64:
        return sparse_kernels::sum_parts<F64, double>(args, begin, end, parts);
      case DType::kBFloat16:
        return sparse_kernels::sum_parts<F32, BFloat16>(args, begin, end, parts);
      case DType::kFloat16:
        return sparse_kernels::sum_parts<F32, Float16>(args, begin, end, parts);
      default:
        return sparse_kernels::sum_parts<F32, float>(args, begin, end, parts);
    }
  }

  static void backward(const RowStatsBackwardArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
      case DType::kFloat64:
        return sparse_kernels::backward<F64, double>(args, begin, end);
      case DType::kBFloat16:
        return sparse_kernels::backward<F32, BFloat16>(args, begin, end);
      case DType::kFloat16:
        return sparse_kernels::backward<F32, Float16>(args, begin, end);
      default:
        return sparse_kernels::backward<F32, float>(args, begin, end);
    }
  }

  static constexpr RowStatsFunctions functions() { return {forward, sum_parts, backward}; }
};

}  // namespace sparse_kernels
