#include "compact.h"

#include <cstring>
#include <vector>

#include "parallel.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kGrain = 256 * 1024;  // flags a thread must have to be worth waking

// 64 flags as the bits of a word, the first lowest. The product moves bit 0 of byte i to bit 56 +
// i.
uint64_t load_word(const uint8_t* mask) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t bytes;
    std::memcpy(&bytes, mask + 8 * i, 8);
    word |= ((bytes & 0x0101010101010101u) * 0x0102040810204080u >> 56) << (8 * i);
  }
  return word;
}

uint64_t load_word(const uint8_t* mask, int64_t count) {
  if (count >= kWord) return load_word(mask);
  uint8_t padded[kWord] = {};
  std::memcpy(padded, mask, size_t(count));
  return load_word(padded);
}

int64_t count_range(const uint8_t* mask, int64_t begin, int64_t end) {
  int64_t total = 0;
  for (int64_t i = begin; i < end; i += kWord)
    total += __builtin_popcountll(load_word(mask + i, end - i));
  return total;
}

// Packs [begin, end) from slot ``at`` on, as far as ``capacity``.
void pack_range(const uint8_t* mask, const float* weight_in, int64_t begin, int64_t end, int64_t at,
                int64_t capacity, int64_t* index, float* weight) {
  for (int64_t i = begin; i < end && at < capacity; i += kWord)
    for (uint64_t word = load_word(mask + i, end - i); word && at < capacity; word &= word - 1) {
      const int64_t row = i + __builtin_ctzll(word);
      index[at] = row;
      weight[at] = weight_in ? weight_in[row] : 1.0f;
      ++at;
    }
}

}  // namespace

int64_t count_flags(const uint8_t* mask, int64_t rows) {
  const int parts = parts_for(rows, kGrain);
  if (parts == 1) return count_range(mask, 0, rows);
  std::vector<int64_t> counts(parts);
  parallel_parts(rows, parts, kWord, [&](int part, int64_t begin, int64_t end) {
    counts[part] = count_range(mask, begin, end);
  });
  int64_t total = 0;
  for (int64_t count : counts) total += count;
  return total;
}

int64_t compact(const uint8_t* mask, const float* weight_in, int64_t rows, int64_t capacity,
                int64_t* index, float* weight) {
  const int parts = parts_for(rows, kGrain);
  std::vector<int64_t> starts(parts + 1, 0);
  parallel_parts(rows, parts, kWord, [&](int part, int64_t begin, int64_t end) {
    starts[part + 1] = count_range(mask, begin, end);
  });
  for (int part = 0; part < parts; ++part) starts[part + 1] += starts[part];
  parallel_parts(rows, parts, kWord, [&](int part, int64_t begin, int64_t end) {
    pack_range(mask, weight_in, begin, end, starts[part], capacity, index, weight);
  });
  const int64_t total = starts[parts];
  for (int64_t at = total; at < capacity; ++at) {
    index[at] = 0;
    weight[at] = 0.0f;
  }
  return total;
}

}  // namespace sparse_kernels
