#include <immintrin.h>

#include <cstdint>

#include "compact_bits.h"
#include "compact_kernel.h"

namespace sparse_kernels {
namespace avx2 {
namespace {

constexpr int kSparse = 16;  // up to this number of set bits of 64, one by one is faster

struct Flags {
  static uint64_t load_word(const uint8_t* mask) {
    const __m256i zero = _mm256_setzero_si256();
    const auto half = [&](const uint8_t* flags) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags));
      return uint32_t(~_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, zero)));
    };
    return uint64_t(half(mask + 32)) << 32 | half(mask);
  }

  static void pack_word(uint64_t word, int count, int64_t row, int64_t* index) {
    if (count <= kSparse) {
      // Always eight at a time, even where fewer are set: fewer branches to mispredict.
      for (int done = 0; done < count; done += 8)
        for (int i = 0; i < 8; ++i) {
          *index++ = row + int64_t(_tzcnt_u64(word));
          word = _blsr_u64(word);
        }
      return;
    }
    for (__m256i base = _mm256_set1_epi64x(row); word; word >>= 8) {
      const int byte = int(word & 0xff);
      const __m128i positions = _mm_cvtsi64_si128(int64_t(kBits.positions[byte]));
      const __m256i low = _mm256_add_epi64(base, _mm256_cvtepu8_epi64(positions));
      const __m256i high =
          _mm256_add_epi64(base, _mm256_cvtepu8_epi64(_mm_srli_epi64(positions, 32)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(index), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + 4), high);
      index += __builtin_popcount(unsigned(byte));
      base = _mm256_add_epi64(base, _mm256_set1_epi64x(8));
    }
  }
};

}  // namespace

constexpr FlagFunctions flag_functions = CompactKernel<Flags>::functions();

}  // namespace avx2
}  // namespace sparse_kernels
