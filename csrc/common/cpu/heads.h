// What the kernels for CPUs that work head by head are given.
#pragma once
#include <cstdint>

namespace echo {
inline constexpr int64_t kCpuHeadDimStep = 16, kCpuMaxHeadDim = 256;  // d is a multiple of the step

// (B, T, H, d) with d contiguous; strides in elements.
struct HeadRows {
  void* ptr = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};
}  // namespace echo
