// wgmma. Accumulators leave the registers, which turn to NaN, at the first wgmma of a sum and return at the
// wait; shared memory is read at the wait, so that a stage that is released too early shows in the result.
#include <cmath>
#include <cstring>

#include "simt/host/number.h"
#include "simt/host/state_sm90.h"

namespace simt {
namespace rt {
namespace {
Warpgroup& mine() { return block->hopper->warpgroups[self().warp / 4]; }

// All 128 threads, ordering nothing: the race detector must not take a wgmma for a barrier.
void meet() { barrier(kNamedBarriers + self().warp / 4, 128, true); }

int swizzle_of(u64 descriptor) {
  static const int swizzles[4] = {0, 128, 64, 32};
  return swizzles[descriptor >> 62];
}

// The shared offset of element (mn, k), by the canonical layouts of the PTX ISA.
u32 offset_of(u64 descriptor, int mn, int k, bool mn_major) {
  const u32 start = u32(descriptor & 0x3fff) << 4, leading = u32(descriptor >> 16 & 0x3fff) << 4,
            stride = u32(descriptor >> 32 & 0x3fff) << 4;
  const int line = swizzle_of(descriptor), per_line = line / 2;
  u32 offset;
  if (!line && mn_major)
    offset = u32(mn / 8) * stride + u32(mn % 8 * 2) + u32(k / 8) * leading + u32(k % 8 * 16);
  else if (!line)
    offset = u32(mn / 8) * stride + u32(mn % 8 * 16) + u32(k / 8) * leading + u32(k % 8 * 2);
  else if (mn_major)
    offset = u32(mn / per_line) * leading + u32(mn % per_line * 2) + u32(k / 8) * stride + u32(k % 8 * line);
  else
    offset = u32(mn / 8) * stride + u32(mn % 8 * line) + u32(k * 2);
  return swizzled_offset(start + offset, line);
}

float value_of(int kind, uint16_t bits) { return kind == kMmaBf16 ? bf16_value(bits) : f16_value(bits); }

// Reads (count x 16) into out[mn * 16 + k], 8 neighbours in memory at a time.
void read_matrix(const Wgmma& w, u64 descriptor, int count, bool mn_major, float* out) {
  for (int mn = 0; mn < count; mn += mn_major ? 8 : 1)
    for (int k = 0; k < 16; k += mn_major ? 1 : 8) {
      const u32 offset = offset_of(descriptor, mn, k, mn_major);
      if (offset + 16 > block->smem_bytes) {
        report(w.pc, nullptr, "wgmma reads shared+%u, the block has %zu bytes", offset, block->smem_bytes);
        fatal();
      }
      if (block->config.race) {
        touch(offset, 16, false, w.pc, block->current);
        check_proxy(offset, 16, "wgmma reads", w.pc);
      }
      uint16_t bits[8];
      std::memcpy(bits, block->smem + offset, 16);
      for (int i = 0; i < 8; ++i)
        out[mn_major ? (mn + i) * 16 + k : mn * 16 + k + i] = value_of(w.shape.kind, bits[i]);
    }
}

// A warp's part of A in registers is that of mma m16n8k16.
void read_registers(const Wgmma& w, float* out) {
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half) {
        const int row = t / 32 * 16 + t % 32 / 4 + (i & 1) * 8, k = t % 4 * 2 + (i & 2) * 4 + half;
        out[row * 16 + k] = value_of(w.shape.kind, uint16_t(w.a[t][i] >> (16 * half)));
      }
}

// Moves the accumulators between the registers of 128 threads and a 64 x n matrix.
void move_sums(const Wgmma& w, float* sums, bool out_of_registers) {
  for (int t = 0; t < 128; ++t)
    for (int j = 0; j < w.shape.n / 8; ++j)
      for (int e = 0; e < 4; ++e) {
        float& sum = sums[(t / 32 * 16 + t % 32 / 4 + (e & 2) * 4) * w.shape.n + j * 8 + t % 4 * 2 + (e & 1)];
        float& mine = w.d[t][j * 4 + e];
        if (out_of_registers) {
          sum = mine;
          mine = NAN;
        } else {
          mine = sum;
        }
      }
}

void compute(const Wgmma& w, float* sums) {
  const int n = w.shape.n;
  std::vector<float> a(64 * 16), b(size_t(n) * 16);
  if (w.in_registers)
    read_registers(w, a.data());
  else
    read_matrix(w, w.shape.a, 64, w.shape.trans_a, a.data());
  read_matrix(w, w.shape.b, n, w.shape.trans_b, b.data());
  std::vector<float> columns(size_t(n) * 16);
  for (int j = 0; j < n; ++j)
    for (int k = 0; k < 16; ++k) columns[size_t(k * n + j)] = b[size_t(j * 16 + k)];
  for (int i = 0; i < 64; ++i) {
    float* row = sums + i * n;
    if (!w.shape.accumulate) std::fill(row, row + n, 0.f);
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < n; ++j) row[j] += a[size_t(i * 16 + k)] * columns[size_t(k * n + j)];
  }
}

bool still_used(const Warpgroup& g, const float* d) {
  for (const Wgmma& w : g.open)
    if (w.d[0] == d) return true;
  for (const auto& group : g.groups)
    for (const Wgmma& w : group)
      if (w.d[0] == d) return true;
  return false;
}

void check_same(const Wgmma& w, const WgmmaShape& s, bool in_registers, void* pc) {
  const WgmmaShape& t = w.shape;
  if (t.kind == s.kind && t.n == s.n && t.a == s.a && t.b == s.b && t.accumulate == s.accumulate &&
      w.in_registers == in_registers && w.pc == pc)
    return;
  report(pc, w.pc, "wgmma differs between the threads of a warpgroup");
  fatal();
}
}  // namespace

void wgmma_fence() { mine().fenced[self().warp % 4] |= 1u << self().lane; }

void wgmma(const WgmmaShape& shape, float* d, const u32* a) {
  Fiber& f = self();
  Warpgroup& g = mine();
  f.pc = SIMT_CALLER;
  if (!(g.fenced[f.warp % 4] >> f.lane & 1))
    report(SIMT_CALLER, nullptr, "%s: the first wgmma of a group comes without wgmma_fence",
           who(f.linear).c_str());
  if (!g.arrived)
    g.next = {shape, a != nullptr, {}, {}, SIMT_CALLER};
  else
    check_same(g.next, shape, a != nullptr, SIMT_CALLER);
  g.next.d[f.linear % 128] = d;
  if (a) std::memcpy(g.next.a[f.linear % 128], a, 16);
  if (++g.arrived < 128) {
    sleep("wgmma");
    return;
  }
  g.arrived = 0;
  g.open.push_back(g.next);
  block->result->counters.collectives++;
  const int first = f.linear / 128 * 128;
  for (int t = first; t < first + 128; ++t)
    if (t != f.linear) wake(t);
  std::vector<float>& sums = g.sums[g.next.d[0]];
  if (!sums.empty()) return;
  sums.resize(size_t(64 * shape.n));
  move_sums(g.next, sums.data(), true);
}

void wgmma_commit() {
  Warpgroup& g = mine();
  self().pc = SIMT_CALLER;
  meet();
  g.fenced[self().warp % 4] &= ~(1u << self().lane);
  if (self().linear % 128 == 0) {
    g.groups.push_back(g.open);
    g.open.clear();
  }
  meet();
}

void wgmma_wait(int keep) {
  Warpgroup& g = mine();
  self().pc = SIMT_CALLER;
  meet();
  if (self().linear % 128 == 0)
    while (g.groups.size() > size_t(keep)) {
      const std::vector<Wgmma> done = g.groups.front();
      for (const Wgmma& w : done) compute(w, g.sums[w.d[0]].data());
      g.groups.erase(g.groups.begin());
      for (const Wgmma& w : done)
        if (g.sums.count(w.d[0]) && !still_used(g, w.d[0])) {
          move_sums(w, g.sums[w.d[0]].data(), false);
          g.sums.erase(w.d[0]);
        }
    }
  meet();
}
}  // namespace rt
}  // namespace simt
