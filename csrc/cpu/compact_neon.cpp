#include <arm_neon.h>

#include <cstdint>

#include "compact_bits.h"
#include "compact_kernel.h"

namespace sparse_kernels {
namespace neon {
namespace {

constexpr int kSparse = 16;  // up to this number of set bits of 64, one by one is faster

struct Flags {
  static uint64_t load_word(const uint8_t* mask) {
    // Each flag that is set leaves one bit of its byte; sums of neighbours collect eight in a byte.
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    const auto bits = [&](int i) {
      const uint8x16_t flags = vld1q_u8(mask + 16 * i);
      return vandq_u8(vtstq_u8(flags, flags), bit);
    };
    const uint8x16_t pairs = vpaddq_u8(vpaddq_u8(bits(0), bits(1)), vpaddq_u8(bits(2), bits(3)));
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(pairs, pairs)), 0);
  }

  static void pack_word(uint64_t word, int count, int64_t row, int64_t* index) {
    if (count <= kSparse) {
      for (; word; word &= word - 1) *index++ = row + __builtin_ctzll(word);
      return;
    }
    for (uint64x2_t base = vdupq_n_u64(uint64_t(row)); word; word >>= 8) {
      const unsigned byte = unsigned(word & 0xff);
      const uint16x8_t positions = vmovl_u8(vcreate_u8(kBits.positions[byte]));
      const uint32x4_t low = vmovl_u16(vget_low_u16(positions)), high = vmovl_high_u16(positions);
      uint64_t* to = reinterpret_cast<uint64_t*>(index);
      vst1q_u64(to, vaddw_u32(base, vget_low_u32(low)));
      vst1q_u64(to + 2, vaddw_high_u32(base, low));
      vst1q_u64(to + 4, vaddw_u32(base, vget_low_u32(high)));
      vst1q_u64(to + 6, vaddw_high_u32(base, high));
      index += __builtin_popcount(byte);
      base = vaddq_u64(base, vdupq_n_u64(8));
    }
  }
};

}  // namespace

constexpr FlagFunctions flag_functions = CompactKernel<Flags>::functions();

}  // namespace neon
}  // namespace sparse_kernels
