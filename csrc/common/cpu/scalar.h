// What every CPU kernel file needs of scalars. Each is compiled with its instruction set's flags, so all of
// this has internal linkage: a copy compiled for one set must never run on a CPU that lacks it.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ECHO_INLINE inline __attribute__((always_inline))
#define ECHO_UNROLL _Pragma("GCC unroll 16")

namespace echo {
namespace {
ECHO_INLINE float to_float(float x) { return x; }
ECHO_INLINE float to_float(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

ECHO_INLINE void put(float* to, float x) { *to = x; }
ECHO_INLINE void put(uint16_t* to, float x) {  // to the nearest bfloat16, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  *to = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ECHO_INLINE int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
ECHO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
}  // namespace
}  // namespace echo
