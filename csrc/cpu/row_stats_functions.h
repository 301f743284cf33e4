// The functions that every instruction set implements for row statistics, and the sums that they
// exchange.
#pragma once

#include <cstdint>

#include "sparse_kernels/cpu/row_stats.h"

namespace sparse_kernels {

// A long row is summed in parts of kPartClasses classes; the last part takes the remainder. This
// does not depend on the number of threads, so neither does the result.
constexpr int64_t kPartClasses = 8 * 1024;

static inline int64_t parts_of_row(int64_t classes) {
  return classes < 2 * kPartClasses ? 1 : classes / kPartClasses;
}

// The sums of one part of a row.
struct PartSums {
  double maximum, rest, rest_d, rest_sq;
  double largest, second;  // only where the margin is requested
  double sum;              // of the logits; only with label smoothing
  int64_t argmax;          // only where requested
};

struct RowStatsFunctions {
  // Rows [begin, end). With `parts`, the sums of all parts of all rows of args, the logits are not
  // read again, except the targets'.
  RowStatsResult (*forward)(const RowStatsArgs& args, int64_t begin, int64_t end,
                            const PartSums* parts);
  // Parts [begin, end) of all rows' parts, numbered row by row. The classes must be contiguous.
  void (*sum_parts)(const RowStatsArgs& args, int64_t begin, int64_t end, PartSums* parts);
  void (*backward)(const RowStatsBackwardArgs& args, int64_t begin, int64_t end);
};

// True on processors that gain by fetching large planes past the outer caches: AMD's. A line that
// leaves the innermost cache before its use is read twice then: on an Intel Xeon (model 207) pixels
// took 1.4 to 2 times as long.
bool fetches_past_caches();

namespace portable {
extern const RowStatsFunctions row_stats_functions;
}
namespace avx2 {
extern const RowStatsFunctions row_stats_functions;
}
namespace avx512 {
extern const RowStatsFunctions row_stats_functions;
}
namespace neon {
extern const RowStatsFunctions row_stats_functions;
}

}  // namespace sparse_kernels
