// What the fuzzer makes of random bytes: numbers, sizes, and memory of an exact size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

// The input's bytes, then zeros.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint64_t number() {
    uint64_t value = 0;
    const size_t taken = std::min(size_, sizeof value);
    if (taken) std::memcpy(&value, data_, taken);
    data_ += taken;
    size_ -= taken;
    // Mixed, so that short inputs make many different numbers too.
    value = (value ^ ++drawn_ * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
    return value ^ value >> 29;
  }
  int64_t below(int64_t bound) { return int64_t(number() % uint64_t(bound)); }
  bool coin() { return number() & 1; }
  // Sizes are mostly small, and around the lengths of vectors and words.
  int64_t size(int64_t most) {
    const int64_t edges[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129};
    const int64_t value = coin() ? edges[below(15)] : below(coin() ? 40 : most + 1);
    return std::min(value, most);
  }
  template <class T>
  std::vector<T> fill(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    for (T& value : values) {
      const uint64_t bits = number();
      std::memcpy(&value, &bits, sizeof value);
    }
    return values;
  }

 private:
  const uint8_t* data_;
  size_t size_;
  uint64_t drawn_ = 0;
};

// Memory that begins at any address and ends exactly where the allocation ends.
class Block {
 public:
  Block(int64_t bytes, int64_t offset)
      : memory_(static_cast<size_t>(bytes + offset)), offset_(offset) {}
  char* begin() { return memory_.data() + offset_; }

 private:
  std::vector<char> memory_;
  int64_t offset_;
};
