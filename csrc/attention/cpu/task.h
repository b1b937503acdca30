// What a launcher hands to an instruction set's kernel: query rows of one head, and the memory to work in.
#pragma once
#include "attention/cpu/stream_attention_cpu.h"

namespace echo {
struct AttentionTask {
  int64_t batch = 0, head = 0;
  int64_t begin = 0, end = 0;  // rows of q
};

// Runs `task` in `scratch`, 64-byte aligned; returns the bytes it needs, and does no more than that if it is
// null.
using AttentionKernel = int64_t (*)(const StreamAttentionCpuParams&, const AttentionTask&, char* scratch);

int64_t flash_avx2_f32(const StreamAttentionCpuParams&, const AttentionTask&, char* scratch);
int64_t flash_avx2_bf16(const StreamAttentionCpuParams&, const AttentionTask&, char* scratch);
int64_t flash_avx512_f32(const StreamAttentionCpuParams&, const AttentionTask&, char* scratch);
int64_t flash_avx512_bf16(const StreamAttentionCpuParams&, const AttentionTask&, char* scratch);
int64_t flash_avx512bf16_bf16(const StreamAttentionCpuParams&, const AttentionTask&, char* scratch);
}  // namespace echo
