// Picks the kernel for this CPU.
#include "norm/cpu/norm_cpu.h"

#include "common/check.h"
#include "common/cpu/token_tasks.h"
#include "norm/cpu/task.h"

namespace echo {
namespace {
NormKernel kernel_of(DType dtype, Isa isa) {
#ifdef ECHO_EXT_X86_KERNELS
  const bool bf16 = dtype == DType::kBF16;
  if (bf16 || dtype == DType::kF32) {
    if (isa >= Isa::kAvx512) return bf16 ? norm_avx512_bf16 : norm_avx512_f32;
    if (isa == Isa::kAvx2) return bf16 ? norm_avx2_bf16 : norm_avx2_f32;
  }
#endif
  ECHO_CHECK(false, "no norm for CPUs in dtype code ", int(dtype), " and ", name_of(isa));
}
}  // namespace

void norm_cpu(const NormCpuParams& params, Isa limit, int threads) {
  run_token_tasks(kernel_of(params.dtype, limit), params, params.batch * params.tokens, params.width,
                  threads);
}
}  // namespace echo
