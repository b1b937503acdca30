// What a launcher hands to an instruction set's kernel.
#pragma once
#include "ring/cpu/ring_append_cpu.h"

namespace echo {
// Does tokens begin .. end - 1 of B * F * frame_tokens.
using RingAppendKernel = void (*)(const RingAppendCpuParams&, int64_t begin, int64_t end);

void append_avx2_f32(const RingAppendCpuParams&, int64_t begin, int64_t end);
void append_avx2_bf16(const RingAppendCpuParams&, int64_t begin, int64_t end);
void append_avx512_f32(const RingAppendCpuParams&, int64_t begin, int64_t end);
void append_avx512_bf16(const RingAppendCpuParams&, int64_t begin, int64_t end);
}  // namespace echo
