// Rotates queries or keys by per-frame ids; see echo_ext.rope_rotate.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"
#include "simt/stream.h"

namespace echo {
struct RopeRotateParams {
  const void* x;             // (B, T, H, d), T = F * frame_tokens
  void* out;                 // (B, T, H, d)
  const float* frame_table;  // (B or 1, F, frame_pairs, 2): cos and sin
  const float* grid_table;   // (frame_tokens, d / 2 - frame_pairs, 2)
  DType dtype;               // of x and out
  int64_t batch, tokens, heads, head_dim;
  int64_t frame_tokens, frame_pairs;
  // In elements; 0 for a dim of size 1. The last dims are dense.
  int64_t x_batch, x_token, x_head;
  int64_t out_batch, out_token, out_head;
  int64_t table_batch, table_frame, table_token;
};

void rope_rotate_fwd(const RopeRotateParams& p, simt::Stream stream);
}  // namespace echo
