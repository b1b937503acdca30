#include "common/parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace echo {
namespace {
struct Job {
  int64_t tasks;
  void (*run)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;
};

// What every thread of a team does: takes tasks until there are none.
void work(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  try {
    for (int64_t task; (task = job.next++) < job.tasks;) job.run(job.context, task);
  } catch (...) {
    if (!job.failed.exchange(true)) job.error = std::current_exception();
  }
}

// Entry point of a parallel region in every OpenMP runtime that gcc's or clang's code runs on.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

ParallelRegion parallel_region() {
  static const ParallelRegion found = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}
}  // namespace

void run_tasks(int64_t tasks, int threads, void (*run)(void* context, int64_t task), void* context) {
  Job job{tasks, run, context};
  if (threads <= 1 || tasks <= 1) {
    work(&job);
  } else if (const ParallelRegion region = parallel_region()) {
    region(work, &job, unsigned(threads), 0);
  } else {
    std::vector<std::thread> team;
    for (int i = 1; i < threads; ++i) team.emplace_back(work, &job);
    work(&job);
    for (std::thread& member : team) member.join();
  }
  if (job.error) std::rethrow_exception(job.error);
}
}  // namespace echo
