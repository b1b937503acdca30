// Runs the blocks of a grid, one after another.
#include <sys/mman.h>

#include <cstring>

#include "simt/host/state.h"
#include "simt/host/state_sm90.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace rt {
Block::Block() = default;
Block::~Block() = default;

Emulator& emulator() {
  static Emulator e;
  return e;
}

bool planted(u64 mutant) {
  Emulator& e = emulator();
  if (e.mutant != mutant) return false;
  e.total.mutant_hits++;
  return true;
}

namespace {
constexpr size_t kPage = 4096;

// Fiber stacks are kept between launches: page faults cost more than a small launch.
unsigned char* stacks_of(size_t bytes) {
  static __thread unsigned char* pool __attribute__((tls_model("initial-exec"))) = nullptr;
  static __thread size_t pool_bytes __attribute__((tls_model("initial-exec"))) = 0;
  if (pool_bytes < bytes) {
    if (pool) munmap(pool, pool_bytes);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    pool = static_cast<unsigned char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0));
    pool_bytes = bytes;
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(pool, bytes);  // frames of fibers that were abandoned
#endif
  return pool;
}

void report_deadlock() {
  std::map<std::string, int> waiting;
  for (const Fiber& f : block->fibers)
    if (!f.done) waiting[std::string(f.waits_in ? f.waits_in : "?") + " at " + where(f.pc)]++;
  std::string lines;
  for (const auto& w : waiting) lines += "\n    " + std::to_string(w.second) + " threads wait in " + w.first;
  report(nullptr, nullptr, "DEADLOCK: %d of %d threads cannot proceed%s", block->live, block->threads,
         lines.c_str());
}

void start_block(u64 linear) {
  Block& k = *block;
  k.id = dim3(unsigned(linear % k.grid.x), unsigned(linear / k.grid.x % k.grid.y),
              unsigned(linear / k.grid.x / k.grid.y));
  k.linear = linear;
  k.live = k.threads;
  k.failed = false;
  k.current_warp = 0;
  k.runnable.assign(size_t(k.warps), 0);
  std::memset(k.smem, 0xff, k.smem_bytes);  // NaN
  if (k.config.race) {
    k.clocks.assign(size_t(k.agents) * size_t(k.agents), 0);
    k.cells.assign(k.smem_bytes / kGranule + 1, Cell());
    for (int t = 0; t < k.threads; ++t) k.own_clock(t) = 1;
  }
  for (Barrier& b : k.barriers) b = Barrier();
  reset_hopper();
  for (Warp& w : k.warp) std::memset(w.group, 0, sizeof w.group);
  for (int t = 0; t < k.threads; ++t) {
    Fiber& f = k.fibers[size_t(t)];
    f = Fiber();
    f.stack = uptr(k.stacks) + size_t(t) * kStackBytes;
    f.linear = t;
    f.lane = t % 32;
    f.warp = t / 32;
    f.tid = dim3(unsigned(t) % k.dim.x, unsigned(t) / k.dim.x % k.dim.y, unsigned(t) / k.dim.x / k.dim.y);
    start(f);
  }
}
}  // namespace

Result launch(const Config& config, dim3 grid, dim3 dim, size_t smem, void (*run)(void*), void* params,
              size_t param_bytes) {
  Result result;
  Block k;
  block = &k;
  k.config = config;
  k.grid = grid;
  k.dim = dim;
  k.threads = int(dim.x * dim.y * dim.z);
  k.agents = k.threads + 1;
  k.warps = (k.threads + 31) / 32;
  k.run = run;
  k.params = params;
  k.param_bytes = param_bytes;
  k.result = &result;
  k.random = config.seed * 0x9E3779B97F4A7C15ull + 1;
  k.fibers.resize(size_t(k.threads));
  k.warp.resize(size_t(k.warps));
  k.stacks = stacks_of(size_t(k.threads) * kStackBytes);
  // Shared memory ends at an unmapped page, and access() knows the page before it.
  const size_t pages = (smem + kPage - 1) & ~(kPage - 1);
  void* map = mmap(nullptr, pages + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  k.smem = static_cast<unsigned char*>(map) + kPage;
  k.smem_bytes = smem;
  mprotect(k.smem, pages, PROT_READ | PROT_WRITE);
  if (config.race) forget_owners();
  const u64 blocks = u64(grid.x) * grid.y * grid.z;
  for (u64 i = 0; i < blocks && !result.errors; ++i) {
    start_block(i);
    do run_fibers();
    while (!k.failed && k.live && deliver_async());
    if (k.live && !k.failed) report_deadlock();
  }
  munmap(map, pages + 2 * kPage);
  block = nullptr;
  return result;
}
}  // namespace rt
}  // namespace simt
