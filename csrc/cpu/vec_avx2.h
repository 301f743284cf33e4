// Vectors of eight floats or four doubles, in AVX2 with FMA and F16C. vec_portable.h defines what
// each function does.
#pragma once

#include <immintrin.h>

#include "scalar_types.h"

namespace sparse_kernels {
namespace avx2 {

struct U16x16 {
  __m256i v;

  static U16x16 splat(uint16_t x) { return {_mm256_set1_epi16(short(x))}; }
  static U16x16 load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
};

inline void store(void* p, U16x16 a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
inline U16x16 operator+(U16x16 a, U16x16 b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline U16x16 max_signed(U16x16 a, U16x16 b) { return {_mm256_max_epi16(a.v, b.v)}; }
inline U16x16 select_eq(U16x16 a, U16x16 b, U16x16 x, U16x16 y) {
  return {_mm256_blendv_epi8(y.v, x.v, _mm256_cmpeq_epi16(a.v, b.v))};
}
inline U16x16 in_signed_order(U16x16 a) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  return {_mm256_xor_si256(a.v, _mm256_and_si256(_mm256_srai_epi16(a.v, 15), magnitude))};
}

struct F32x8 {
  using Real = float;
  using Words = U16x16;
  static constexpr int kLanes = 8;
  static constexpr int kPowerSteps = 8;
  static constexpr bool kInRegisters = true;
  static constexpr bool kMasks = false;

  __m256 v;

  static F32x8 splat(float x) { return {_mm256_set1_ps(x)}; }
  static F32x8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32x8 load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static F32x8 load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
};

inline void store(float* p, F32x8 a) { _mm256_storeu_ps(p, a.v); }
inline __m128i rounded_bits(F32x8 a, BFloat16) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                       _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                                       _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i half = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
inline __m128i rounded_bits(F32x8 a, Float16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
}
template <class T>
inline void store(T* p, F32x8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded_bits(a, T{}));
}
template <class T>
inline void stream(T* p, F32x8 a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), rounded_bits(a, T{}));
}
inline void stream(float* p, F32x8 a) { _mm256_stream_ps(p, a.v); }
// As in vec_any_order.h. Here a 32-bit word holds two bfloat16: even and odd ones.
inline void load_pair(const BFloat16* p, F32x8& even, F32x8& odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))))};
}
inline void put_in_order(const BFloat16*, F32x8& even, F32x8& odd) {
  const __m256 a = _mm256_unpacklo_ps(even.v, odd.v), b = _mm256_unpackhi_ps(even.v, odd.v);
  even = {_mm256_permute2f128_ps(a, b, 0x20)};
  odd = {_mm256_permute2f128_ps(a, b, 0x31)};
}
// The upper half is `a` rounded to the nearest bfloat16, ties to even.
inline __m256i rounded_up_half(F32x8 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline __m256i rounded_pair(F32x8 even, F32x8 odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded_up_half(even), 16), rounded_up_half(odd),
                            0xaa);
}
inline void store_pair(BFloat16* p, F32x8 even, F32x8 odd) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded_pair(even, odd));
}
inline void stream_pair(BFloat16* p, F32x8 even, F32x8 odd) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded_pair(even, odd));
}
inline F32x8 permute(F32x8 a, const int32_t* lanes) {
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
  return {_mm256_permutevar8x32_ps(a.v, index)};
}

inline F32x8 operator+(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32x8 operator-(F32x8 a, F32x8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32x8 operator*(F32x8 a, F32x8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32x8 operator/(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x8 fms(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
inline F32x8 max(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32x8 min(F32x8 a, F32x8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32x8 select_ge(F32x8 a, F32x8 b, F32x8 x, F32x8 y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ))};
}
inline F32x8 select_eq(F32x8 a, F32x8 b, F32x8 x, F32x8 y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))};
}

inline double reduce_add(F32x8 a) {
  const __m256d four = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)),
                                     _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline float reduce_max(F32x8 a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline F32x8 nearest_step(F32x8 d, F32x8 scale, F32x8& f) {
  // Adding 1.5 * 2^23 leaves the rounded sum in the low bits.
  const F32x8 magic = F32x8::splat(12582912.0f);
  const F32x8 shifted = fma(d, scale, magic);
  f = fms(d, scale, shifted - magic);
  return shifted;
}
inline F32x8 power_of_step(F32x8 shifted, F32x8 f, F32x8 slope) {
  const __m256i n = _mm256_castps_si256(shifted.v);
  // A table gives 2^(i/8) for the lowest three bits i of n. The other bits of n are added to the
  // exponent; so are these three, which the entries of the table make up for.
  const __m256i table = _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                          0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
  const F32x8 power = {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_permutevar8x32_epi32(table, n), _mm256_slli_epi32(n, 20)))};
  return fma(power * f, slope, power);  // f is NaN where d is, whatever n is
}

inline void split_exponent(F32x8 x, F32x8& m, F32x8& k) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  m = {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)))};
  k = {_mm256_cvtepi32_ps(e)};
}

// Four logits.
inline __m128 load_4(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load_4(const BFloat16* p) {
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
}
inline __m128 load_4(const Float16* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// Contiguous classes of eight rows, as row_stats_blocks.h has it for any vector; four at a time,
// the last four overlap those before.
template <class T>
inline void transpose(F32x8, const T* rows, int64_t row_stride, int columns, float* x, int stride) {
  for (int j = 0; columns >= 4 && j < columns; j += 4) {
    const int first = j + 4 <= columns ? j : columns - 4;
    __m256 z[4];  // rows i and i + 4
    for (int i = 0; i < 4; ++i) {
      const T* p = rows + i * row_stride + first;
      z[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(load_4(p)), load_4(p + 4 * row_stride), 1);
    }
    const __m256 a = _mm256_unpacklo_ps(z[0], z[1]), b = _mm256_unpacklo_ps(z[2], z[3]);
    const __m256 c = _mm256_unpackhi_ps(z[0], z[1]), d = _mm256_unpackhi_ps(z[2], z[3]);
    float* out = x + first * stride;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(a, b, 0x44));
    _mm256_storeu_ps(out + stride, _mm256_shuffle_ps(a, b, 0xee));
    _mm256_storeu_ps(out + 2 * stride, _mm256_shuffle_ps(c, d, 0x44));
    _mm256_storeu_ps(out + 3 * stride, _mm256_shuffle_ps(c, d, 0xee));
  }
  for (int j = 0; columns < 4 && j < columns; ++j)
    for (int i = 0; i < 8; ++i) x[j * stride + i] = widen(rows[i * row_stride + j]);
}

struct F64x4 {
  using Real = double;
  static constexpr int kLanes = 4;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kInRegisters = true;
  static constexpr bool kMasks = false;

  __m256d v;

  static F64x4 splat(double x) { return {_mm256_set1_pd(x)}; }
  static F64x4 load(const double* p) { return {_mm256_loadu_pd(p)}; }
};

inline void store(double* p, F64x4 a) { _mm256_storeu_pd(p, a.v); }
inline void stream(double* p, F64x4 a) { _mm256_stream_pd(p, a.v); }
inline F64x4 permute(F64x4 a, const int32_t* lanes) {
  // As pairs of floats: lanes 2 i and 2 i + 1.
  const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes));
  const __m256i even = _mm256_slli_epi64(_mm256_cvtepi32_epi64(index), 1);
  const __m256i odd = _mm256_slli_epi64(_mm256_add_epi64(even, _mm256_set1_epi64x(1)), 32);
  const __m256 found = _mm256_permutevar8x32_ps(_mm256_castpd_ps(a.v), _mm256_or_si256(even, odd));
  return {_mm256_castps_pd(found)};
}

inline F64x4 operator+(F64x4 a, F64x4 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline F64x4 operator-(F64x4 a, F64x4 b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline F64x4 operator*(F64x4 a, F64x4 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline F64x4 operator/(F64x4 a, F64x4 b) { return {_mm256_div_pd(a.v, b.v)}; }
inline F64x4 fma(F64x4 a, F64x4 b, F64x4 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline F64x4 fms(F64x4 a, F64x4 b, F64x4 c) { return {_mm256_fmsub_pd(a.v, b.v, c.v)}; }
inline F64x4 max(F64x4 a, F64x4 b) { return {_mm256_max_pd(a.v, b.v)}; }
inline F64x4 min(F64x4 a, F64x4 b) { return {_mm256_min_pd(a.v, b.v)}; }
inline F64x4 select_ge(F64x4 a, F64x4 b, F64x4 x, F64x4 y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_GE_OQ))};
}

inline double reduce_add(F64x4 a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline double reduce_max(F64x4 a) {
  const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
}

inline F64x4 nearest_step(F64x4 d, F64x4 scale, F64x4& f) {
  // Adding 1.5 * 2^52 leaves the rounded sum in the low bits.
  const F64x4 magic = F64x4::splat(0x1.8p52);
  const F64x4 shifted = fma(d, scale, magic);
  f = fms(d, scale, shifted - magic);
  return shifted;
}
inline F64x4 power_of_step(F64x4 shifted, F64x4 f, F64x4 slope) {
  const F64x4 p = fma(slope, f, F64x4::splat(1.0));
  const __m256i biased = _mm256_add_epi64(_mm256_castpd_si256(shifted.v), _mm256_set1_epi64x(1023));
  return p * F64x4{_mm256_castsi256_pd(_mm256_slli_epi64(biased, 52))};  // a product keeps NaN
}

inline void split_exponent(F64x4 x, F64x4& m, F64x4& k) {
  const __m256i bits = _mm256_castpd_si256(x.v);
  const __m256i e =
      _mm256_srli_epi64(_mm256_sub_epi64(bits, _mm256_set1_epi64x(0x3fe6a09e667f3bcd)), 52);
  m = {_mm256_castsi256_pd(_mm256_sub_epi64(bits, _mm256_slli_epi64(e, 52)))};
  // To double: the integer, which is below 2^52, goes into the mantissa of 2^52.
  const F64x4 two52 = F64x4::splat(0x1p52);
  k = F64x4{_mm256_castsi256_pd(_mm256_or_si256(e, _mm256_castpd_si256(two52.v)))} - two52;
}

}  // namespace avx2
}  // namespace sparse_kernels
