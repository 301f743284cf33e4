#include <cstdint>
#include <cstring>

#include "compact_kernel.h"

namespace sparse_kernels {
namespace portable {
namespace {

struct Flags {
  static uint64_t load_word(const uint8_t* mask) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) {
      uint64_t bytes;
      std::memcpy(&bytes, mask + 8 * i, 8);
      // Sets bit 7 of each byte that is not 0 and clears the other bits. Shifted, that is bit 0;
      // the product moves bit 0 of byte j to bit 56 + j.
      bytes = (bytes | ((bytes & 0x7f7f7f7f7f7f7f7fu) + 0x7f7f7f7f7f7f7f7fu)) & 0x8080808080808080u;
      word |= ((bytes >> 7) * 0x0102040810204080u >> 56) << (8 * i);
    }
    return word;
  }

  static void pack_word(uint64_t word, int, int64_t row, int64_t* index) {
    for (; word; word &= word - 1) *index++ = row + __builtin_ctzll(word);
  }
};

}  // namespace

constexpr FlagFunctions flag_functions = CompactKernel<Flags>::functions();

}  // namespace portable
}  // namespace sparse_kernels
