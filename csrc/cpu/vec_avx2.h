// Eight floats, or four doubles, in AVX2 with FMA and F16C. vec_portable.h says what each function
// means.
#pragma once

#include <immintrin.h>

#include "scalar_types.h"

namespace sparse_kernels {
namespace avx2 {

namespace f32 {

using Real = float;

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};

inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline Vec load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                       _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                                       _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i half = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
inline void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec select_ge(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ))};
}

inline double reduce_add(Vec a) {
  const __m256d four = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)),
                                     _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

constexpr int kPowerSteps = 8;

template <class Slope>
inline Vec exp2_steps(Vec d, Vec scale, Slope slope) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23 leaves the rounded sum in the low bits
  const Vec shifted = fma(d, scale, magic);
  const Vec f = fms(d, scale, shifted - magic);
  const __m256i n = _mm256_castps_si256(shifted.v);
  // 2^(i/8) from a table, by the lowest three bits of n. The rest of n belongs in the exponent, and
  // what these bits add there has been taken from the table.
  const __m256i table = _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                          0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
  const Vec power = {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_permutevar8x32_epi32(table, n), _mm256_slli_epi32(n, 20)))};
  return fma(power * f, slope(f), power);  // NaN is in f, whatever became of it in n
}

inline void split_exponent(Vec x, Vec& m, Vec& k) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  m = {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)))};
  k = {_mm256_cvtepi32_ps(e)};
}

}  // namespace f32

namespace f64 {

using Real = double;

struct Vec {
  static constexpr int kLanes = 4;
  __m256d v;
};

inline Vec splat(double x) { return {_mm256_set1_pd(x)}; }
inline Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline void store(double* p, Vec a) { _mm256_storeu_pd(p, a.v); }

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_pd(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_pd(a.v, b.v, c.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_pd(a.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_pd(a.v, b.v)}; }
inline Vec select_ge(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_GE_OQ))};
}

inline double reduce_add(Vec a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline double reduce_max(Vec a) {
  const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
}

constexpr int kPowerSteps = 1;

template <class Slope>
inline Vec exp2_steps(Vec d, Vec scale, Slope slope) {
  const Vec magic = splat(0x1.8p52);  // leaves the rounded sum in the low bits
  const Vec shifted = fma(d, scale, magic);
  const Vec f = fms(d, scale, shifted - magic);
  const Vec p = fma(slope(f), f, splat(1.0));
  const __m256i biased = _mm256_add_epi64(_mm256_castpd_si256(shifted.v), _mm256_set1_epi64x(1023));
  return p * Vec{_mm256_castsi256_pd(_mm256_slli_epi64(biased, 52))};  // a product keeps NaN
}

inline void split_exponent(Vec x, Vec& m, Vec& k) {
  const __m256i bits = _mm256_castpd_si256(x.v);
  const __m256i e =
      _mm256_srli_epi64(_mm256_sub_epi64(bits, _mm256_set1_epi64x(0x3fe6a09e667f3bcd)), 52);
  m = {_mm256_castsi256_pd(_mm256_sub_epi64(bits, _mm256_slli_epi64(e, 52)))};
  // An integer below 2^52 in the mantissa of 2^52.
  const Vec two52 = splat(0x1p52);
  k = Vec{_mm256_castsi256_pd(_mm256_or_si256(e, _mm256_castpd_si256(two52.v)))} - two52;
}

}  // namespace f64

}  // namespace avx2
}  // namespace sparse_kernels
