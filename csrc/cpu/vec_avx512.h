// Vectors of sixteen floats or eight doubles, in AVX-512. vec_portable.h defines what each function
// does.
#pragma once

#include <immintrin.h>

#include "scalar_types.h"

namespace sparse_kernels {
namespace avx512 {

struct F32x16 {
  using Real = float;
  static constexpr int kLanes = 16;
  static constexpr int kPowerSteps = 1;

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

inline double reduce_add(F32x16 a) {
  const __m256 high = _mm512_extractf32x8_ps(a.v, 1);
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(high)));
}
inline float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

template <class Slope>
inline F32x16 exp2_steps(F32x16 d, F32x16 scale, Slope slope) {
  const F32x16 n = {
      _mm512_roundscale_ps((d * scale).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const F32x16 f = fms(d, scale, n);
  return {_mm512_scalef_ps(fma(slope(f), f, F32x16::splat(1.0f)).v, n.v)};
}

inline void split_exponent(F32x16 x, F32x16& m, F32x16& k) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  m = {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)))};
  k = {_mm512_cvtepi32_ps(e)};
}

struct F64x8 {
  using Real = double;
  static constexpr int kLanes = 8;
  static constexpr int kPowerSteps = 1;

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

inline double reduce_add(F64x8 a) { return _mm512_reduce_add_pd(a.v); }
inline double reduce_max(F64x8 a) { return _mm512_reduce_max_pd(a.v); }

template <class Slope>
inline F64x8 exp2_steps(F64x8 d, F64x8 scale, Slope slope) {
  const F64x8 n = {
      _mm512_roundscale_pd((d * scale).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const F64x8 f = fms(d, scale, n);
  return {_mm512_scalef_pd(fma(slope(f), f, F64x8::splat(1.0)).v, n.v)};
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
