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

// Uniform in [0, 1): a multiple of 2^-24, a function of (seed, step, row) alone.
static inline float philox_uniform(uint64_t seed, uint64_t step, uint64_t row) {
  return float(philox(seed, step, row).word[0] >> 8) * 0x1p-24f;
}

// Uniform in [0, 1): a multiple of 2^-53, because 24 bits cannot tell 100 million rows apart.
static inline double philox_uniform_double(uint64_t seed, uint64_t step, uint64_t row) {
  const PhiloxWords words = philox(seed, step, row);
  const uint64_t bits = uint64_t(words.word[0] >> 5) << 26 | words.word[1] >> 6;
  return double(bits) * 0x1p-53;
}

}  // namespace sparse_kernels
