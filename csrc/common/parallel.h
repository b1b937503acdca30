// Runs numbered tasks on several threads: the pool that PyTorch uses where there is one, so that no second
// pool competes with it for the cores.
#pragma once
#include <cstdint>

namespace echo {
// Calls run(context, i) for every i < tasks, in any order, on up to `threads` threads; throws what a task
// threw.
void run_tasks(int64_t tasks, int threads, void (*run)(void* context, int64_t task), void* context);
}  // namespace echo
