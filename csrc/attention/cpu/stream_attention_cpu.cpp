// Picks the kernel for this CPU and divides the query rows of all heads into tasks.
#include "attention/cpu/stream_attention_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "attention/cpu/task.h"
#include "common/check.h"
#include "common/parallel.h"

namespace echo {
namespace {
constexpr int64_t kRowStep = 6;      // rows a kernel takes at a time
constexpr int64_t kLeastRows = 48;   // below, packing the keys costs more than a second thread gains
constexpr int64_t kMostRows = 420;   // above, a task's rows no longer fit into the second-level cache
constexpr double kLeastWork = 16e6;  // floating-point operations that are worth waking another thread for

struct Choice {
  const char* isa = nullptr;
  AttentionKernel kernel = nullptr;
  const char* why_not = nullptr;
};

// A kernel for AMX would be one more line here.
Choice choose(DType dtype) {
  if (dtype != DType::kF32 && dtype != DType::kBF16)
    return {nullptr, nullptr, "only float32 and bfloat16 are built"};
#ifdef ECHO_EXT_X86_KERNELS
  const bool bf16 = dtype == DType::kBF16;
  if (bf16 && __builtin_cpu_supports("amx-bf16")) {
    return {nullptr, nullptr, "this CPU has AMX, which PyTorch's attention uses in bfloat16"};
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (bf16 && avx512 && __builtin_cpu_supports("avx512bf16"))
    return {"avx512_bf16", flash_avx512bf16_bf16, nullptr};
  if (avx512) return {"avx512", bf16 ? flash_avx512_bf16 : flash_avx512_f32, nullptr};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", bf16 ? flash_avx2_bf16 : flash_avx2_f32, nullptr};
  }
  return {nullptr, nullptr, "this CPU has no AVX2"};
#else
  return {nullptr, nullptr, "this build has no kernels for its CPU"};
#endif
}

// Memory that a thread keeps from task to task.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = static_cast<char*>(std::aligned_alloc(64, size_t(bytes)));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

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

const char* stream_attention_cpu_isa(DType dtype, const char*& why_not) {
  const Choice choice = choose(dtype);
  why_not = choice.why_not;
  return choice.isa;
}

void stream_attention_cpu(const StreamAttentionCpuParams& params, int threads) {
  const Choice choice = choose(params.dtype);
  ECHO_CHECK(choice.kernel, "attention can't run on this CPU: ", choice.why_not);
  const int64_t heads = params.batch * params.heads;
  if (heads == 0 || params.tokens == 0) return;
  const double keys = double(params.sink.tokens + params.memory.tokens + params.ring.tokens);
  if (4.0 * double(heads * params.tokens * params.head_dim) * keys < kLeastWork) threads = 1;
  const int64_t wanted =
      threads > 1 ? parts(4 * threads, heads) : 1;  // enough tasks for threads of unequal speed
  const int64_t rows = std::max(parts(params.tokens, wanted), kLeastRows);
  const int64_t runs = parts(params.tokens, std::min(rows, kMostRows));
  Plan plan{params, choice.kernel, runs, parts(parts(params.tokens, runs), kRowStep) * kRowStep};
  plan.runs = parts(params.tokens, plan.rows);
  run_tasks(heads * plan.runs, threads, Plan::run, &plan);
}
}  // namespace echo
