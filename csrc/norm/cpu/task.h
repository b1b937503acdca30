// What a launcher hands to an instruction set's kernel.
#pragma once
#include "norm/cpu/norm_cpu.h"

namespace echo {
// Does tokens begin .. end - 1 of B * T.
using NormKernel = void (*)(const NormCpuParams&, int64_t begin, int64_t end);

void norm_avx2_f32(const NormCpuParams&, int64_t begin, int64_t end);
void norm_avx2_bf16(const NormCpuParams&, int64_t begin, int64_t end);
void norm_avx512_f32(const NormCpuParams&, int64_t begin, int64_t end);
void norm_avx512_bf16(const NormCpuParams&, int64_t begin, int64_t end);
}  // namespace echo
