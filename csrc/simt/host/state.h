// What the emulator knows of the block that runs. Internal to csrc/simt/host.
#pragma once
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "simt/host/runtime.h"

#define SIMT_CALLER (__builtin_return_address(0))

namespace simt {
namespace rt {
using u32 = uint32_t;
using u64 = uint64_t;
using uptr = uintptr_t;

constexpr size_t kStackBytes = 128 << 10;
constexpr u32 kInFlight = ~0u;  // the clock of a byte that an async copy has not delivered
constexpr int kGranule = 2;     // bytes a shadow cell covers: one bf16
constexpr int kNamedBarriers = 16;
constexpr int kWarpgroups = 8;

// The last write to a granule of shared memory and the reads since.
struct Cell {
  u32 write_clock;
  uint16_t writer;
  uint8_t atomic, readers;
  u32 read_clock[4];
  uint16_t reader[4];
  void *write_pc, *read_pc;
};

struct Copy {
  u32 dst;
  const void* src;
  int bytes, source_bytes;
};

struct Fiber {
  void* sp;
  uptr stack;
  dim3 tid;
  int linear, lane, warp;
  bool done;
  const char* waits_in;  // for reports of a deadlock
  void* pc;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  void* fake_stack;  // of AddressSanitizer
};

// Lanes that have arrived at one collective of a warp.
struct Group {
  const char* op;
  u32 mask, arrived;
};

struct Warp {
  Group group[4];
  alignas(64) float a[16][16], b[16][8], c[16][8];
  u32 addr[32], r[32][4];
  u64 in[32], out[32];
};

struct Barrier {
  int need = 0, got = 0;
  std::vector<int> arrived, waiters;
};

struct Hopper;  // state_sm90.h

struct Block {
  Config config;
  dim3 grid, dim, id;
  u64 linear;  // of the block in its grid
  int threads, warps, live, current = -1, current_warp;
  u64 random;
  bool failed;
  unsigned char* smem;
  size_t smem_bytes;
  unsigned char* stacks;
  uptr stack;  // of the current fiber
  std::vector<Fiber> fibers;
  std::vector<u32> runnable;  // a bit a lane
  std::vector<Warp> warp;
  Barrier barriers[kNamedBarriers + kWarpgroups];  // those of warpgroups order execution, not memory
  int agents;               // length of a vector clock: the threads, and the async proxy last
  std::vector<u32> clocks;  // a vector clock an agent
  std::vector<Cell> cells;
  std::unique_ptr<Hopper> hopper;
  void (*run)(void*);
  void* params;
  size_t param_bytes;
  void *main_sp, *main_fake_stack;
  const void* main_stack;
  size_t main_stack_bytes;
  Result* result;
  std::set<std::pair<void*, void*>> reported;

  Block();
  ~Block();
  u32* clock(int agent) { return &clocks[size_t(agent) * agents]; }
  u32& own_clock(int agent) { return clocks[size_t(agent) * agents + agent]; }
};

// A pointer, not an object: large thread locals of a shared library don't fit the static TLS block.
extern __thread Block* block __attribute__((tls_model("initial-exec")));
inline Fiber& self() { return block->fibers[block->current]; }

// report.cpp
std::string where(void* pc);
std::string who(int agent);
void report(void* pc, void* other_pc, const char* format, ...) __attribute__((format(printf, 3, 4)));

// fibers.cpp
u64 next_random();
void run_fibers();  // until none is runnable
void start(Fiber& f);
void sleep(const char* reason);
void wake(int thread);
[[noreturn]] void fatal();  // abandons the block

// race.cpp
enum TouchKind { kPlain, kAtomic, kIssue };
void touch(uptr offset, size_t bytes, bool write, void* pc, int agent, TouchKind kind = kPlain);
void delivered(uptr offset, size_t bytes, int agent, u32 clock, void* pc);
void join(const std::vector<int>& threads);  // everything any did is ordered before what each does next
void absorb(u32* into, const u32* from);

// memory.cpp
void access(void* p, size_t bytes, bool write, void* pc);
bool global_ok(uptr p, size_t bytes, bool write, void* pc);
bool store_ok(uptr p, size_t bytes, void* pc);  // and notes who stored
void check_shared(u32 offset, size_t bytes, int align, void* pc, const char* what);
void forget_owners();

// collectives.cpp
bool last_to_arrive(const char* op, u32 mask, void* pc);

// hopper.cpp, tma.cpp
void reset_hopper();
bool deliver_async();  // one asynchronous load lands; false if none is on its way
bool stores_pending(int thread);
}  // namespace rt
}  // namespace simt
