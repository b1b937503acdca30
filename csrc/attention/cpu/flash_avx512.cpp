#include "attention/cpu/flash_float.h"
#include "common/cpu/avx512.h"

namespace echo {
namespace {
using Way = Float<Avx512, 6, 4>;  // of 32 registers
}

int64_t flash_avx512_f32(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  return flash<Way, float>(params, task, scratch);
}

int64_t flash_avx512_bf16(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  return flash<Way, uint16_t>(params, task, scratch);
}
}  // namespace echo
