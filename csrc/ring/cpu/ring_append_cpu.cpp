// Picks the kernel for this CPU.
#include "ring/cpu/ring_append_cpu.h"

#include "common/check.h"
#include "common/cpu/token_tasks.h"
#include "ring/cpu/task.h"

namespace echo {
namespace {
RingAppendKernel kernel_of(DType dtype, Isa isa) {
#ifdef ECHO_EXT_X86_KERNELS
  const bool bf16 = dtype == DType::kBF16;
  if (bf16 || dtype == DType::kF32) {
    if (isa >= Isa::kAvx512) return bf16 ? append_avx512_bf16 : append_avx512_f32;
    if (isa == Isa::kAvx2) return bf16 ? append_avx2_bf16 : append_avx2_f32;
  }
#endif
  ECHO_CHECK(false, "no ring_append for CPUs in dtype code ", int(dtype), " and ", name_of(isa));
}
}  // namespace

void ring_append_cpu(const RingAppendCpuParams& params, Isa limit, int threads) {
  run_token_tasks(kernel_of(params.dtype, limit), params, params.batch * params.frames * params.frame_tokens,
                  params.heads * params.head_dim, threads);
}
}  // namespace echo
