// TMA: boxes of a tensor, as late as the program allows. A load's destination is NaN until it lands.
#include <algorithm>
#include <cstring>

#include "simt/host/state_sm90.h"

namespace simt {
namespace rt {
namespace {
size_t box_bytes(const TensorMap& map) {
  size_t bytes = size_t(map.item_bytes);
  for (int i = 0; i < map.rank; ++i) bytes *= size_t(map.box[i]);
  return bytes;
}

Box make_box(int rank, const TensorMap* map, u32 smem, u32 mbar, const int* at, void* pc) {
  if (map->rank != rank) {
    report(pc, nullptr, "%s: %d coordinates for a tensor map of %d axes", who(block->current).c_str(), rank,
           map->rank);
    fatal();
  }
  Box box = {*map, smem, mbar, {}, pc, 0};
  std::memcpy(box.at, at, sizeof box.at);
  // The swizzle repeats every 8 lines, and is by address.
  check_shared(smem, box_bytes(*map), map->swizzle ? 8 * map->swizzle : 128, pc, "TMA");
  return box;
}

// Calls each(shared offset, skip, global, bytes) for every 16 bytes of the box, which no swizzle divides:
// `bytes` of them, after the first `skip`, lie in the tensor, at `global`.
template <class Each>
void for_each_chunk(const Box& box, Each&& each) {
  const TensorMap& m = box.map;
  const int per = 16 / m.item_bytes, lines = m.box[1] * m.box[2] * m.box[3] * m.box[4];
  for (int line = 0; line < lines; ++line) {
    const char* row = m.base;
    bool inside = true;
    for (int i = 1, rest = line; i < m.rank; ++i) {
      const int64_t at = int64_t(box.at[i]) + rest % m.box[i];
      rest /= m.box[i];
      inside = inside && at >= 0 && at < m.size[i];
      row += at * m.stride[i];
    }
    for (int c = 0; c < m.box[0]; c += per) {
      const int64_t at = int64_t(box.at[0]) + c;
      const int64_t first = std::max<int64_t>(at, 0), last = std::min<int64_t>(at + per, m.size[0]);
      const size_t bytes = inside && last > first ? size_t(last - first) * size_t(m.item_bytes) : 0;
      const size_t skip = bytes ? size_t(first - at) * size_t(m.item_bytes) : 0;
      const u32 offset = box.smem + u32((line * m.box[0] + c) * m.item_bytes);
      each(swizzled_offset(offset, m.swizzle), skip, row + first * m.item_bytes, bytes);
    }
  }
}

void land(const Box& box) {
  Hopper& h = *block->hopper;
  h.clock++;
  for_each_chunk(box, [&](u32 offset, size_t skip, const char* global, size_t bytes) {
    unsigned char* p = block->smem + offset;
    std::memset(p, 0, 16);
    if (bytes && global_ok(uptr(global), bytes, false, box.pc)) std::memcpy(p + skip, global, bytes);
    delivered(offset, 16, block->threads, h.clock, nullptr);
  });
  Mbarrier& m = h.mbarriers[box.mbar];
  m.bytes -= long(box_bytes(box.map));
  if (block->config.race && m.clock[size_t(block->threads)] < h.clock)
    m.clock[size_t(block->threads)] = h.clock;
  end_phase_if_complete(m);
}

void take(const Box& box) {
  for_each_chunk(box, [&](u32 offset, size_t skip, const char* global, size_t bytes) {
    if (bytes && store_ok(uptr(global), bytes, box.pc))
      std::memcpy(const_cast<char*>(global), block->smem + offset + skip, bytes);
  });
}
}  // namespace

void tma_load(int rank, u32 dst, const TensorMap* map, u32 mbar, const int* at) {
  const Box box = make_box(rank, map, dst, mbar, at, SIMT_CALLER);
  if (!mbarrier_at(mbar, SIMT_CALLER).shown)
    report(SIMT_CALLER, nullptr, "%s: TMA signals an mbarrier without mbar_fence_init",
           who(block->current).c_str());
  const size_t bytes = box_bytes(*map);
  if (block->config.race) {
    check_proxy(dst, bytes, "TMA overwrites", SIMT_CALLER);
    touch(dst, bytes, true, SIMT_CALLER, block->current, kIssue);
  }
  std::memset(block->smem + dst, 0xff, bytes);
  block->hopper->loads.push_back(box);
}

bool deliver_async() {
  Hopper& h = *block->hopper;
  if (h.loads.empty()) return false;
  const size_t i = block->config.schedule == kRandom ? next_random() % h.loads.size() : 0;
  const Box box = h.loads[i];
  h.loads.erase(h.loads.begin() + long(i));
  land(box);
  return true;
}

// Read at the wait, so that shared memory that is written again too early shows in the result.
void tma_store(int rank, const TensorMap* map, u32 src, const int* at) {
  Box box = make_box(rank, map, src, 0, at, SIMT_CALLER);
  const size_t bytes = box_bytes(*map);
  if (block->config.race) {
    check_proxy(src, bytes, "TMA reads", SIMT_CALLER);
    touch(src, bytes, false, SIMT_CALLER, block->current);
    // From here to the wait it is the async proxy that reads: a clock that only the wait shows to this
    // thread.
    box.clock = ++block->hopper->clock;
    absorb(block->clock(block->threads), block->clock(block->current));
    block->own_clock(block->threads) = box.clock;
    touch(src, bytes, false, SIMT_CALLER, block->threads);
  }
  block->hopper->stores[size_t(block->current)].open.push_back(box);
}

void tma_store_commit() {
  BulkGroups& mine = block->hopper->stores[size_t(block->current)];
  mine.groups.emplace_back();
  mine.groups.back().swap(mine.open);
}

void tma_store_wait_read(int keep) {
  BulkGroups& mine = block->hopper->stores[size_t(block->current)];
  while (mine.groups.size() > size_t(keep)) {
    for (const Box& box : mine.groups.front()) {
      take(box);
      if (!block->config.race) continue;
      u32& seen = block->clock(block->current)[block->threads];
      if (seen < box.clock) seen = box.clock;
    }
    mine.groups.erase(mine.groups.begin());
  }
}

bool stores_pending(int thread) {
  const BulkGroups& mine = block->hopper->stores[size_t(thread)];
  return !mine.open.empty() || !mine.groups.empty();
}
}  // namespace rt
}  // namespace simt
