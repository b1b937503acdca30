// Gated residual and norm of tokens on the CPU, in one read and one write of each.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "common/tensor_view.h"

namespace echo {
// s = x + gate * y, then norm(s) * scale + shift. What is null is left out: y (s = x), gate (1), shift (0),
// either output.
struct NormCpuParams {
  const void* x = nullptr;      // (B, T, D)
  const void* y = nullptr;      // (B, T, D)
  const void* gate = nullptr;   // (B or 1, F or 1, D), F frames of T / F tokens
  const void* shift = nullptr;  // (B or 1, F or 1, D)
  const void* scale = nullptr;  // (B or 1, F or 1, D)
  void* sum = nullptr;          // (B, T, D), dense: s
  void* out = nullptr;          // (B, T, D), dense: the norm
  DType dtype = DType::kF32;    // float32 or bfloat16, of all
  int64_t batch = 0, tokens = 0, width = 0, frames = 0;
  int64_t x_batch = 0, x_token = 0, y_batch = 0, y_token = 0;  // strides in elements
  // Likewise, 0 where one vector serves all.
  int64_t gate_batch = 0, gate_frame = 0, shift_batch = 0, shift_frame = 0, scale_batch = 0, scale_frame = 0;
  float eps = 0;
  bool centred = true;  // LayerNorm; otherwise RMSNorm
};

inline constexpr int64_t kCpuMaxNormWidth = 8192, kCpuNormStep = 16;  // widths are multiples of the step

// Runs on up to `threads` threads, whose number changes no bit of the result.
void norm_cpu(const NormCpuParams& params, Isa limit, int threads);
}  // namespace echo
