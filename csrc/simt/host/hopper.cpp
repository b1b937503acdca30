// mbarriers, the fences between ordinary and asynchronous accesses, elect and stmatrix.
#include <cstring>

#include "simt/host/state_sm90.h"

namespace simt {
namespace rt {
void reset_hopper() {
  block->hopper = std::make_unique<Hopper>();
  block->hopper->proxy_fence.assign(size_t(block->agents), 0);
  block->hopper->stores.resize(size_t(block->threads));
}

Mbarrier& mbarrier_at(u32 addr, void* pc) {
  const auto found = block->hopper->mbarriers.find(addr);
  if (found == block->hopper->mbarriers.end()) {
    report(pc, nullptr, "%s: the mbarrier at +%u is not initialised", who(block->current).c_str(), addr);
    fatal();
  }
  return found->second;
}

void end_phase_if_complete(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase ^= 1;
  m.pending = m.arrivals;
  m.done_clock.swap(m.clock);
  m.clock.assign(size_t(block->agents), 0);
  for (int t : m.waiters) wake(t);
  m.waiters.clear();
}

void mbar_init(u32 addr, int arrivals) {
  check_shared(addr, 8, 8, SIMT_CALLER, "mbarrier");
  Mbarrier m = {};
  m.arrivals = m.pending = arrivals;
  m.initialiser = block->current;
  m.clock.assign(size_t(block->agents), 0);
  block->hopper->mbarriers[addr] = m;
  if (block->config.race) touch(addr, 8, true, SIMT_CALLER, block->current);
}

void mbar_fence_init() {
  for (auto& entry : block->hopper->mbarriers)
    if (entry.second.initialiser == block->current) entry.second.shown = true;
}

void mbar_arrive(u32 addr, int bytes) {
  Mbarrier& m = mbarrier_at(addr, SIMT_CALLER);
  if (block->config.race) {
    touch(addr, 8, false, SIMT_CALLER, block->current);
    absorb(m.clock.data(), block->clock(block->current));
    block->own_clock(block->current)++;
  }
  if (--m.pending < 0) {
    report(SIMT_CALLER, nullptr, "%s: too many arrivals on mbarrier +%u", who(block->current).c_str(), addr);
    fatal();
  }
  m.bytes += bytes;
  end_phase_if_complete(m);
}

void mbar_wait(u32 addr, int parity) {
  Mbarrier& m = mbarrier_at(addr, SIMT_CALLER);
  Fiber& f = self();
  f.pc = SIMT_CALLER;
  if (block->config.race) touch(addr, 8, false, SIMT_CALLER, block->current);
  while (m.phase == (parity & 1)) {
    m.waiters.push_back(f.linear);
    sleep("mbarrier wait");
  }
  if (block->config.race && !m.done_clock.empty()) absorb(block->clock(f.linear), m.done_clock.data());
}

void fence_proxy_async() {
  if (!block->config.race) return;
  block->hopper->proxy_fence[size_t(block->current)] = block->own_clock(block->current);
  block->own_clock(block->current)++;
}

void check_proxy(u32 offset, size_t bytes, const char* what, void* pc) {
  for (size_t g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) {
    const Cell& c = block->cells[g];
    if (!c.write_clock || c.write_clock == kInFlight || c.writer == block->threads) continue;
    if (c.write_clock > block->hopper->proxy_fence[c.writer])
      report(pc, c.write_pc, "%s shared+%zu, written by %s without fence_proxy_async", what, g * kGranule,
             who(c.writer).c_str());
  }
}

u32 swizzled_offset(u32 offset, int swizzle) {
  const u32 lines = swizzle == 128 ? 7 : swizzle == 64 ? 3 : swizzle == 32 ? 1 : 0;
  return offset ^ ((offset >> 7 & lines) << 4);
}

bool elect_one() {
  last_to_arrive("elect", ~0u, SIMT_CALLER);
  const int elected =
      block->config.schedule == kRandom ? int(block->config.seed % 32) : 0;  // any, but always the same
  return self().lane == elected;
}

void stmatrix(u32 addr, const u32* r, bool trans) {
  Warp& w = block->warp[size_t(self().warp)];
  const int lane = self().lane;
  check_shared(addr, 16, 16, SIMT_CALLER, "stmatrix");
  if (block->config.race) touch(addr, 16, true, SIMT_CALLER, block->current);
  w.addr[lane] = addr;
  std::memcpy(w.r[lane], r, 16);
  if (!last_to_arrive(trans ? "stmatrix.trans" : "stmatrix", ~0u, SIMT_CALLER)) return;
  for (int q = 0; q < 4; ++q) {
    uint16_t m[8][8];
    for (int l = 0; l < 32; ++l)
      for (int half = 0; half < 2; ++half) {
        const int i = l / 4, j = l % 4 * 2 + half;
        (trans ? m[j][i] : m[i][j]) = uint16_t(w.r[l][q] >> (16 * half));
      }
    for (int i = 0; i < 8; ++i) std::memcpy(block->smem + w.addr[q * 8 + i], m[i], 16);
  }
}
}  // namespace rt
}  // namespace simt
