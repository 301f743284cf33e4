// Compaction with one instruction set, 64 flags at a time.
//
// `Flags` is a type of that instruction set, with
//   static uint64_t load_word(const uint8_t* mask)    64 flags as bits, the first in bit 0
//   static void pack_word(uint64_t word, int count, int64_t row, int64_t* index)
//       writes row + the position of each of the word's `count` set bits; may write 64 slots
#pragma once

#include <cstdint>
#include <cstring>

#include "compact_functions.h"

namespace sparse_kernels {

template <class Flags>
struct CompactKernel {
  static constexpr int64_t kWord = 64;

  // `flags` of them; the other bits are 0.
  static uint64_t load_word(const uint8_t* mask, int64_t flags) {
    if (flags >= kWord) return Flags::load_word(mask);
    uint8_t padded[kWord] = {};
    std::memcpy(padded, mask, size_t(flags));
    return Flags::load_word(padded);
  }

  static int64_t count(const uint8_t* mask, int64_t begin, int64_t end) {
    int64_t total = 0;
    for (; begin + kWord <= end; begin += kWord)
      total += __builtin_popcountll(Flags::load_word(mask + begin));
    if (begin < end) total += __builtin_popcountll(load_word(mask + begin, end - begin));
    return total;
  }

  static int64_t pack(const uint8_t* mask, int64_t begin, int64_t end, int64_t* index, int64_t slot,
                      int64_t limit) {
    // Whole words as long as there are 64 slots to write over; then bit by bit.
    for (; begin + kWord <= end && slot + kWord <= limit; begin += kWord) {
      const uint64_t word = Flags::load_word(mask + begin);
      const int set = __builtin_popcountll(word);
      Flags::pack_word(word, set, begin, index + slot);
      slot += set;
    }
    for (; begin < end && slot < limit; begin += kWord)
      for (uint64_t word = load_word(mask + begin, end - begin); word && slot < limit;
           word &= word - 1)
        index[slot++] = begin + __builtin_ctzll(word);
    return slot;
  }

  static constexpr FlagFunctions functions() { return {count, pack}; }
};

}  // namespace sparse_kernels
