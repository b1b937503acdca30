// Attention of one block over sink, memory and ring on the CPU: what it takes, and which instruction set it
// runs with.
#pragma once
#include <cstdint>

#include "common/cpu/heads.h"
#include "common/cpu/isa.h"
#include "common/tensor_view.h"

namespace echo {
struct AttentionTier {
  HeadRows k, v;  // (B, tokens, H, d)
  int64_t tokens = 0;
};

struct StreamAttentionCpuParams {
  HeadRows q, out;       // (B, Tq, H, d)
  float* lse = nullptr;  // (B, H, Tq), dense; null where nobody wants it
  // (B or 1, shift_pairs, 2), turns the query for sink and memory; null: no turn
  const float* shift = nullptr;
  AttentionTier sink, memory, ring;
  DType dtype = DType::kF32;  // of q, k, v and out: float32 or bfloat16
  int64_t batch = 0, tokens = 0, heads = 0, head_dim = 0;
  int64_t shift_batch = 0, shift_pairs = 0;
  float scale = 0;         // above 0
  int64_t last_count = 1;  // how many keys there are like the ring's last one: it weighs as many times
};

// The instruction set of at most `limit` that attention in `dtype` runs with; kNone where no kernel is built.
Isa stream_attention_cpu_isa(DType dtype, Isa limit);

// Runs on up to `threads` threads, whose number changes no bit of the result.
void stream_attention_cpu(const StreamAttentionCpuParams& params, Isa limit, int threads);
}  // namespace echo
