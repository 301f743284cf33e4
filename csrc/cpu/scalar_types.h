// bfloat16 and float16 as their bits; widen() to the type that a logit is computed in, float or
// double, and narrow() back. `static`: see the linkage rule in instruction_set.h.
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

static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline double double_from_bits(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline uint64_t bits_from_double(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(BFloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }
static inline float widen(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00)  // inf and NaN keep their mantissa
    return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The exponent is shifted as if the value were normal; the product corrects it, exactly, also for
  // subnormal values.
  return float_from_bits(sign | bits_from_float(float_from_bits(magnitude << 13) * 0x1p112f));
}

// Rounded to nearest, ties to even; NaN stays NaN.
static inline void narrow(float value, float* out) { *out = value; }
static inline void narrow(double value, double* out) { *out = value; }
static inline void narrow(float value, BFloat16* out) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
static inline void narrow(float value, Float16* out) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00;
  else if (magnitude >= 0x477ff000)  // 65520 and above
    half = 0x7c00;
  else if (magnitude < 0x38800000)  // subnormal: floats near 1/2 are spaced as halves are there
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  else
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  out->bits = uint16_t(half | (bits >> 16 & 0x8000));
}

}  // namespace sparse_kernels
