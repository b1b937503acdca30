// Norm, rotation and ring write of a block's queries, keys and values on the CPU, in one read and one write
// of each.
#pragma once
#include <cstdint>

#include "common/cpu/heads.h"
#include "common/cpu/isa.h"
#include "common/tensor_view.h"

namespace echo {
struct RingAppendCpuParams {
  HeadRows q, k, v;                        // (B, F * frame_tokens, H, d)
  HeadRows out;                            // like q: rotated queries
  HeadRows ring_k, ring_v, ring_raw;       // (B, slots * frame_tokens, H, d); ring_raw may be null
  const void* q_weight = nullptr;          // (H * d); null leaves q as it is
  const void* k_weight = nullptr;          // (H * d); null leaves k as it is
  const float* frame_table = nullptr;      // (B or 1, F, frame_pairs, 2)
  const float* key_frame_table = nullptr;  // likewise, for keys
  const float* grid_table = nullptr;       // (frame_tokens, d / 2 - frame_pairs, 2)
  const int64_t* slots = nullptr;          // (B or 1, F), all inside the ring
  DType dtype = DType::kF32;               // float32 or bfloat16
  int64_t batch = 0, frames = 0, frame_tokens = 0, heads = 0, head_dim = 0, frame_pairs = 0;
  int64_t table_batch = 0, key_table_batch = 0, slots_batch = 0;  // strides, 0 where one row serves all
  float eps = 0;
};

// Runs on up to `threads` threads, whose number changes no bit of the result. The slots of a row must differ.
void ring_append_cpu(const RingAppendCpuParams& params, Isa limit, int threads);
}  // namespace echo
