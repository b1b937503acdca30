// Storage types in plain C++, rounding as the GPU's conversions do.
#pragma once
#include <cstdint>
#include <cstring>

namespace simt {
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float bf16_value(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

inline uint16_t bf16_bits(float x) {
  const uint32_t bits = bits_of_float(x);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return (sign ? -1.f : 1.f) * float(fraction) * 0x1p-24f;
  return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t f16_bits(float x) {
  const uint16_t sign = uint16_t(bits_of_float(x) >> 16 & 0x8000);
  uint32_t bits = bits_of_float(x) & 0x7fffffff;
  if (bits > 0x7f800000) return 0x7fff;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (bits < 0x38800000)                         // subnormal: adding 0.5 rounds to a multiple of 2^-24
    return uint16_t(sign | (bits_of_float(float_of_bits(bits) + 0.5f) - 0x3f000000));
  bits += 0xfff + (bits >> 13 & 1);
  return uint16_t(sign | (bits - 0x38000000) >> 13);
}

inline uint32_t round_tf32(float x) {
  const uint32_t bits = bits_of_float(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}
}  // namespace simt
