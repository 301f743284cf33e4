#include <immintrin.h>

#include <cstdint>

#include "compact_kernel.h"

namespace sparse_kernels {
namespace avx512 {
namespace {

struct Flags {
  static uint64_t load_word(const uint8_t* mask) {
    const __m512i bytes = _mm512_loadu_si512(mask);
    return _mm512_test_epi8_mask(bytes, bytes);
  }

  static void pack_word(uint64_t word, int, int64_t row, int64_t* index) {
    const __m512i eight = _mm512_set1_epi64(8);
    __m512i rows =
        _mm512_add_epi64(_mm512_set1_epi64(row), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    for (; word; word >>= 8) {
      const unsigned byte = unsigned(word & 0xff);
      // Compressed in a register, then stored whole: compressing stores are slow on some
      // processors.
      _mm512_storeu_si512(index, _mm512_maskz_compress_epi64(__mmask8(byte), rows));
      index += __builtin_popcount(byte);
      rows = _mm512_add_epi64(rows, eight);
    }
  }
};

}  // namespace

constexpr FlagFunctions flag_functions = CompactKernel<Flags>::functions();

}  // namespace avx512
}  // namespace sparse_kernels
