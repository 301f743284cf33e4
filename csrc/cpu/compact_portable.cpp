#include <cstring>

#include "compact.h"

namespace sparse_kernels {
namespace portable {
namespace {

uint64_t load_word(const uint8_t* mask) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t bytes;
    std::memcpy(&bytes, mask + 8 * i, 8);
    // Bit 7 of each byte: whether the byte is not 0. Then bit 0; then the product moves bit 0 of
    // byte j to bit 56 + j.
    bytes = (bytes | ((bytes & 0x7f7f7f7f7f7f7f7fu) + 0x7f7f7f7f7f7f7f7fu)) & 0x8080808080808080u;
    word |= ((bytes >> 7) * 0x0102040810204080u >> 56) << (8 * i);
  }
  return word;
}

void pack_word(uint64_t word, int, int64_t row, int64_t* index) {
  for (; word; word &= word - 1) *index++ = row + __builtin_ctzll(word);
}

#include "compact_kernel.h"

}  // namespace

const FlagFunctions flag_functions = {count, pack};

}  // namespace portable
}  // namespace sparse_kernels
