// Gated residual, LayerNorm, scale and shift; see echo_ext.modulate, gated_add and gated_modulate.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"
#include "simt/stream.h"

namespace echo {
struct ModulateParams {
  const void* x = nullptr;      // (B, T, D), T = F * frame_tokens
  const void* y = nullptr;      // (B, T, D), added to x; null: nothing is
  const void* gate = nullptr;   // (B or 1, F, D), times y; null: 1
  const void* shift = nullptr;  // (B or 1, F, D), or (D,)
  const void* scale = nullptr;  // likewise
  void* sum = nullptr;          // (B, T, D) contiguous: x + gate * y, if y
  void* out = nullptr;          // (B, T, D) contiguous: its norm, scaled and shifted; null: no norm
  DType dtype = DType::kF32;    // of all of them
  float eps = 0;
  int64_t batch = 0, tokens = 0, width = 0, frame_tokens = 0;
  // In elements; 0 where a dim has one index or none.
  int64_t x_batch = 0, x_token = 0, y_batch = 0, y_token = 0;
  int64_t gate_batch = 0, gate_frame = 0, shift_batch = 0, shift_frame = 0, scale_batch = 0, scale_frame = 0;
};

void modulate_fwd(const ModulateParams& p, simt::Stream stream);
}  // namespace echo
