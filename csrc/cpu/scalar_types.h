// bfloat16 and float16 as their bits, and what the portable code needs to compute in float or
// double: widen() to the type that a logit is computed in, narrow() back.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparse_kernels {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double double_from_bits(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint64_t bits_from_double(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }
inline float widen(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00)  // inf and NaN keep their mantissa
    return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Exponents shifted as if normal; the product puts right what is subnormal too, exactly.
  return float_from_bits(sign | bits_from_float(float_from_bits(magnitude << 13) * 0x1p112f));
}

// To the nearest, ties to even; NaN stays NaN.
inline void narrow(float value, float* out) { *out = value; }
inline void narrow(double value, double* out) { *out = value; }
inline void narrow(float value, BFloat16* out) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
inline void narrow(float value, Float16* out) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00;
  else if (magnitude >= 0x477ff000)  // 65520 and above
    half = 0x7c00;
  else if (magnitude < 0x38800000)  // subnormal: beside 1/2, a float's steps are those of a half's
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  else
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  out->bits = uint16_t(half | (bits >> 16 & 0x8000));
}

}  // namespace sparse_kernels
