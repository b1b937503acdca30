// Hopper's asynchronous units in the block that runs. Internal to csrc/simt/host.
#pragma once
#include "simt/host/runtime_sm90.h"
#include "simt/host/state.h"

namespace simt {
namespace rt {
struct Mbarrier {
  int arrivals, pending, initialiser;
  long bytes;
  int phase;
  bool shown;  // to the async proxy, by mbar_fence_init
  std::vector<u32> clock, done_clock;
  std::vector<int> waiters;
};

// A box on its way. Maps are copied: the emulated kernel's parameters die with the thread that issued it.
struct Box {
  TensorMap map;
  u32 smem, mbar;
  int at[5];
  void* pc;
  u32 clock;  // of the async proxy, for stores
};

struct BulkGroups {
  std::vector<Box> open;
  std::vector<std::vector<Box>> groups;
};

struct Wgmma {
  WgmmaShape shape;
  bool in_registers;
  float* d[128];
  u32 a[128][4];
  void* pc;
};

struct Warpgroup {
  int arrived = 0;
  u32 fenced[4] = {};  // lanes of each warp that ran wgmma_fence since the last group
  Wgmma next;
  std::vector<Wgmma> open;
  std::vector<std::vector<Wgmma>> groups;
  std::map<float*, std::vector<float>> sums;  // accumulators on their way, by thread 0's registers
};

struct Hopper {
  std::map<u32, Mbarrier> mbarriers;
  std::vector<Box> loads;
  std::vector<BulkGroups> stores;  // of each thread
  u32 clock = 0;                   // of the async proxy
  std::vector<u32> proxy_fence;    // each thread's clock at its last fence_proxy_async
  Warpgroup warpgroups[kWarpgroups];
};

void end_phase_if_complete(Mbarrier& m);
Mbarrier& mbarrier_at(u32 addr, void* pc);

// What the async proxy reads or overwrites must have been fenced by the thread that wrote it.
void check_proxy(u32 offset, size_t bytes, const char* what, void* pc);
u32 swizzled_offset(u32 offset, int swizzle);
}  // namespace rt
}  // namespace simt
