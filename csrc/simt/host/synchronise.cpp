// Barriers of a block and cp.async.
#include <cstring>

#include "simt/host/state.h"

namespace simt {
namespace rt {
void barrier(int id, int threads, bool wait) {
  Fiber& f = self();
  if (id < kNamedBarriers) f.pc = SIMT_CALLER;
  if (id < 0 || id >= kNamedBarriers + kWarpgroups || (threads > 0 && threads % 32)) {
    report(SIMT_CALLER, nullptr, "no such named barrier: %d of %d threads", id, threads);
    fatal();
  }
  Barrier& b = block->barriers[id];
  if (b.got && b.need != threads) {
    report(SIMT_CALLER, nullptr, "%s: barrier %d used with counts %d and %d", who(f.linear).c_str(), id,
           b.need, threads);
    fatal();
  }
  b.need = threads;
  b.got++;
  b.arrived.push_back(f.linear);
  if (b.got == (threads < 0 ? block->live : threads)) {
    if (id < kNamedBarriers) join(b.arrived);
    for (int t : b.waiters) wake(t);
    b = Barrier();
    return;
  }
  if (!wait) return;
  b.waiters.push_back(f.linear);
  static const char* const names[] = {"barrier 0",  "barrier 1",  "barrier 2",  "barrier 3",
                                      "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
                                      "barrier 8",  "barrier 9",  "barrier 10", "barrier 11",
                                      "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  sleep(id < kNamedBarriers ? names[id] : "wgmma commit or wait");
}

// The destination turns to NaN at issue and is filled only at the wait of the issuing thread, so a wait that
// is missing or a buffer that is refilled too early shows in the numbers as well as in the reports.
void cp_async(u32 dst, const void* src, int bytes, int source_bytes) {
  check_shared(dst, size_t(bytes), bytes, SIMT_CALLER, "cp.async");
  if (source_bytes && uptr(src) % uptr(bytes)) {
    report(SIMT_CALLER, nullptr, "%s: cp.async from a misaligned global address",
           who(block->current).c_str());
    fatal();
  }
  if (source_bytes && !global_ok(uptr(src), size_t(source_bytes), false, SIMT_CALLER)) fatal();
  if (block->config.race) touch(dst, size_t(bytes), true, SIMT_CALLER, block->current, kIssue);
  std::memset(block->smem + dst, 0xff, size_t(bytes));
  self().open.push_back({dst, src, bytes, source_bytes});
}

void cp_commit() {
  Fiber& f = self();
  f.groups.emplace_back();
  f.groups.back().swap(f.open);
}

void cp_wait(int keep) {
  Fiber& f = self();
  const size_t done = f.groups.size() > size_t(keep) ? f.groups.size() - size_t(keep) : 0;
  for (size_t g = 0; g < done; ++g)
    for (const Copy& c : f.groups[g]) {
      std::memcpy(block->smem + c.dst, c.src, size_t(c.source_bytes));
      std::memset(block->smem + c.dst + c.source_bytes, 0, size_t(c.bytes - c.source_bytes));
      if (block->config.race)
        delivered(c.dst, size_t(c.bytes), f.linear, block->own_clock(f.linear), SIMT_CALLER);
    }
  f.groups.erase(f.groups.begin(), f.groups.begin() + long(done));
}
}  // namespace rt
}  // namespace simt
