// Vectors of sixteen floats or eight doubles, in AVX-512. vec_portable.h defines what each function
// does.
#pragma once

#include <immintrin.h>

#include "scalar_types.h"

namespace sparse_kernels {
namespace avx512 {

struct U16x32 {
  __m512i v;

  static U16x32 splat(uint16_t x) { return {_mm512_set1_epi16(short(x))}; }
  static U16x32 load(const void* p) { return {_mm512_loadu_si512(p)}; }
};

inline void store(void* p, U16x32 a) { _mm512_storeu_si512(p, a.v); }
inline U16x32 operator+(U16x32 a, U16x32 b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline U16x32 max_signed(U16x32 a, U16x32 b) { return {_mm512_max_epi16(a.v, b.v)}; }
inline U16x32 select_eq(U16x32 a, U16x32 b, U16x32 x, U16x32 y) {
  return {_mm512_mask_blend_epi16(_mm512_cmpeq_epi16_mask(a.v, b.v), y.v, x.v)};
}
inline U16x32 in_signed_order(U16x32 a) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  constexpr int kXorOfAnd = 0x78;  // a ^ (b & c)
  return {_mm512_ternarylogic_epi32(a.v, _mm512_srai_epi16(a.v, 15), magnitude, kXorOfAnd)};
}

struct F32x16 {
  using Real = float;
  using Words = U16x32;
  static constexpr int kLanes = 16;
  static constexpr int kPowerSteps = 16;
  static constexpr bool kInRegisters = true;
  static constexpr bool kMasks = true;

  __m512 v;

  static F32x16 splat(float x) { return {_mm512_set1_ps(x)}; }
  static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32x16 load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static F32x16 load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
};

inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline __m256i rounded_bits(F32x16 a, BFloat16) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), rounded,
                                               _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
inline __m256i rounded_bits(F32x16 a, Float16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
}
template <class T>
inline void store(T* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded_bits(a, T{}));
}
template <class T>
inline void stream(T* p, F32x16 a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded_bits(a, T{}));
}
inline void stream(float* p, F32x16 a) { _mm512_stream_ps(p, a.v); }
// As in vec_any_order.h. Here a 32-bit word holds two bfloat16: even and odd ones.
inline void load_pair(const BFloat16* p, F32x16& even, F32x16& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))))};
}
inline void put_in_order(const BFloat16*, F32x16& even, F32x16& odd) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 low = _mm512_permutex2var_ps(even.v, first, odd.v);
  odd = {_mm512_permutex2var_ps(even.v, second, odd.v)};
  even = {low};
}
// The upper half is `a` rounded to the nearest bfloat16, ties to even.
inline __m512i rounded_up_half(F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_sub_epi32(down, odd, down, _mm512_set1_epi32(-1));
}
inline __m512i rounded_pair(F32x16 even, F32x16 odd, BFloat16) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded_up_half(even), 16),
                                 rounded_up_half(odd));
}
inline __m512i rounded_pair(F32x16 first, F32x16 second, Float16) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(rounded_bits(first, Float16{})),
                            rounded_bits(second, Float16{}), 1);
}
template <class T>
inline void store_pair(T* p, F32x16 first, F32x16 second) {
  _mm512_storeu_si512(p, rounded_pair(first, second, T{}));
}
template <class T>
inline void stream_pair(T* p, F32x16 first, F32x16 second) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), rounded_pair(first, second, T{}));
}
inline void store_pair(float* p, F32x16 first, F32x16 second) {
  store(p, first);
  store(p + F32x16::kLanes, second);
}
inline void stream_pair(float* p, F32x16 first, F32x16 second) {
  stream(p, first);
  stream(p + F32x16::kLanes, second);
}

inline F32x16 permute(F32x16 a, const int32_t* lanes) {
  return {_mm512_permutexvar_ps(_mm512_loadu_si512(lanes), a.v)};
}

inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 fms(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 select_ge(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), y.v, x.v)};
}
inline F32x16 select_eq(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), y.v, x.v)};
}

inline __mmask16 differs(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ); }
inline F32x16 select_where(__mmask16 mask, F32x16 x, F32x16 y) {
  return {_mm512_mask_blend_ps(mask, y.v, x.v)};
}
inline F32x16 add_where(__mmask16 mask, F32x16 a, F32x16 b) {
  return {_mm512_mask_add_ps(a.v, mask, a.v, b.v)};
}
inline F32x16 fma_where(__mmask16 mask, F32x16 a, F32x16 b, F32x16 c) {
  return {_mm512_mask3_fmadd_ps(a.v, b.v, c.v, mask)};
}

inline double reduce_add(F32x16 a) {
  const __m256 high = _mm512_extractf32x8_ps(a.v, 1);
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(high)));
}
inline float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

inline F32x16 nearest_step(F32x16 d, F32x16 scale, F32x16& f) {
  // Adding 1.5 * 2^23 leaves the rounded sum in the low bits.
  const F32x16 magic = F32x16::splat(12582912.0f);
  const F32x16 shifted = fma(d, scale, magic);
  f = fms(d, scale, shifted - magic);
  return shifted;
}
inline F32x16 power_of_step(F32x16 shifted, F32x16 f, F32x16 slope) {
  const __m512i n = _mm512_castps_si512(shifted.v);
  // A table gives 2^(i/16) for the lowest four bits i of n. The other bits of n are added to the
  // exponent; so are these four, which the entries of the table make up for.
  const __m512i table =
      _mm512_setr_epi32(0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                        0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                        0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
  const F32x16 power = {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_permutexvar_epi32(n, table), _mm512_slli_epi32(n, 19)))};
  return fma(power * f, slope, power);  // f is NaN where d is, whatever n is
}

// x = 2^k m with m in [1, 2), whose upper four bits i choose a c near 1 / m: log(x) = k log(2) -
// log(c) + log(1 + r) with r = c m - 1, exactly, in [-1/35, 1/16]. The polynomial's error is 5e-9
// r. Where i is 0, c is 1: nothing cancels where x is nearly 1. The other c are those near the
// middle of their interval whose log(c) is a float to a thousandth of its last place (Gal 1986).
// The error is below 1.5 ulp.
inline F32x16 vec_log(F32x16 x) {
  const __m512i inverse =
      _mm512_setr_epi32(0x3f800000, 0x3f6a07a7, 0x3f5d6f7f, 0x3f5216d8, 0x3f47cb84, 0x3f3e78db,
                        0x3f3609c0, 0x3f2e575c, 0x3f272796, 0x3f20a8cf, 0x3f1a967f, 0x3f14edfa,
                        0x3f0fb9ab, 0x3f0ae252, 0x3f064290, 0x3f020653);
  const __m512i minus_log =
      _mm512_setr_epi32(0x00000000, 0x3db7c3a0, 0x3e1486ed, 0x3e4a6379, 0x3e7dd5bf, 0x3e97624a,
                        0x3eae9282, 0x3ec4b0ff, 0x3eda3e81, 0x3eee893d, 0x3f012153, 0x3f0aad19,
                        0x3f13c838, 0x3f1c8dc0, 0x3f2538e1, 0x3f2d6d8f);
  const F32x16 k = {_mm512_getexp_ps(x.v)};
  const F32x16 m = {_mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)};
  const __m512i i = _mm512_srli_epi32(_mm512_castps_si512(x.v), 19);
  const F32x16 c = {_mm512_castsi512_ps(_mm512_permutexvar_epi32(i, inverse))};
  const F32x16 log_m = {_mm512_castsi512_ps(_mm512_permutexvar_epi32(i, minus_log))};
  const F32x16 r = fms(m, c, F32x16::splat(1.0f));
  F32x16 p = fma(F32x16::splat(0x1.83f378p-3f), r, F32x16::splat(-0x1.001108p-2f));
  p = fma(p, r, F32x16::splat(0x1.55576cp-2f));
  p = fma(p, r, F32x16::splat(-0.5f));
  const F32x16 low = fma(r * r, p, r) + (x - x);  // NaN for infinity
  return fma(k, F32x16::splat(0x1.62e43p-1f), log_m) + low;
}

// The 16 bytes at p, or those that `kept` names where a row ends before.
struct SixteenBytes {
  template <class T>
  __m128i operator()(const T* p) const {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
};
struct FewerBytes {
  __mmask8 kept;
  template <class T>
  __m128i operator()(const T* p) const {
    return sizeof(T) == 4 ? _mm_maskz_loadu_epi32(kept, p) : _mm_maskz_loadu_epi16(kept, p);
  }
};

// Four columns of sixteen rows, of the bytes that load() returns of each.
template <class T, class Load>
inline void transpose_16_bytes(const T* rows, int64_t row_stride, const Load& load,
                               __m512i (&column)[4]) {
  __m512i z[4];  // rows i, i + 4, i + 8 and i + 12
  const T* quarter[4];
  for (int k = 0; k < 4; ++k) quarter[k] = rows + 4 * k * row_stride;
  for (int i = 0; i < 4; ++i) {
    const int64_t row = i * row_stride;
    z[i] = _mm512_castsi128_si512(load(quarter[0] + row));
    z[i] = _mm512_mask_broadcast_i32x4(z[i], 0x00f0, load(quarter[1] + row));
    z[i] = _mm512_mask_broadcast_i32x4(z[i], 0x0f00, load(quarter[2] + row));
    z[i] = _mm512_mask_broadcast_i32x4(z[i], 0xf000, load(quarter[3] + row));
  }
  const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpacklo_epi32(z[2], z[3]);
  const __m512i c = _mm512_unpackhi_epi32(z[0], z[1]), d = _mm512_unpackhi_epi32(z[2], z[3]);
  column[0] = _mm512_unpacklo_epi64(a, b);
  column[1] = _mm512_unpackhi_epi64(a, b);
  column[2] = _mm512_unpacklo_epi64(c, d);
  column[3] = _mm512_unpackhi_epi64(c, d);
}

// Stores transposed 16 bytes of each row, whose classes are [0, count). A column of 16-bit logits
// holds two classes.
inline void store_classes(const float*, const __m512i (&column)[4], int count, float* x,
                          int stride) {
  for (int k = 0; k < count; ++k) _mm512_storeu_si512(x + k * stride, column[k]);
}
inline void store_classes(const BFloat16*, const __m512i (&column)[4], int count, float* x,
                          int stride) {
  for (int k = 0; k < count; ++k) {
    const __m512i both = column[k / 2];
    _mm512_storeu_si512(x + k * stride,
                        k % 2 ? _mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)))
                              : _mm512_slli_epi32(both, 16));
  }
}
inline void store_classes(const Float16*, const __m512i (&column)[4], int count, float* x,
                          int stride) {
  for (int k = 0; k < count; ++k) {
    const __m512i both = column[k / 2];
    const __m512i low = k % 2 ? _mm512_srli_epi32(both, 16) : both;
    _mm512_storeu_ps(x + k * stride, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(low)));
  }
}

// Contiguous classes of sixteen rows, as row_stats_blocks.h has it for any vector. The last 16
// bytes of a row overlap those before.
template <class T>
inline void transpose(F32x16, const T* rows, int64_t row_stride, int columns, float* x,
                      int stride) {
  constexpr int kColumns = 16 / int(sizeof(T));
  __m512i column[4];
  if (columns < kColumns) {
    const FewerBytes load{__mmask8((1 << columns) - 1)};
    transpose_16_bytes(rows, row_stride, load, column);
    store_classes(rows, column, columns, x, stride);
    return;
  }
  for (int j = 0; j < columns; j += kColumns) {
    const int first = j + kColumns <= columns ? j : columns - kColumns;
    transpose_16_bytes(rows + first, row_stride, SixteenBytes(), column);
    store_classes(rows, column, kColumns, x + first * stride, stride);
  }
}

struct F64x8 {
  using Real = double;
  static constexpr int kLanes = 8;
  static constexpr int kPowerSteps = 1;
  static constexpr bool kInRegisters = true;
  static constexpr bool kMasks = true;

  __m512d v;

  static F64x8 splat(double x) { return {_mm512_set1_pd(x)}; }
  static F64x8 load(const double* p) { return {_mm512_loadu_pd(p)}; }
};

inline void store(double* p, F64x8 a) { _mm512_storeu_pd(p, a.v); }
inline void stream(double* p, F64x8 a) { _mm512_stream_pd(p, a.v); }
inline F64x8 permute(F64x8 a, const int32_t* lanes) {
  const __m256i of_32_bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
  return {_mm512_permutexvar_pd(_mm512_cvtepi32_epi64(of_32_bits), a.v)};
}

inline F64x8 operator+(F64x8 a, F64x8 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64x8 operator-(F64x8 a, F64x8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline F64x8 operator*(F64x8 a, F64x8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64x8 operator/(F64x8 a, F64x8 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline F64x8 fma(F64x8 a, F64x8 b, F64x8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline F64x8 fms(F64x8 a, F64x8 b, F64x8 c) { return {_mm512_fmsub_pd(a.v, b.v, c.v)}; }
inline F64x8 max(F64x8 a, F64x8 b) { return {_mm512_max_pd(a.v, b.v)}; }
inline F64x8 min(F64x8 a, F64x8 b) { return {_mm512_min_pd(a.v, b.v)}; }
inline F64x8 select_ge(F64x8 a, F64x8 b, F64x8 x, F64x8 y) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_GE_OQ), y.v, x.v)};
}

inline __mmask8 differs(F64x8 a, F64x8 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_NEQ_UQ); }
inline F64x8 select_where(__mmask8 mask, F64x8 x, F64x8 y) {
  return {_mm512_mask_blend_pd(mask, y.v, x.v)};
}
inline F64x8 add_where(__mmask8 mask, F64x8 a, F64x8 b) {
  return {_mm512_mask_add_pd(a.v, mask, a.v, b.v)};
}
inline F64x8 fma_where(__mmask8 mask, F64x8 a, F64x8 b, F64x8 c) {
  return {_mm512_mask3_fmadd_pd(a.v, b.v, c.v, mask)};
}

inline double reduce_add(F64x8 a) { return _mm512_reduce_add_pd(a.v); }
inline double reduce_max(F64x8 a) { return _mm512_reduce_max_pd(a.v); }

inline F64x8 nearest_step(F64x8 d, F64x8 scale, F64x8& f) {
  const F64x8 n = {
      _mm512_roundscale_pd((d * scale).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  f = fms(d, scale, n);
  return n;
}
inline F64x8 power_of_step(F64x8 n, F64x8 f, F64x8 slope) {
  return {_mm512_scalef_pd(fma(slope, f, F64x8::splat(1.0)).v, n.v)};
}

inline void split_exponent(F64x8 x, F64x8& m, F64x8& k) {
  const __m512i bits = _mm512_castpd_si512(x.v);
  const __m512i e =
      _mm512_srli_epi64(_mm512_sub_epi64(bits, _mm512_set1_epi64(0x3fe6a09e667f3bcd)), 52);
  m = {_mm512_castsi512_pd(_mm512_sub_epi64(bits, _mm512_slli_epi64(e, 52)))};
  k = {_mm512_cvtepi64_pd(e)};
}

}  // namespace avx512
}  // namespace sparse_kernels
