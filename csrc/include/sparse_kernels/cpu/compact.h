// Compaction: from a mask to the packed indices of its set rows, in ascending order.
//
// Passes over the mask: one with a capacity or on one thread; two, to count and to pack, where
// several threads must know how many flags the parts before theirs have.
// Bytes: the mask once or twice, and 12 for each row kept.
#pragma once

#include <cstdint>
#include <vector>

namespace sparse_kernels {

// The number of flags set in each of the parts that threads will pack; a single part where more
// threads would not be faster. A flag is a byte, set where it is not 0.
std::vector<int64_t> count_flags(const uint8_t* mask, int64_t rows);

// Writes the indices and weights of the first `capacity` set flags, pads with index 0 and weight
// 0, and returns the total number of set flags. A weight is 1 where `weight_in` is null. `counts`
// is the result of count_flags, or empty where the flags have not been counted.
int64_t compact(const uint8_t* mask, const float* weight_in, int64_t rows,
                std::vector<int64_t> counts, int64_t capacity, int64_t* index, float* weight);

}  // namespace sparse_kernels
