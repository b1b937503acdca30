// Storage types of kernels, the same under nvcc and g++; arithmetic is in float (vector.h converts).
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {
struct alignas(2) bf16 {
  uint16_t x;
};

struct alignas(2) f16 {
  uint16_t x;
};
}  // namespace simt
