// The functions that every instruction set implements for compaction.
#pragma once

#include <cstdint>

namespace sparse_kernels {

// A flag is a byte, set where it is not 0.
struct FlagFunctions {
  // The number of flags set in mask[begin, end).
  int64_t (*count)(const uint8_t* mask, int64_t begin, int64_t end);
  // Packs the positions of the flags set in mask[begin, end) into index[slot, limit), in order,
  // until there is no room. Returns the slot after the last one. It may overwrite the slots from
  // there to limit with anything.
  int64_t (*pack)(const uint8_t* mask, int64_t begin, int64_t end, int64_t* index, int64_t slot,
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
namespace neon {
extern const FlagFunctions flag_functions;
}

}  // namespace sparse_kernels
