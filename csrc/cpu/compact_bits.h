// A table of the set bits of each byte, for instruction sets that cannot compress a vector.
#pragma once

#include <cstdint>

namespace sparse_kernels {

// For each byte the positions of its set bits, packed, one byte for each position.
struct BitTable {
  uint64_t positions[256];
  constexpr BitTable() : positions() {
    for (int byte = 0; byte < 256; ++byte) {
      int shift = 0;
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) {
          positions[byte] |= uint64_t(bit) << shift;
          shift += 8;
        }
    }
  }
};
static constexpr BitTable kBits;

}  // namespace sparse_kernels
