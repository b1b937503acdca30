// The gate that blends memory state and proposal; see echo_ext.gate_blend.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"
#include "simt/stream.h"

namespace echo {
struct GateBlendParams {
  const void* state = nullptr;       // (B, T, D)
  const void* proposal = nullptr;    // (B, T, D)
  const void* weight = nullptr;      // (D, 2 D), the columns for state first
  const void* bias = nullptr;        // (D,) contiguous
  void* out = nullptr;               // (B, T, D) contiguous
  DType dtype = DType::kF32;         // of state, proposal and out
  DType weight_dtype = DType::kF32;  // of weight and bias: the same, or 16 bits beside a float32 state
  int64_t batch = 0, tokens = 0, width = 0;
  // In elements; the last dims are dense.
  int64_t state_stride[2] = {}, proposal_stride[2] = {};  // batch, token; 0 for a dim of size 1
  int64_t weight_stride = 0;                              // row
};

void gate_blend_fwd(const GateBlendParams& p, simt::Stream stream);
}  // namespace echo
