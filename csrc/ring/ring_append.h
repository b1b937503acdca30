// Normalises and rotates a block's queries and keys and writes keys and values into ring slots; see
// echo_ext.ring_append.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"
#include "simt/stream.h"

namespace echo {
struct RingAppendParams {
  const void* q = nullptr;                 // (B, T, H, d), T = F * frame_tokens
  const void* k = nullptr;                 // (B, T, H, d)
  const void* v = nullptr;                 // (B, T, H, d)
  const void* q_weight = nullptr;          // (H * d,) contiguous; null: no norm
  const void* k_weight = nullptr;          // likewise
  const float* frame_table = nullptr;      // (B or 1, F, frame_pairs, 2): cos and sin
  const float* key_frame_table = nullptr;  // the same for the keys
  const float* grid_table = nullptr;       // (frame_tokens, d / 2 - frame_pairs, 2)
  const int64_t* slots = nullptr;          // (B or 1, F); frames of a slot outside the ring are not written
  void* out = nullptr;                     // (B, T, H, d) contiguous
  void* ring_k = nullptr;                  // (B, ring_slots * frame_tokens, H, d)
  void* ring_v = nullptr;                  // likewise
  void* ring_raw = nullptr;                // likewise, or null
  DType dtype = DType::kF32;               // of all but tables and slots
  float eps = 0;
  int64_t batch = 0, tokens = 0, heads = 0, head_dim = 0;
  int64_t frame_tokens = 0, frame_pairs = 0, ring_slots = 0;
  // Batch, token and head in elements, the last dim dense; 0 for a dim of size 1.
  int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {};
  int64_t ring_k_stride[3] = {}, ring_v_stride[3] = {}, ring_raw_stride[3] = {};
  int64_t table_stride[2] = {}, key_table_stride[2] = {};  // batch, frame
  int64_t grid_stride = 0;                                 // token
  int64_t slots_stride[2] = {};                            // batch, frame
};

void ring_append_fwd(const RingAppendParams& p, simt::Stream stream);
}  // namespace echo
