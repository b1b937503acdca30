// Attention of one block over sink, memory and ring on the CPU: what it takes, and which instruction set it
// runs with.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "common/tensor_view.h"

namespace echo {
struct AttentionTier {
  const void* k = nullptr;  // (B, tokens, H, d)
  const void* v = nullptr;  // (B, tokens, H, d)
  int64_t tokens = 0;
  int64_t k_batch = 0, k_token = 0, k_head = 0;  // strides in elements, as all below
  int64_t v_batch = 0, v_token = 0, v_head = 0;
};

struct StreamAttentionCpuParams {
  const void* q = nullptr;  // (B, Tq, H, d)
  void* out = nullptr;      // (B, Tq, H, d)
  float* lse = nullptr;     // (B, H, Tq), dense; null where nobody wants it
  const float* shift =
      nullptr;  // (B or 1, shift_pairs, 2), turns the query for sink and memory; null: no turn
  AttentionTier sink, memory, ring;
  DType dtype = DType::kF32;  // of q, k, v and out: float32 or bfloat16
  int64_t batch = 0, tokens = 0, heads = 0, head_dim = 0;
  int64_t q_batch = 0, q_token = 0, q_head = 0;
  int64_t out_batch = 0, out_token = 0, out_head = 0;
  int64_t shift_batch = 0, shift_pairs = 0;
  float scale = 0;  // above 0
  int64_t last_count =
      1;  // keys there are like the ring's last one, itself included: they weigh as many times
};

inline constexpr int64_t kCpuHeadDimStep = 16, kCpuMaxHeadDim = 256;

// The instruction set of at most `limit` that attention in `dtype` runs with; kNone where no kernel is built.
Isa stream_attention_cpu_isa(DType dtype, Isa limit);

// Runs on up to `threads` threads, whose number changes no bit of the result.
void stream_attention_cpu(const StreamAttentionCpuParams& params, Isa limit, int threads);
}  // namespace echo
