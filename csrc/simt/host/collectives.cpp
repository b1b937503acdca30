// What the lanes of a warp do together. A lane waits in a collective until all of its mask are in the same
// one; the last to arrive computes for the warp.
#include <cstring>

#include "simt/host/number.h"
#include "simt/host/state.h"

namespace simt {
namespace rt {
namespace {
Group& group_for(Warp& w, const char* op, u32 mask, void* pc) {
  Group* free = nullptr;
  for (Group& g : w.group) {
    if (g.arrived && g.op == op && g.mask == mask) return g;
    if (!g.arrived && !free) free = &g;
  }
  if (!free) {
    report(pc, nullptr, "%s: its warp is split over more than 4 collectives", who(block->current).c_str());
    fatal();
  }
  free->op = op;
  free->mask = mask;
  return *free;
}

Warp& my_warp() { return block->warp[self().warp]; }
}  // namespace

bool last_to_arrive(const char* op, u32 mask, void* pc) {
  Fiber& f = self();
  f.pc = pc;
  if (!(mask >> f.lane & 1)) {
    report(pc, nullptr, "%s executes %s with a mask %08x that excludes it", who(f.linear).c_str(), op, mask);
    fatal();
  }
  Group& g = group_for(block->warp[f.warp], op, mask, pc);
  g.arrived |= 1u << f.lane;
  if (g.arrived != mask) {
    sleep(op);
    return false;
  }
  g.arrived = 0;
  block->runnable[f.warp] |= mask;
  block->result->counters.collectives++;
  return true;
}

dim3 tid() { return self().tid; }
dim3 bid() { return block->id; }
dim3 bdim() { return block->dim; }
dim3 gdim() { return block->grid; }
unsigned char* smem() { return block->smem; }
u32 smem_offset(const void* p) { return u32(static_cast<const unsigned char*>(p) - block->smem); }

void syncwarp(u32 mask) {
  if (!last_to_arrive("syncwarp", mask, SIMT_CALLER)) return;
  std::vector<int> threads;
  for (u32 m = mask; m; m &= m - 1) threads.push_back(self().warp * 32 + __builtin_ctz(m));
  join(threads);
}

u64 shuffle(int kind, u32 mask, u64 bits, int arg, int width) {
  const int lane = self().lane, low = lane & ~(width - 1), high = lane | (width - 1);
  int source = kind == kIdx    ? low | (arg & (width - 1))
               : kind == kUp   ? lane - arg
               : kind == kDown ? lane + arg
                               : lane ^ arg;
  if (source < low || source > high) source = lane;
  if (!(mask >> source & 1))
    report(SIMT_CALLER, nullptr, "%s: shuffle reads lane %d, which is not in the mask",
           who(block->current).c_str(), source);
  Warp& w = my_warp();
  w.in[lane] = bits;
  w.addr[lane] = u32(source);
  if (last_to_arrive("shuffle", mask, SIMT_CALLER))
    for (u32 m = mask; m; m &= m - 1) w.out[__builtin_ctz(m)] = w.in[w.addr[__builtin_ctz(m)]];
  return w.out[lane];
}

u32 ballot(u32 mask, bool pred) {
  Warp& w = my_warp();
  const int lane = self().lane;
  w.in[lane] = pred;
  if (last_to_arrive("ballot", mask, SIMT_CALLER)) {
    u32 votes = 0;
    for (u32 m = mask; m; m &= m - 1) votes |= u32(w.in[__builtin_ctz(m)]) << __builtin_ctz(m);
    for (u32 m = mask; m; m &= m - 1) w.out[__builtin_ctz(m)] = votes;
  }
  return u32(w.out[lane]);
}

void ldmatrix(u32* r, int matrices, bool trans, u32 addr) {
  Warp& w = my_warp();
  const int lane = self().lane;
  w.addr[lane] = addr;
  if (lane < matrices * 8) {
    check_shared(addr, 16, 16, SIMT_CALLER, "ldmatrix");
    if (block->config.race) touch(addr, 16, false, SIMT_CALLER, block->current);
  }
  if (last_to_arrive(trans ? "ldmatrix.trans" : "ldmatrix", ~0u, SIMT_CALLER))
    for (int q = 0; q < matrices; ++q) {
      uint16_t m[8][8];
      u32 banks = 0;
      for (int i = 0; i < 8; ++i) {
        std::memcpy(m[i], block->smem + w.addr[q * 8 + i], 16);
        banks |= 1u << (w.addr[q * 8 + i] >> 4 & 7);
      }
      block->result->counters.bank_conflicts +=
          u64(8 - __builtin_popcount(banks));  // extra passes over shared memory
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = l % 4 * 2;
        w.r[l][q] = trans ? m[j][i] | u32(m[j + 1][i]) << 16 : m[i][j] | u32(m[i][j + 1]) << 16;
      }
    }
  std::memcpy(r, w.r[lane], size_t(matrices) * 4);
}

namespace {
float half_of(int kind, u32 pair, int high) {
  const uint16_t bits = uint16_t(high ? pair >> 16 : pair);
  return kind == kMmaBf16 ? bf16_value(bits) : f16_value(bits);
}

float tf32_value(u32 bits) { return float_of_bits(bits & ~0x1fffu); }
}  // namespace

// Every element of A, B and C belongs to one lane, so lanes decode into the warp's tiles as they arrive.
void mma(int kind, float* d, const u32* a, const u32* b) {
  Warp& w = my_warp();
  const int row = self().lane >> 2, quad = self().lane & 3, t = quad * 2, depth = kind == kMmaTf32 ? 8 : 16;
  for (int i = 0; i < 4; ++i) {
    float* p = w.a[row + (i & 1) * 8];
    if (kind == kMmaTf32) {
      p[quad + (i & 2) * 2] = tf32_value(a[i]);
      continue;
    }
    p[t + (i & 2) * 4] = half_of(kind, a[i], 0);
    p[t + (i & 2) * 4 + 1] = half_of(kind, a[i], 1);
  }
  for (int i = 0; i < 2; ++i) {
    if (kind == kMmaTf32) {
      w.b[quad + i * 4][row] = tf32_value(b[i]);
      continue;
    }
    w.b[t + i * 8][row] = half_of(kind, b[i], 0);
    w.b[t + i * 8 + 1][row] = half_of(kind, b[i], 1);
  }
  std::memcpy(&w.c[row][t], d, 8);
  std::memcpy(&w.c[row + 8][t], d + 2, 8);
  static const char* const names[] = {"mma bf16", "mma f16", "mma tf32"};
  if (last_to_arrive(names[kind], ~0u, SIMT_CALLER)) {
    typedef float Row __attribute__((vector_size(32)));
    for (int half = 0; half < 16; half += 8) {
      Row sum[8], right;
      std::memcpy(sum, w.c[half], sizeof sum);
      for (int k = 0; k < depth; ++k) {
        std::memcpy(&right, w.b[k], sizeof right);
        for (int i = 0; i < 8; ++i) sum[i] += w.a[half + i][k] * right;
      }
      std::memcpy(w.c[half], sum, sizeof sum);
    }
  }
  std::memcpy(d, &w.c[row][t], 8);
  std::memcpy(d + 2, &w.c[row + 8][t], 8);
}
}  // namespace rt
}  // namespace simt
