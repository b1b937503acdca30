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
  int64_t x_stride[2] = {}, y_stride[2] = {};  // batch, token; in elements
  int64_t gate_stride[2] = {}, shift_stride[2] = {},
          scale_stride[2] = {};  // batch, frame; 0 for a dim of size 1
};

void modulate_fwd(const ModulateParams& p, simt::Stream stream);
}  // namespace echo
