// Order of accesses to shared memory: vector clocks as in FastTrack, a cell for each 2 bytes. Only barriers,
// __syncwarp and mbarriers order accesses; shuffles and tensor core operations do not.
#include <cstring>

#include "simt/host/state.h"

namespace simt {
namespace rt {
namespace {
void check_order(const Cell& c, uptr offset, bool write, void* pc, int agent, TouchKind kind) {
  const u32* seen = block->clock(agent);
  if (c.write_clock && c.writer != agent && seen[c.writer] < c.write_clock && !(kind == kAtomic && c.atomic))
    report(pc, c.write_pc, "shared+%zu: RACE, %s %s while the write by %s is not ordered before it", offset,
           who(agent).c_str(), write ? "writes" : "reads", who(c.writer).c_str());
  if (!write) return;
  for (int i = 0; i < c.readers; ++i)
    if (c.reader[i] != agent && seen[c.reader[i]] < c.read_clock[i]) {
      report(pc, c.read_pc, "shared+%zu: RACE, %s writes while the read by %s is not ordered before it",
             offset, who(agent).c_str(), who(c.reader[i]).c_str());
      return;
    }
}

void note_read(Cell& c, void* pc, int agent) {
  const u32* seen = block->clock(agent);
  int i = 0;
  while (i < c.readers && c.reader[i] != agent && seen[c.reader[i]] < c.read_clock[i])
    ++i;  // else it is subsumed
  if (i == 4)
    i = (agent >> 5) & 3;
  else if (i == c.readers)
    c.readers++;
  c.reader[i] = uint16_t(agent);
  c.read_clock[i] = seen[agent];
  c.read_pc = pc;
}
}  // namespace

void touch(uptr offset, size_t bytes, bool write, void* pc, int agent, TouchKind kind) {
  const size_t last = (offset + bytes - 1) / kGranule;
  for (size_t g = offset / kGranule; g <= last; ++g) {
    Cell& c = block->cells[g];
    if (c.write_clock == kInFlight) {
      report(pc, c.write_pc, "shared+%zu: %s %s bytes of an async copy by %s that has not completed here",
             offset, who(agent).c_str(), write ? "writes" : "reads", who(c.writer).c_str());
      continue;
    }
    if (!write && !c.write_clock) {
      report(pc, nullptr, "shared+%zu: %s reads uninitialised shared memory", offset, who(agent).c_str());
      continue;
    }
    check_order(c, offset, write, pc, agent, kind);
    if (!write) {
      note_read(c, pc, agent);
      continue;
    }
    c.writer = uint16_t(agent);
    c.write_clock = kind == kIssue ? kInFlight : block->own_clock(agent);
    c.readers = 0;
    c.write_pc = pc;
    c.atomic = kind == kAtomic;
  }
}

void delivered(uptr offset, size_t bytes, int agent, u32 clock, void* pc) {
  if (!block->config.race) return;
  for (size_t g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) {
    Cell& c = block->cells[g];
    c.writer = uint16_t(agent);
    c.write_clock = clock;
    if (pc) c.write_pc = pc;
  }
}

void absorb(u32* into, const u32* from) {
  for (int i = 0; i < block->agents; ++i)
    if (from[i] > into[i]) into[i] = from[i];
}

void join(const std::vector<int>& threads) {
  if (!block->config.race) return;
  std::vector<u32> all(block->agents, 0);
  for (int t : threads) absorb(all.data(), block->clock(t));
  for (int t : threads) {
    std::memcpy(block->clock(t), all.data(), all.size() * sizeof(u32));
    block->own_clock(t)++;
  }
}
}  // namespace rt
}  // namespace simt
