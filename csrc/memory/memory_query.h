// Normalises and rotates the memory's queries for the attention that reads the evicted frames; see
// echo_ext.memory_xattn.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"
#include "simt/stream.h"

namespace echo {
struct MemoryQueryParams {
  const void* q = nullptr;       // (B, T, H, d)
  const void* weight = nullptr;  // (H * d,) contiguous; null: no norm
  const float* frame_table =
      nullptr;  // (B or 1, F, frame_pairs, 2): cos and sin, T = F * frame_tokens; null: no turn
  const float* grid_table = nullptr;  // (frame_tokens, d / 2 - frame_pairs, 2)
  void* out = nullptr;                // (B, T, H, d) contiguous
  DType dtype = DType::kF32;          // of q, weight and out
  float eps = 0;
  int64_t batch = 0, tokens = 0, heads = 0, head_dim = 0;
  int64_t frame_tokens = 1, frame_pairs = 0;
  int64_t q_stride[3] = {};      // batch, token, head in elements; 0 for a dim of size 1
  int64_t table_stride[2] = {};  // batch, frame
  int64_t grid_stride = 0;       // token
};

void memory_query_fwd(const MemoryQueryParams& p, simt::Stream stream);
}  // namespace echo
