// From a mask to packed indices, ascending. Bytes: the mask once with a capacity or on one thread,
// twice where the parts of several threads must first be counted; 12 a kept row.
#pragma once

#include <cstdint>
#include <vector>

namespace sparse_kernels {

// A flag is a byte, set where it is not 0. One implementation for each instruction set.
struct FlagFunctions {
  // Flags set in mask[begin, end).
  int64_t (*count)(const uint8_t* mask, int64_t begin, int64_t end);
  // Packs the set flags' positions in mask[begin, end) into index[at, limit), in order, until
  // there is no room. Returns the slot after the last. Slots from there to limit may be
  // overwritten with anything.
  int64_t (*pack)(const uint8_t* mask, int64_t begin, int64_t end, int64_t* index, int64_t at,
                  int64_t limit);
};

namespace portable {
extern const FlagFunctions flag_functions;
}
namespace avx2 {
extern const FlagFunctions flag_functions;
}
namespace avx512 {
extern const FlagFunctions flag_functions;
}

// Flags set in each of the parts that threads will pack; one part where more would not pay.
std::vector<int64_t> count_flags(const uint8_t* mask, int64_t rows);

// Writes the first ``capacity`` set flags' indices and weights (1 where weight_in is null), pads
// with index 0 and weight 0, and returns how many flags are set in all. ``counts`` is what
// count_flags returned, or empty where the flags have not been counted.
int64_t compact(const uint8_t* mask, const float* weight_in, int64_t rows,
                std::vector<int64_t> counts, int64_t capacity, int64_t* index, float* weight);

}  // namespace sparse_kernels
