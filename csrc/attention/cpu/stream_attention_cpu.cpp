// Picks the kernel for this CPU and divides the query rows of all heads into tasks.
#include "attention/cpu/stream_attention_cpu.h"

#include <algorithm>

#include "attention/cpu/task.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace echo {
namespace {
constexpr int64_t kRowStep = 6;      // rows a kernel takes at a time
constexpr int64_t kLeastRows = 48;   // below, packing the keys costs more than a second thread gains
constexpr int64_t kMostRows = 420;   // above, a task's rows no longer fit into the second-level cache
constexpr double kLeastWork = 16e6;  // floating-point operations that are worth waking another thread for

// A kernel for AMX would be one more row here, and one more Isa.
AttentionKernel kernel_of(DType dtype, Isa isa) {
#ifdef ECHO_EXT_X86_KERNELS
  const bool bf16 = dtype == DType::kBF16;
  switch (isa) {
    case Isa::kAvx512Bf16:
      return bf16 ? flash_avx512bf16_bf16 : flash_avx512_f32;
    case Isa::kAvx512:
      return bf16 ? flash_avx512_bf16 : flash_avx512_f32;
    case Isa::kAvx2:
      return bf16 ? flash_avx2_bf16 : flash_avx2_f32;
    case Isa::kNone:
      break;
  }
#endif
  ECHO_CHECK(false, "no attention for CPUs in dtype code ", int(dtype), " and ", name_of(isa));
}

struct Plan {
  const StreamAttentionCpuParams& params;
  AttentionKernel kernel;
  int64_t runs, rows;  // runs of rows in each head; rows in each run

  static void run(void* context, int64_t number) {
    const Plan& plan = *static_cast<Plan*>(context);
    AttentionTask task;
    task.batch = number / plan.runs / plan.params.heads;
    task.head = number / plan.runs % plan.params.heads;
    task.begin = number % plan.runs * plan.rows;
    task.end = std::min(task.begin + plan.rows, plan.params.tokens);
    thread_local Scratch scratch;
    plan.kernel(plan.params, task, scratch.at_least(plan.kernel(plan.params, task, nullptr)));
  }
};

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
}  // namespace

Isa stream_attention_cpu_isa(DType dtype, Isa limit) {
  if (dtype == DType::kBF16) return limit;
  if (dtype == DType::kF32) return std::min(limit, Isa::kAvx512);
  return Isa::kNone;
}

void stream_attention_cpu(const StreamAttentionCpuParams& params, Isa limit, int threads) {
  const AttentionKernel kernel = kernel_of(params.dtype, stream_attention_cpu_isa(params.dtype, limit));
  const int64_t heads = params.batch * params.heads;
  if (heads == 0 || params.tokens == 0) return;
  const double keys = double(params.sink.tokens + params.memory.tokens + params.ring.tokens);
  if (4.0 * double(heads * params.tokens * params.head_dim) * keys < kLeastWork) threads = 1;
  const int64_t wanted =
      threads > 1 ? parts(4 * threads, heads) : 1;  // enough tasks for threads of unequal speed
  const int64_t rows = std::max(parts(params.tokens, wanted), kLeastRows);
  const int64_t runs = parts(params.tokens, std::min(rows, kMostRows));
  Plan plan{params, kernel, runs, parts(parts(params.tokens, runs), kRowStep) * kRowStep};
  plan.runs = parts(params.tokens, plan.rows);
  run_tasks(heads * plan.runs, threads, Plan::run, &plan);
}
}  // namespace echo
