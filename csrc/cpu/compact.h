// From a mask to packed indices, ascending. Bytes: the mask twice (once to count), 12 a kept row.
#pragma once

#include <cstdint>

namespace sparse_kernels {

// Flags that are set. A flag is a byte, 0 or 1.
int64_t count_flags(const uint8_t* mask, int64_t rows);

// Writes the first ``capacity`` set flags' indices and weights (1 where weight_in is null), pads
// with index 0 and weight 0, and returns how many flags are set in all.
int64_t compact(const uint8_t* mask, const float* weight_in, int64_t rows, int64_t capacity,
                int64_t* index, float* weight);

}  // namespace sparse_kernels
