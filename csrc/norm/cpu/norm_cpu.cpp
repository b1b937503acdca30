// Picks the kernel for this CPU and divides the tokens into tasks.
#include "norm/cpu/norm_cpu.h"

#include <algorithm>

#include "common/check.h"
#include "common/parallel.h"
#include "norm/cpu/task.h"

namespace echo {
namespace {
constexpr int64_t kTaskElements = 1 << 15;  // a task this small costs no more than handing it out

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

struct Plan {
  const NormCpuParams& params;
  NormKernel kernel;
  int64_t tokens, each;

  static void run(void* context, int64_t number) {
    const Plan& plan = *static_cast<Plan*>(context);
    const int64_t begin = number * plan.each;
    plan.kernel(plan.params, begin, std::min(begin + plan.each, plan.tokens));
  }
};
}  // namespace

void norm_cpu(const NormCpuParams& params, Isa limit, int threads) {
  const int64_t tokens = params.batch * params.tokens;
  const int64_t each = std::max<int64_t>(1, kTaskElements / params.width);
  Plan plan{params, kernel_of(params.dtype, limit), tokens, each};
  run_tasks((tokens + each - 1) / each, threads, Plan::run, &plan);
}
}  // namespace echo
