// One fiber a CUDA thread: switching, and which runs next.
#include "simt/host/state.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 only"
#endif

extern "C" void simt_switch(void** save, void* to);
asm(".text\n.globl simt_switch\n.hidden simt_switch\n.type simt_switch,@function\nsimt_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size simt_switch,.-simt_switch\n");

namespace simt {
namespace rt {
__thread Block* block __attribute__((tls_model("initial-exec"))) = nullptr;

u64 next_random() {  // xorshift64
  u64& x = block->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

namespace {
int random_fiber() {
  int w = block->current_warp;
  if (!block->runnable[w] || next_random() % 4 == 0) {
    const int first = int(next_random() % block->warps);
    int i = 0;
    while (i < block->warps && !block->runnable[(first + i) % block->warps]) ++i;
    if (i == block->warps) return -1;
    w = (first + i) % block->warps;
  }
  u32 lanes = block->runnable[w];
  for (int skip = int(next_random() % __builtin_popcount(lanes)); skip; --skip) lanes &= lanes - 1;
  block->current_warp = w;
  return w * 32 + __builtin_ctz(lanes);
}

// The next fiber, -1 if none can run. Forward and reverse stay in a warp while it can run.
int pick() {
  if (block->config.schedule == kRandom) return random_fiber();
  const bool forward = block->config.schedule == kForward;
  for (int i = 0; i <= block->warps; ++i) {
    const int w = (block->current_warp + (forward ? i : 2 * block->warps - i)) % block->warps;
    const u32 lanes = block->runnable[w];
    if (!lanes) continue;
    block->current_warp = w;
    return w * 32 + (forward ? __builtin_ctz(lanes) : 31 - __builtin_clz(lanes));
  }
  return -1;
}

// fake: where the state of the fiber that goes is kept, null if it never comes back.
void go(void** save, void** fake, int to) {
#if defined(__SANITIZE_ADDRESS__)
  if (to < 0)
    __sanitizer_start_switch_fiber(fake, block->main_stack, block->main_stack_bytes);
  else
    __sanitizer_start_switch_fiber(fake, reinterpret_cast<void*>(block->fibers[to].stack), kStackBytes);
#endif
  block->current = to;
  block->result->counters.switches++;
  if (to >= 0) {
    block->stack = block->fibers[to].stack;
    simt_switch(save, block->fibers[to].sp);
  } else {
    simt_switch(save, block->main_sp);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake ? *fake : nullptr, nullptr, nullptr);
#else
  (void)fake;
#endif
}

void give_way() {
  Fiber& f = self();
  const int to = block->failed ? -1 : pick();
  if (to != f.linear) go(&f.sp, &f.fake_stack, to);
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->main_stack, &block->main_stack_bytes);
#endif
  block->run(block->params);
  Fiber& f = self();
  f.done = true;
  block->live--;
  if (!f.open.empty() || !f.groups.empty())
    report(reinterpret_cast<void*>(block->run), nullptr, "%s exits with un-waited cp.async data",
           who(f.linear).c_str());
  if (stores_pending(f.linear))
    report(reinterpret_cast<void*>(block->run), nullptr, "%s exits while its TMA stores read shared memory",
           who(f.linear).c_str());
  block->runnable[f.warp] &= ~(1u << f.lane);
  Barrier& all = block->barriers[0];  // __syncthreads waits for the threads that live
  if (all.got && all.need < 0 && all.got == block->live) {
    join(all.arrived);
    for (int t : all.waiters) wake(t);
    all = Barrier();
  }
  void* nowhere;
  go(&nowhere, nullptr, pick());
  __builtin_unreachable();
}
}  // namespace

void run_fibers() { go(&block->main_sp, &block->main_fake_stack, pick()); }

void start(Fiber& f) {
  // Stacks are staggered: equal depths of 32 lanes would share their cache sets.
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes - 64 - f.lane * 192);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  f.sp = top - 8;
  wake(f.linear);
}

void sleep(const char* reason) {
  Fiber& f = self();
  f.waits_in = reason;
  block->runnable[f.warp] &= ~(1u << f.lane);
  give_way();
  f.waits_in = nullptr;
}

void wake(int thread) { block->runnable[thread / 32] |= 1u << (thread % 32); }

void fatal() {
  block->failed = true;
  for (;;) give_way();  // no fiber of a failed block is resumed
}
}  // namespace rt
}  // namespace simt
