// bfloat16 and float16 as their bits, with the conversions to float that the portable code needs.
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

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }
inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00)  // inf and NaN keep their mantissa
    return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Exponents shifted as if normal; the product puts right what is subnormal too, exactly.
  return float_from_bits(sign | bits_from_float(float_from_bits(magnitude << 13) * 0x1p112f));
}

}  // namespace sparse_kernels
