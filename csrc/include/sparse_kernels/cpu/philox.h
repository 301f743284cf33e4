// Philox4x32-10 (Salmon et al., SC 2011), a random number generator without state: the same numbers
// as sparse_kernels/philox.py. `static`: see the linkage rule in instruction_set.h.
#pragma once

#include <cstdint>

namespace sparse_kernels {

struct PhiloxWords {
  uint32_t word[4];
};

// The four random words of (seed, step, row).
static inline PhiloxWords philox(uint64_t seed, uint64_t step, uint64_t row) {
  uint32_t c0 = uint32_t(row), c1 = uint32_t(row >> 32), c2 = uint32_t(step),
           c3 = uint32_t(step >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c0;
    const uint64_t p1 = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The number of words, out of 2^32, that keep a row of probability p: p 2^32 rounded up, at least
// 1, and 0 where p is NaN. A row whose word is below it is kept and weighs draw_weight(limit), the
// inverse of the probability that was really used. philox.py's draw_limit is the specification.
static inline uint64_t draw_limit(float p) {
  const float words = p == p ? p * 0x1p32f : 0.0f;  // a conversion of NaN would be undefined
  const uint64_t whole = uint64_t(words), limit = whole + (float(whole) < words);
  return limit > 0 ? limit : p == p;
}
// A limit has at most 24 bits, so that its conversion is exact and the quotient is rounded once.
static inline float draw_weight(uint64_t limit) { return 0x1p32f / float(limit); }

// Uniform in [0, 1): a multiple of 2^-53, because 24 bits cannot tell 100 million rows apart.
static inline double philox_uniform_double(uint64_t seed, uint64_t step, uint64_t row) {
  const PhiloxWords words = philox(seed, step, row);
  const uint64_t bits = uint64_t(words.word[0] >> 5) << 26 | words.word[1] >> 6;
  return double(bits) * 0x1p-53;
}

}  // namespace sparse_kernels
