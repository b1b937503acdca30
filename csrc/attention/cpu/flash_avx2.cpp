#include "attention/cpu/flash_float.h"
#include "common/cpu/avx2.h"

namespace echo {
namespace {
using Way = Float<Avx2, 6, 2>;  // of 16 registers
}

int64_t flash_avx2_f32(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  return flash<Way, float>(params, task, scratch);
}

int64_t flash_avx2_bf16(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  return flash<Way, uint16_t>(params, task, scratch);
}
}  // namespace echo
