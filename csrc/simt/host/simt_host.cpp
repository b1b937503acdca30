// simt_host.cpp - host runtime for simt.h. Compile with -O3, never with -fsanitize=thread.
// Kernel TUs compiled with -fsanitize=thread call the __tsan_* hooks defined at the bottom: that gives
// byte-exact bounds checks, uninitialised-read checks and a vector-clock race detector on shared
// memory for ordinary loads/stores, with no change to the kernel source and without linking libtsan.
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "simt.h"
#include "simt_sm90.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#define CALLER (__builtin_return_address(0))
namespace simt {
typedef uint32_t u32;
typedef uint64_t u64;
typedef uintptr_t uptr;
static const size_t STK = 64 << 10;
static const u32 INFLIGHT = 0xffffffffu;
enum { G = 2 };  // shadow granule, bytes (2 = one bf16)
struct Cell {
  u32 wclk;
  uint16_t wtid;
  uint8_t atomic, nr;
  u32 rclk[4];
  uint16_t rtid[4];
  void *wpc, *rpc;
};
struct Copy {
  u32 dst;
  const void* src;
  int n, srcn;
};
struct Fiber {
  void* sp;
  uptr stk;
  dim3 tid;
  int lin, lane, warp;
  bool done;
  int op;
  void* pc;  // what it waits in, for deadlock reports
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  void* fake;
};
struct Group {
  int op;
  u32 mask, arrived;
};
struct Warp {
  Group g[4];
  alignas(64) float A[16][16], Bm[16][8], C[16][8];
  u32 addr[32], r[32][4];
  u64 v[32], out[32];
};
struct Bar {
  int need = 0, got = 0;
  std::vector<int> who, waiters;
};
struct Buf {
  const char* name;
  uptr lo, hi;
  bool w;
  void* map;
  size_t maplen;
  std::vector<u32> owner;
};
static std::vector<Buf> bufs;
static std::mutex mu;
struct Blk {
  Config cfg;
  dim3 g, b, bid;
  int n, nw, live, cur, curw, scan;
  u64 rng;
  bool failed;
  unsigned char* sm;
  size_t smn;
  std::vector<Fiber> f;
  std::vector<u32> run;
  std::vector<Warp> wp;
  u64 bidlin;
  Bar bars[16];
  std::vector<u32> vc;
  std::vector<Cell> sh;
  void* msp;
  unsigned char* stacks;
  void (*fn)(void*);
  void* ctx;
  size_t ctxn;
  uptr stklo;
  void* mfake;
  const void* mstk;
  size_t mstkn;
  Result* res;
  std::set<std::pair<void*, void*>> seen;
  int nv;  // vector clock length: threads + the async proxy
  u32& clk(int t, int u) { return vc[size_t(t) * nv + u]; }
};
static thread_local Blk* B __attribute__((tls_model("initial-exec"))) = nullptr;

// ---------------------------------------------------------------- reporting
static std::string where(void* pc) {
  Dl_info di;
  if (!pc || !dladdr(pc, &di) || !di.dli_fname) return "?";
  char cmd[1024], line[512];
  std::string r;
  snprintf(cmd, sizeof cmd, "addr2line -i -e '%s' %p 2>/dev/null", di.dli_fname,
           (void*)((uptr)pc - 1 - (uptr)di.dli_fbase));
  if (FILE* p = popen(cmd, "r")) {
    while (fgets(line, sizeof line, p)) {
      std::string s(line);
      s = s.substr(0, s.find_first_of(" \n"));
      s = s.substr(s.rfind('/') + 1);
      if (s.compare(0, 6, "simt.h") && s[0] != '?') r += (r.empty() ? "" : " < ") + s;
    }
    pclose(p);
  }
  return r.empty() ? "?" : r;
}
static std::string who(int t) {
  if (t == B->n) return "the async proxy (TMA)";
  char s[64];
  snprintf(s, sizeof s, "thread %d (warp %d lane %d)", t, t / 32, t % 32);
  return s;
}
static void report(void* pc, void* pc2, const char* fmt, ...) __attribute__((format(printf, 3, 4)));
static void report(void* pc, void* pc2, const char* fmt, ...) {
  if (B->seen.size() > 400 || !B->seen.insert({pc, pc2}).second) return;
  std::lock_guard<std::mutex> l(mu);
  std::string at = where(pc) + (pc2 ? "\n    other access at " + where(pc2) : "");
  if (B->res->text.find("at " + at + "\n") != std::string::npos || B->res->errors++ >= B->cfg.max_reports)
    return;  // one per source location
  char m[600];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(m, sizeof m, fmt, ap);
  va_end(ap);
  char h[64];
  snprintf(h, sizeof h, "[block %u,%u,%u] ", B->bid.x, B->bid.y, B->bid.z);
  B->res->text += h + std::string(m) + "\n    at " + at + "\n";
}

// ---------------------------------------------------------------- fibers
extern "C" void simt_switch(void** save, void* to);
asm(".text\n.globl simt_switch\n.hidden simt_switch\n.type simt_switch,@function\nsimt_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size "
    "simt_switch,.-simt_switch\n");
static u64 rnd() {
  u64& x = B->rng;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}
static int pick() {  // next fiber to run, -1 if none
  int w = B->curw, nw = B->nw;
  u32 m;
  if (B->cfg.sched == FORWARD && (m = B->run[w])) return w * 32 + __builtin_ctz(m);
  if (B->cfg.sched == RANDOM) {
    if (!B->run[w] || rnd() % 4 == 0) {
      int s = rnd() % nw, i = 0;
      for (; i < nw && !B->run[(s + i) % nw]; i++);
      if (i == nw) return -1;
      w = (s + i) % nw;
    }
    m = B->run[w];
    int k = rnd() % __builtin_popcount(m);
    while (k--) m &= m - 1;
    B->curw = w;
    return w * 32 + __builtin_ctz(m);
  }
  for (int i = 0; i <= nw; i++) {  // stay in the warp while it can run
    int x = B->cfg.sched == FORWARD ? (w + i) % nw : (w + 2 * nw - i) % nw;
    if ((m = B->run[x])) {
      B->curw = x;
      return x * 32 + (B->cfg.sched == FORWARD ? __builtin_ctz(m) : 31 - __builtin_clz(m));
    }
  }
  return -1;
}
static void go(void** save, void** fake, int t) {
#if defined(__SANITIZE_ADDRESS__)
  bool dying = !fake;
  if (t < 0)
    __sanitizer_start_switch_fiber(dying ? nullptr : fake, B->mstk, B->mstkn);
  else
    __sanitizer_start_switch_fiber(dying ? nullptr : fake, (void*)B->f[t].stk, STK);
#endif
  B->cur = t;
  B->res->switches++;
  if (t >= 0) {
    B->stklo = B->f[t].stk;
    simt_switch(save, B->f[t].sp);
  } else
    simt_switch(save, B->msp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake ? *fake : nullptr, nullptr, nullptr);
#endif
}
static void block_me() {
  Fiber& f = B->f[B->cur];
  int t = B->failed ? -1 : pick();
  if (t == f.lin) return;
  go(&f.sp, &f.fake, t);
}
static void sleep_me() {
  Fiber& f = B->f[B->cur];
  B->run[f.warp] &= ~(1u << f.lane);
  block_me();
}
static void wake(int t) { B->run[t / 32] |= 1u << (t % 32); }
static void fatal() {
  B->failed = true;
  for (;;) block_me();
}                                              // never resumed
static void join(const std::vector<int>& s) {  // all of s synchronise with each other
  if (!B->cfg.race) return;
  int n = B->nv;
  static thread_local std::vector<u32> m;
  m.assign(n, 0);
  for (int t : s) {
    const u32* v = &B->vc[size_t(t) * n];
    for (int i = 0; i < n; i++) m[i] = v[i] > m[i] ? v[i] : m[i];
  }
  for (int t : s) {
    memcpy(&B->vc[size_t(t) * n], m.data(), n * 4);
    B->clk(t, t)++;
  }
}
static void bar_release(Bar& b) {
  if (&b < B->bars + 8) join(b.who);  // 8.. order execution only (wgmma rendezvous)
  for (int t : b.waiters) wake(t);
  b = Bar();
}
static void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &B->mstk, &B->mstkn);
#endif
  B->fn(B->ctx);
  Fiber& f = B->f[B->cur];
  f.done = true;
  B->live--;
  if (!f.open.empty() || !f.groups.empty())
    report((void*)entry, nullptr, "%s exits with un-waited cp.async data", who(f.lin).c_str());
  B->run[f.warp] &= ~(1u << f.lane);
  if (B->bars[0].got && B->bars[0].need < 0 && B->bars[0].got == B->live) bar_release(B->bars[0]);
  void* d;
  go(&d, nullptr, pick());
  __builtin_unreachable();
}

// ---------------------------------------------------------------- memory checks
static void touch(uptr off, size_t n, bool w, void* pc, int t, bool atom = false, bool issue = false) {
  size_t g1 = (off + n - 1) / G;
  u32* v = &B->vc[size_t(t) * B->nv];
  for (size_t g = off / G; g <= g1; g++) {
    Cell& c = B->sh[g];
    if (c.wclk == INFLIGHT) {
      report(pc, c.wpc, "shared+%zu: %s %s bytes of an async copy by %s that has not completed here", off,
             who(t).c_str(), w ? "writes" : "reads", who(c.wtid).c_str());
      continue;
    }
    if (!w && !c.wclk) {
      report(pc, nullptr, "shared+%zu: %s reads uninitialised shared memory", off, who(t).c_str());
      continue;
    }
    if (c.wclk && c.wtid != t && v[c.wtid] < c.wclk && !(atom && c.atomic))
      report(pc, c.wpc, "shared+%zu: RACE, %s %s while the write by %s is not ordered before it", off,
             who(t).c_str(), w ? "writes" : "reads", who(c.wtid).c_str());
    if (w) {
      for (int i = 0; i < c.nr; i++)
        if (c.rtid[i] != t && v[c.rtid[i]] < c.rclk[i]) {
          report(pc, c.rpc, "shared+%zu: RACE, %s writes while the read by %s is not ordered before it", off,
                 who(t).c_str(), who(c.rtid[i]).c_str());
          break;
        }
      c.wtid = t;
      c.wclk = issue ? INFLIGHT : v[t];
      c.nr = 0;
      c.wpc = pc;
      c.atomic = atom;
    } else {
      int i = 0;
      for (; i < c.nr; i++)
        if (c.rtid[i] == t || v[c.rtid[i]] >= c.rclk[i]) break;  // subsumed
      if (i == 4)
        i = (t >> 5) & 3;
      else if (i == c.nr)
        c.nr++;
      c.rtid[i] = t;
      c.rclk[i] = v[t];
      c.rpc = pc;
    }
  }
}
static bool global_ok(uptr a, size_t n, bool w, void* pc) {
  static thread_local size_t hit = 0;
  if (hit < bufs.size() && a >= bufs[hit].lo && a + n <= bufs[hit].hi && (!w || bufs[hit].w)) return true;
  const Buf* near = nullptr;
  for (size_t i = 0; i < bufs.size(); i++) {
    if (a >= bufs[i].lo && a + n <= bufs[i].hi) {
      hit = i;
      if (!w || bufs[i].w) return true;
      report(pc, nullptr, "%s writes read-only buffer '%s'", who(B->cur).c_str(), bufs[i].name);
      return false;
    }
    if (a + n > bufs[i].lo - 65536 && a < bufs[i].hi + 65536 && (!near || a >= bufs[i].lo)) near = &bufs[i];
  }
  if (near)
    report(pc, nullptr, "%s: global %s of %zu bytes at %s%+lld is outside the buffer (size %zu)",
           who(B->cur).c_str(), w ? "write" : "read", n, near->name, (long long)(a - near->lo),
           size_t(near->hi - near->lo));
  else
    report(pc, nullptr, "%s: %s of %zu bytes at wild address %p", who(B->cur).c_str(), w ? "write" : "read",
           n, (void*)a);
  return false;
}
static void access(void* p, size_t n, bool w, void* pc) {
  if (!B || B->cur < 0) return;
  uptr a = (uptr)p;
  if (a - B->stklo < STK) return;
  if (a - (uptr)B->sm < B->smn + 4096) {
    if (a + n > (uptr)B->sm + B->smn) {
      report(pc, nullptr, "%s: shared %s of %zu bytes at +%zu, block has %zu bytes", who(B->cur).c_str(),
             w ? "write" : "read", n, size_t(a - (uptr)B->sm), B->smn);
      fatal();
    }
    if (B->cfg.race) touch(a - (uptr)B->sm, n, w, pc, B->cur);
    return;
  }
  if (a - (uptr)B->ctx < B->ctxn) return;  // kernel parameters
  if (a - (uptr)B->stacks < size_t(B->n) * STK) {
    report(pc, nullptr, "%s accesses another thread's local memory", who(B->cur).c_str());
    return;
  }
  Dl_info di;
  if (!w && bufs.size() && !(a >= bufs[0].lo && a < bufs[0].hi) && dladdr(p, &di)) return;  // constant tables
  if (!global_ok(a, n, w, pc)) fatal();
  if (w && B->cfg.race)
    for (Buf& b : bufs)
      if (a >= b.lo && a < b.hi) {  // two threads of the grid store to one location
        u32 me = u32(B->bidlin * B->n + B->cur + 1);
        for (size_t i = (a - b.lo) / G; i <= (a + n - 1 - b.lo) / G; i++) {
          if (b.owner[i] && b.owner[i] != me)
            report(pc, nullptr, "%s stores to %s+%zu, already written by block %u thread %u",
                   who(B->cur).c_str(), b.name, i * G, (b.owner[i] - 1) / B->n, (b.owner[i] - 1) % B->n);
          b.owner[i] = me;
        }
      }
}
static void fatal_sig() { fatal(); }
static void on_segv(int, siginfo_t* si, void* uc) {  // guard pages, for builds without the hooks
  mcontext_t& mc = ((ucontext_t*)uc)->uc_mcontext;
  if (!B || B->cur < 0) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  if (!global_ok((uptr)si->si_addr, 1, mc.gregs[REG_ERR] & 2, (char*)mc.gregs[REG_RIP] + 1)) {
  }
  if (!B->res->errors)
    report((char*)mc.gregs[REG_RIP] + 1, nullptr, "%s: fault at %p", who(B->cur).c_str(), si->si_addr);
  mc.gregs[REG_RIP] = (greg_t)fatal_sig;
  mc.gregs[REG_RSP] = (mc.gregs[REG_RSP] & ~15ll) - 8 - 256;
}

// ---------------------------------------------------------------- warp collectives
enum { OP_SHFL, OP_BALLOT, OP_SYNC, OP_LDM, OP_MMA };
static const char* opname[] = {"shfl", "ballot", "syncwarp", "ldmatrix", "mma"};
static bool arrive(int op, u32 mask, void* pc) {  // true for the lane that completes the collective
  Fiber& f = B->f[B->cur];
  Warp& w = B->wp[f.warp];
  f.pc = pc;
  if (!(mask >> f.lane & 1)) {
    report(pc, nullptr, "%s executes %s with a mask %08x that excludes it", who(f.lin).c_str(), opname[op],
           mask);
    fatal();
  }
  Group* g = w.g;
  if (!(g->arrived && g->op == op && g->mask == mask)) {
    Group* fr = nullptr;
    int i = 0;
    for (; i < 4; i++) {
      if (w.g[i].arrived && w.g[i].op == op && w.g[i].mask == mask) break;
      if (!w.g[i].arrived && !fr) fr = &w.g[i];
    }
    g = i < 4 ? &w.g[i] : fr;
    if (!g) {
      report(pc, nullptr, "warp %d is split over more than 4 collectives", f.warp);
      fatal();
    }
    g->op = op;
    g->mask = mask;
  }
  g->arrived |= 1u << f.lane;
  if (g->arrived != mask) {
    f.op = op;
    sleep_me();
    f.op = -1;
    return false;
  }
  g->arrived = 0;
  B->run[f.warp] |= mask;
  B->res->collectives++;
  return true;
}
static Warp& warp_of(Fiber& f) { return B->wp[f.warp]; }
namespace rt {
dim3 tid() { return B->f[B->cur].tid; }
dim3 bid() { return B->bid; }
dim3 bdim() { return B->b; }
dim3 gdim() { return B->g; }
unsigned char* smem() { return B->sm; }
u32 smem_off(const void* p) { return u32((unsigned char*)p - B->sm); }  // "32-bit shared address"
void yield() { block_me(); }
void syncwarp(u32 mask) {
  if (arrive(OP_SYNC, mask, CALLER)) {
    std::vector<int> s;
    for (u32 m = mask; m; m &= m - 1) s.push_back(B->f[B->cur].warp * 32 + __builtin_ctz(m));
    join(s);
  }
}
u64 shfl(int op, u32 mask, u64 v, int a, int ww) {
  Fiber& f = B->f[B->cur];
  Warp& w = warp_of(f);
  int l = f.lane, lo = l & ~(ww - 1), hi = lo | (ww - 1);
  int s = op == 0 ? lo | (a & (ww - 1)) : op == 1 ? l - a : op == 2 ? l + a : l ^ a;
  if (s < lo || s > hi) s = l;
  if (!(mask >> s & 1))
    report(CALLER, nullptr, "%s: shfl reads lane %d which is not in the mask", who(f.lin).c_str(), s);
  w.v[l] = v;
  w.addr[l] = s;
  if (arrive(OP_SHFL, mask, CALLER))
    for (u32 m = mask; m; m &= m - 1) w.out[__builtin_ctz(m)] = w.v[w.addr[__builtin_ctz(m)]];
  return w.out[l];
}
u32 ballot(u32 mask, bool p) {
  Fiber& f = B->f[B->cur];
  Warp& w = warp_of(f);
  w.v[f.lane] = p;
  if (arrive(OP_BALLOT, mask, CALLER)) {
    u32 r = 0;
    for (u32 m = mask; m; m &= m - 1) r |= u32(w.v[__builtin_ctz(m)]) << __builtin_ctz(m);
    for (u32 m = mask; m; m &= m - 1) w.out[__builtin_ctz(m)] = r;
  }
  return u32(w.out[f.lane]);
}
static void sm_check(u32 a, int n, int align, void* pc, const char* what) {
  if (a % align || size_t(a) + n > B->smn) {
    report(pc, nullptr, "%s: %s shared address +%u is %s", who(B->cur).c_str(), what, a,
           a % align ? "misaligned" : "out of bounds");
    fatal();
  }
}
void ldmatrix(u32* r, int num, bool trans, u32 addr) {
  Fiber& f = B->f[B->cur];
  Warp& w = warp_of(f);
  w.addr[f.lane] = addr;
  if (f.lane < num * 8) {
    sm_check(addr, 16, 16, CALLER, "ldmatrix");
    if (B->cfg.race) touch(addr, 16, false, CALLER, f.lin);
  }
  if (arrive(OP_LDM, ~0u, CALLER))
    for (int q = 0; q < num; q++) {
      uint16_t m[8][8];
      u32 banks = 0;
      for (int i = 0; i < 8; i++) {
        memcpy(m[i], B->sm + w.addr[q * 8 + i], 16);
        banks |= 1u << (w.addr[q * 8 + i] >> 4 & 7);
      }
      B->res->bank_conflicts += 8 - __builtin_popcount(banks);  // extra shared-memory wavefronts
      for (int l = 0; l < 32; l++) {
        int i = l / 4, j = (l % 4) * 2;
        w.r[l][q] = trans ? m[j][i] | u32(m[j + 1][i]) << 16 : m[i][j] | u32(m[i][j + 1]) << 16;
      }
    }
  memcpy(r, w.r[f.lane], num * 4);
}
static inline float lo(u32 v) { return bf2f(uint16_t(v)); }
static inline float hi(u32 v) { return bf2f(uint16_t(v >> 16)); }
// Every A, B and C element is owned by exactly one lane, so lanes can decode into the warp's tiles on
// arrival.
void mma16816(float* d, const u32* a, const u32* b) {
  typedef float v8 __attribute__((vector_size(32)));
  Fiber& f = B->f[B->cur];
  Warp& w = warp_of(f);
  int g = f.lane >> 2, t = (f.lane & 3) * 2;
  for (int i = 0; i < 4; i++) {
    float* p = &w.A[g + (i & 1) * 8][t + (i & 2) * 4];
    p[0] = lo(a[i]);
    p[1] = hi(a[i]);
  }
  w.Bm[t][g] = lo(b[0]);
  w.Bm[t + 1][g] = hi(b[0]);
  w.Bm[t + 8][g] = lo(b[1]);
  w.Bm[t + 9][g] = hi(b[1]);
  memcpy(&w.C[g][t], d, 8);
  memcpy(&w.C[g + 8][t], d + 2, 8);
  if (arrive(OP_MMA, ~0u, CALLER))
    for (int h = 0; h < 16; h += 8) {
      v8 acc[8], bk;
      memcpy(acc, w.C[h], sizeof acc);
      for (int k = 0; k < 16; k++) {
        memcpy(&bk, w.Bm[k], 32);
        for (int i = 0; i < 8; i++) acc[i] += w.A[h + i][k] * bk;
      }
      memcpy(w.C[h], acc, sizeof acc);
    }
  memcpy(d, &w.C[g][t], 8);
  memcpy(d + 2, &w.C[g + 8][t], 8);
}
// cp.async: destination is NaN-poisoned at issue, the copy happens only at the wait of the issuing thread.
void cp_async(u32 dst, const void* src, int n, int srcn) {
  sm_check(dst, n, n, CALLER, "cp.async");
  if (srcn && ((uptr)src % n)) {
    report(CALLER, nullptr, "%s: cp.async misaligned global address", who(B->cur).c_str());
    fatal();
  }
  if (srcn && bufs.size() && !global_ok((uptr)src, srcn, false, CALLER)) fatal();
  if (B->cfg.race) touch(dst, n, true, CALLER, B->cur, false, true);
  memset(B->sm + dst, 0xff, n);
  B->f[B->cur].open.push_back({dst, src, n, srcn});
}
void cp_commit() {
  Fiber& f = B->f[B->cur];
  f.groups.emplace_back();
  f.groups.back().swap(f.open);
}
void cp_wait(int keep) {
  Fiber& f = B->f[B->cur];
  size_t done = f.groups.size() > size_t(keep) ? f.groups.size() - keep : 0;
  for (size_t g = 0; g < done; g++)
    for (Copy& c : f.groups[g]) {
      memcpy(B->sm + c.dst, c.src, c.srcn);
      memset(B->sm + c.dst + c.srcn, 0, c.n - c.srcn);
      if (B->cfg.race)
        for (u32 i = c.dst / G; i < (c.dst + c.n) / G; i++) {
          B->sh[i].wclk = B->clk(f.lin, f.lin);
          B->sh[i].wtid = f.lin;
          B->sh[i].wpc = CALLER;
        }
    }
  f.groups.erase(f.groups.begin(), f.groups.begin() + done);
}
void barrier(int id, int n, bool wait) {
  Fiber& f = B->f[B->cur];
  f.pc = CALLER;
  if (id < 0 || id > 15 || (n > 0 && n % 32)) {
    report(CALLER, nullptr, "bad named barrier %d,%d", id, n);
    fatal();
  }
  Bar& b = B->bars[id];
  if (b.got && b.need != n) {
    report(CALLER, nullptr, "%s: barrier %d used with counts %d and %d", who(f.lin).c_str(), id, b.need, n);
    fatal();
  }
  b.need = n;
  b.got++;
  b.who.push_back(f.lin);
  if (wait) b.waiters.push_back(f.lin);
  if (b.got == (n < 0 ? B->live : n)) {
    bar_release(b);
    return;
  }
  if (wait) {
    f.op = 100 + id;
    sleep_me();
    B->f[B->cur].op = -1;
  }
}
void atomic_note(void* p, size_t n) {
  if (B->cfg.race && (uptr)p - (uptr)B->sm < B->smn)
    touch((unsigned char*)p - B->sm, n, true, CALLER, B->cur, true);
  else if ((uptr)p - (uptr)B->sm >= B->smn && !global_ok((uptr)p, n, true, CALLER))
    fatal();
}

}  // namespace rt
static void barrier_wg(Fiber& f) { rt::barrier(8 + f.warp / 4, 128, true); }  // ids 8.. are reserved for this
#include "simt_host_sm90.inc"
namespace rt {
static void run_blocks(Config cfg, dim3 g, dim3 b, size_t smem, void (*fn)(void*), void* ctx, size_t ctxn,
                       Result* res, int part, int parts) {
  std::vector<char> alt(65536);
  stack_t ss = {}, oss;
  ss.ss_sp = alt.data();
  ss.ss_size = alt.size();
  sigaltstack(&ss, &oss);
  Blk k;
  B = &k;
  k.cfg = cfg;
  k.g = g;
  k.b = b;
  k.n = b.x * b.y * b.z;
  k.nv = k.n + 1;
  Ext ext;
  X = &ext;
  k.nw = (k.n + 31) / 32;
  k.fn = fn;
  k.ctx = ctx;
  k.ctxn = ctxn;
  k.res = res;
  k.rng = cfg.seed * 0x9E3779B97F4A7C15ull + 1;
  size_t smcap = (smem + 4095) & ~4095ul, stn = size_t(k.n) * STK;
  unsigned char* smap =
      (unsigned char*)mmap(nullptr, smcap + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(smap + 4096, smcap, PROT_READ | PROT_WRITE);
  k.sm = smap + 4096;
  k.smn = smem;
  static thread_local unsigned char* pool = nullptr;
  static thread_local size_t pooln = 0;  // reused: page faults cost more than a small launch
  if (pooln < stn) {
    if (pool) munmap(pool, pooln);
    pool = (unsigned char*)mmap(nullptr, pooln = stn, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  k.stacks = pool;
  k.f.resize(k.n);
  k.wp.resize(k.nw);
  u64 nb = u64(g.x) * g.y * g.z;
  for (u64 bi = part; bi < nb && !res->errors; bi += parts) {
    k.bid = dim3(bi % g.x, bi / g.x % g.y, bi / g.x / g.y);
    k.bidlin = bi;
    k.live = k.n;
    k.failed = false;
    k.curw = 0;
    k.run.assign(k.nw, 0);
    memset(k.sm, 0xff, smem);  // NaN poison
    if (cfg.race) {
      k.vc.assign(size_t(k.n) * k.nv, 0);
      k.sh.assign(smem / G + 1, Cell());
      for (int t = 0; t < k.n; t++) k.clk(t, t) = 1;
    }
    for (auto& x : k.bars) x = Bar();
    ext = Ext();
    ext.fence.assign(k.nv, 0);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(k.stacks, stn);
#endif
    for (auto& x : k.wp) memset(x.g, 0, sizeof x.g);
    for (int t = 0; t < k.n; t++) {
      Fiber& f = k.f[t];
      f.stk = (uptr)k.stacks + t * STK;
      f.lin = t;
      f.lane = t % 32;
      f.warp = t / 32;
      f.done = false;
      f.op = -1;
      f.tid = dim3(t % b.x, t / b.x % b.y, t / b.x / b.y);
      f.groups.clear();
      f.open.clear();
      void** top =
          (void**)(f.stk + STK - 64 - (t % 32) * 192);  // colour the stacks: same depth, different cache sets
      top[-1] = nullptr;
      top[-2] = (void*)entry;
      for (int i = 3; i <= 8; i++) top[-i] = nullptr;
      f.sp = top - 8;
      wake(t);
    }
    do go(&k.msp, &k.mfake, pick());  // runs until nothing is runnable
    while (!k.failed && k.live && deliver_async());
    if (k.live && !k.failed) {
      std::map<std::string, int> st;
      for (Fiber& f : k.f)
        if (!f.done)
          st[(f.op == 200   ? "mbarrier wait"
              : f.op == 201 ? "wgmma"
              : f.op >= 100 ? "barrier " + std::to_string(f.op - 100)
              : f.op >= 0   ? opname[f.op]
                            : "?") +
             std::string(" at ") + where(f.pc)]++;
      std::string s;
      for (auto& e : st) s += "\n    " + std::to_string(e.second) + " threads wait in " + e.first;
      report(nullptr, nullptr, "DEADLOCK: %d of %d threads cannot proceed%s", k.live, k.n, s.c_str());
    }
  }
  munmap(smap, smcap + 8192);
  B = nullptr;
  sigaltstack(&oss, nullptr);
}
Result launch(const Config& c, dim3 g, dim3 b, size_t smem, void (*fn)(void*), void* ctx, size_t ctxn) {
  for (Buf& x : bufs)
    if (x.w && c.race) x.owner.assign((x.hi - x.lo) / G + 1, 0);
  struct sigaction sa = {}, old;
  sa.sa_sigaction = on_segv;
  sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &sa, &old);
  int p = c.os_threads;
  std::vector<Result> r(p);
  std::vector<std::thread> th;
  for (int i = 1; i < p; i++) th.emplace_back(run_blocks, c, g, b, smem, fn, ctx, ctxn, &r[i], i, p);
  run_blocks(c, g, b, smem, fn, ctx, ctxn, &r[0], 0, p);
  for (auto& t : th) t.join();
  sigaction(SIGSEGV, &old, nullptr);
  for (int i = 1; i < p; i++) {
    r[0].errors += r[i].errors;
    r[0].text += r[i].text;
    r[0].switches += r[i].switches;
    r[0].collectives += r[i].collectives;
    r[0].bank_conflicts += r[i].bank_conflicts;
  }
  return r[0];
}
}  // namespace rt
void* gm_alloc(const char* name, size_t n, bool w) {
  size_t cap = (n + 15) & ~15ul, pg = (cap + 4095) & ~4095ul;
  unsigned char* m = (unsigned char*)mmap(nullptr, pg + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(m + 4096, pg, PROT_READ | PROT_WRITE);
  unsigned char* p = m + 4096 + pg - cap;
  memset(m + 4096, 0xff, pg);
  bufs.push_back({name, (uptr)p, (uptr)p + n, w, m, pg + 8192, {}});
  return p;
}
void gm_free(void* p) {
  for (size_t i = 0; i < bufs.size(); i++)
    if (bufs[i].lo == (uptr)p) {
      munmap(bufs[i].map, bufs[i].maplen);
      bufs.erase(bufs.begin() + i);
      return;
    }
}
}  // namespace simt

// ---------------------------------------------------------------- -fsanitize=thread hooks
#define HOOK(n, sz, w) \
  void n(void* p) { simt::access(p, sz, w, CALLER); }
extern "C" {
HOOK(__tsan_read1, 1, 0)
HOOK(__tsan_read2, 2, 0) HOOK(__tsan_read4, 4, 0) HOOK(__tsan_read8, 8, 0) HOOK(__tsan_read16, 16, 0)
    HOOK(__tsan_write1, 1, 1) HOOK(__tsan_write2, 2, 1) HOOK(__tsan_write4, 4, 1) HOOK(__tsan_write8, 8, 1)
        HOOK(__tsan_write16, 16, 1) HOOK(__tsan_unaligned_read2, 2, 0) HOOK(__tsan_unaligned_read4, 4, 0)
            HOOK(__tsan_unaligned_read8, 8, 0) HOOK(__tsan_unaligned_read16, 16, 0)
                HOOK(__tsan_unaligned_write2, 2, 1) HOOK(__tsan_unaligned_write4, 4, 1)
                    HOOK(__tsan_unaligned_write8, 8, 1)
                        HOOK(__tsan_unaligned_write16, 16, 1) void __tsan_read_range(void* p, size_t n) {
  simt::access(p, n, 0, CALLER);
}
void __tsan_write_range(void* p, size_t n) { simt::access(p, n, 1, CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
