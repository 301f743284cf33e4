// The body of compaction for one instruction set: included by compact_<isa>.cpp inside its
// namespace, after
//   uint64_t load_word(const uint8_t* mask)    64 flags as bits, the first lowest
//   void pack_word(uint64_t word, int count, int64_t row, int64_t* index)
//       the positions of the word's ``count`` set bits, plus row; may write 64 slots

constexpr int64_t kWord = 64;

inline uint64_t load_word(const uint8_t* mask, int64_t flags) {
  if (flags >= kWord) return load_word(mask);
  uint8_t padded[kWord] = {};
  std::memcpy(padded, mask, size_t(flags));
  return load_word(padded);
}

int64_t count(const uint8_t* mask, int64_t begin, int64_t end) {
  int64_t total = 0;
  for (; begin + kWord <= end; begin += kWord)
    total += __builtin_popcountll(load_word(mask + begin));
  if (begin < end) total += __builtin_popcountll(load_word(mask + begin, end - begin));
  return total;
}

int64_t pack(const uint8_t* mask, int64_t begin, int64_t end, int64_t* index, int64_t at,
             int64_t limit) {
  // Whole words as long as 64 slots are left to write over; then bit by bit.
  for (; begin + kWord <= end && at + kWord <= limit; begin += kWord) {
    const uint64_t word = load_word(mask + begin);
    const int set = __builtin_popcountll(word);
    pack_word(word, set, begin, index + at);
    at += set;
  }
  for (; begin < end && at < limit; begin += kWord)
    for (uint64_t word = load_word(mask + begin, end - begin); word && at < limit; word &= word - 1)
      index[at++] = begin + __builtin_ctzll(word);
  return at;
}
