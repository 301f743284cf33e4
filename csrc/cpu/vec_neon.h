// Vectors of eight floats or four doubles, as pairs of NEON's registers: one instruction of each
// pair runs while the other waits for its operands. vec_portable.h defines what each function does.
#pragma once

#include <arm_neon.h>

#include "scalar_types.h"

namespace sparse_kernels {
namespace neon {

struct U16x16 {
  uint16x8_t low, high;

  static U16x16 splat(uint16_t x) { return {vdupq_n_u16(x), vdupq_n_u16(x)}; }
  static U16x16 load(const void* p) {
    const uint16_t* const words = static_cast<const uint16_t*>(p);
    return {vld1q_u16(words), vld1q_u16(words + 8)};
  }
};

inline void store(void* p, U16x16 a) {
  uint16_t* const words = static_cast<uint16_t*>(p);
  vst1q_u16(words, a.low);
  vst1q_u16(words + 8, a.high);
}
inline U16x16 operator+(U16x16 a, U16x16 b) {
  return {vaddq_u16(a.low, b.low), vaddq_u16(a.high, b.high)};
}
inline uint16x8_t max_signed(uint16x8_t a, uint16x8_t b) {
  return vreinterpretq_u16_s16(vmaxq_s16(vreinterpretq_s16_u16(a), vreinterpretq_s16_u16(b)));
}
inline U16x16 max_signed(U16x16 a, U16x16 b) {
  return {max_signed(a.low, b.low), max_signed(a.high, b.high)};
}
inline U16x16 select_eq(U16x16 a, U16x16 b, U16x16 x, U16x16 y) {
  return {vbslq_u16(vceqq_u16(a.low, b.low), x.low, y.low),
          vbslq_u16(vceqq_u16(a.high, b.high), x.high, y.high)};
}
inline uint16x8_t in_signed_order(uint16x8_t a) {
  const int16x8_t sign = vshrq_n_s16(vreinterpretq_s16_u16(a), 15);
  return veorq_u16(a, vandq_u16(vreinterpretq_u16_s16(sign), vdupq_n_u16(0x7fff)));
}
inline U16x16 in_signed_order(U16x16 a) {
  return {in_signed_order(a.low), in_signed_order(a.high)};
}

struct F32x8 {
  using Real = float;
  using Words = U16x16;
  static constexpr int kLanes = 8;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kInRegisters = true;
  static constexpr bool kMasks = false;

  float32x4_t low, high;

  static F32x8 splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static F32x8 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static F32x8 load(const BFloat16* p) {
    const uint16x8_t half = vld1q_u16(&p->bits);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(half, 16))};
  }
  static F32x8 load(const Float16* p) {
    const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
    return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
  }
};

inline void store(float* p, F32x8 a) {
  vst1q_f32(p, a.low);
  vst1q_f32(p + 4, a.high);
}
inline uint32x4_t round_to_bfloat16(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7fc00000));
}
inline void store(BFloat16* p, F32x8 a) {
  const uint16x4_t low = vshrn_n_u32(round_to_bfloat16(a.low), 16);
  vst1q_u16(&p->bits, vshrn_high_n_u32(low, round_to_bfloat16(a.high), 16));
}
inline void store(Float16* p, F32x8 a) {
  const float16x8_t half = vcvt_high_f16_f32(vcvt_f16_f32(a.low), a.high);
  vst1q_u16(&p->bits, vreinterpretq_u16_f16(half));
}
template <class T>
inline void stream(T* p, F32x8 a) {
  store(p, a);
}
inline F32x8 permute(F32x8 a, const int32_t* lanes) {
  const uint8x16x2_t table = {vreinterpretq_u8_f32(a.low), vreinterpretq_u8_f32(a.high)};
  const auto picked = [&](const int32_t* p) {
    // The four bytes of lane i are 4 i to 4 i + 3.
    const uint32x4_t first = vmulq_n_u32(vreinterpretq_u32_s32(vld1q_s32(p)), 0x04040404);
    const uint32x4_t bytes = vaddq_u32(first, vdupq_n_u32(0x03020100));
    return vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes)));
  };
  return {picked(lanes), picked(lanes + 4)};
}

inline F32x8 operator+(F32x8 a, F32x8 b) {
  return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
}
inline F32x8 operator-(F32x8 a, F32x8 b) {
  return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
}
inline F32x8 operator*(F32x8 a, F32x8 b) {
  return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
}
inline F32x8 operator/(F32x8 a, F32x8 b) {
  return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)};
}
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
inline F32x8 fms(F32x8 a, F32x8 b, F32x8 c) {
  return fma(a, b, F32x8{vnegq_f32(c.low), vnegq_f32(c.high)});
}
inline F32x8 select_ge(F32x8 a, F32x8 b, F32x8 x, F32x8 y) {
  return {vbslq_f32(vcgeq_f32(a.low, b.low), x.low, y.low),
          vbslq_f32(vcgeq_f32(a.high, b.high), x.high, y.high)};
}
// Not vmaxq_f32 and vminq_f32, which give NaN where a alone is one.
inline F32x8 max(F32x8 a, F32x8 b) {
  return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low),
          vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
}
inline F32x8 min(F32x8 a, F32x8 b) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low),
          vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
}

inline double reduce_add(F32x8 a) {
  const float64x2_t first = vaddq_f64(vcvt_f64_f32(vget_low_f32(a.low)), vcvt_high_f64_f32(a.low));
  const float64x2_t last = vaddq_f64(vcvt_f64_f32(vget_low_f32(a.high)), vcvt_high_f64_f32(a.high));
  return vaddvq_f64(vaddq_f64(first, last));
}
// The largest number: NaN only where all lanes are.
inline float reduce_max(F32x8 a) { return vmaxnmvq_f32(vmaxnmq_f32(a.low, a.high)); }

inline F32x8 nearest_step(F32x8 d, F32x8 scale, F32x8& f) {
  // Adding 1.5 * 2^23 leaves the rounded sum in the low bits.
  const F32x8 magic = F32x8::splat(12582912.0f);
  const F32x8 shifted = fma(d, scale, magic);
  f = fms(d, scale, shifted - magic);
  return shifted;
}
inline F32x8 power_of_step(F32x8 shifted, F32x8 f, F32x8 slope) {
  const F32x8 p = fma(slope, f, F32x8::splat(1.0f));
  const auto power = [](float32x4_t n) {
    const int32x4_t biased = vaddq_s32(vreinterpretq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
  };
  return p * F32x8{power(shifted.low), power(shifted.high)};  // a product keeps NaN
}

inline void split_exponent(float32x4_t x, float32x4_t& m, float32x4_t& k) {
  const int32x4_t bits = vreinterpretq_s32_f32(x);
  const int32x4_t e = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(0x3f3504f3)), 23);
  m = vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(e, 23)));
  k = vcvtq_f32_s32(e);
}
inline void split_exponent(F32x8 x, F32x8& m, F32x8& k) {
  split_exponent(x.low, m.low, k.low);
  split_exponent(x.high, m.high, k.high);
}

struct F64x4 {
  using Real = double;
  static constexpr int kLanes = 4;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kInRegisters = true;
  static constexpr bool kMasks = false;

  float64x2_t low, high;

  static F64x4 splat(double x) { return {vdupq_n_f64(x), vdupq_n_f64(x)}; }
  static F64x4 load(const double* p) { return {vld1q_f64(p), vld1q_f64(p + 2)}; }
};

inline void store(double* p, F64x4 a) {
  vst1q_f64(p, a.low);
  vst1q_f64(p + 2, a.high);
}
inline void stream(double* p, F64x4 a) { store(p, a); }
inline F64x4 permute(F64x4 a, const int32_t* lanes) {
  double all[4];
  store(all, a);
  const double picked[4] = {all[lanes[0]], all[lanes[1]], all[lanes[2]], all[lanes[3]]};
  return F64x4::load(picked);
}

inline F64x4 operator+(F64x4 a, F64x4 b) {
  return {vaddq_f64(a.low, b.low), vaddq_f64(a.high, b.high)};
}
inline F64x4 operator-(F64x4 a, F64x4 b) {
  return {vsubq_f64(a.low, b.low), vsubq_f64(a.high, b.high)};
}
inline F64x4 operator*(F64x4 a, F64x4 b) {
  return {vmulq_f64(a.low, b.low), vmulq_f64(a.high, b.high)};
}
inline F64x4 operator/(F64x4 a, F64x4 b) {
  return {vdivq_f64(a.low, b.low), vdivq_f64(a.high, b.high)};
}
inline F64x4 fma(F64x4 a, F64x4 b, F64x4 c) {
  return {vfmaq_f64(c.low, a.low, b.low), vfmaq_f64(c.high, a.high, b.high)};
}
inline F64x4 fms(F64x4 a, F64x4 b, F64x4 c) {
  return fma(a, b, F64x4{vnegq_f64(c.low), vnegq_f64(c.high)});
}
inline F64x4 select_ge(F64x4 a, F64x4 b, F64x4 x, F64x4 y) {
  return {vbslq_f64(vcgeq_f64(a.low, b.low), x.low, y.low),
          vbslq_f64(vcgeq_f64(a.high, b.high), x.high, y.high)};
}
inline F64x4 max(F64x4 a, F64x4 b) {
  return {vbslq_f64(vcgtq_f64(a.low, b.low), a.low, b.low),
          vbslq_f64(vcgtq_f64(a.high, b.high), a.high, b.high)};
}
inline F64x4 min(F64x4 a, F64x4 b) {
  return {vbslq_f64(vcltq_f64(a.low, b.low), a.low, b.low),
          vbslq_f64(vcltq_f64(a.high, b.high), a.high, b.high)};
}

inline double reduce_add(F64x4 a) { return vaddvq_f64(vaddq_f64(a.low, a.high)); }
inline double reduce_max(F64x4 a) { return vmaxnmvq_f64(vmaxnmq_f64(a.low, a.high)); }

inline F64x4 nearest_step(F64x4 d, F64x4 scale, F64x4& f) {
  // Adding 1.5 * 2^52 leaves the rounded sum in the low bits.
  const F64x4 magic = F64x4::splat(0x1.8p52);
  const F64x4 shifted = fma(d, scale, magic);
  f = fms(d, scale, shifted - magic);
  return shifted;
}
inline F64x4 power_of_step(F64x4 shifted, F64x4 f, F64x4 slope) {
  const F64x4 p = fma(slope, f, F64x4::splat(1.0));
  const auto power = [](float64x2_t n) {
    const int64x2_t biased = vaddq_s64(vreinterpretq_s64_f64(n), vdupq_n_s64(1023));
    return vreinterpretq_f64_s64(vshlq_n_s64(biased, 52));
  };
  return p * F64x4{power(shifted.low), power(shifted.high)};  // a product keeps NaN
}

inline void split_exponent(float64x2_t x, float64x2_t& m, float64x2_t& k) {
  const int64x2_t bits = vreinterpretq_s64_f64(x);
  const int64x2_t e = vshrq_n_s64(vsubq_s64(bits, vdupq_n_s64(0x3fe6a09e667f3bcd)), 52);
  m = vreinterpretq_f64_s64(vsubq_s64(bits, vshlq_n_s64(e, 52)));
  k = vcvtq_f64_s64(e);
}
inline void split_exponent(F64x4 x, F64x4& m, F64x4& k) {
  split_exponent(x.low, m.low, k.low);
  split_exponent(x.high, m.high, k.high);
}

}  // namespace neon
}  // namespace sparse_kernels
