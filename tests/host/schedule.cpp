// csrc/attention/schedule.h for tests/test_attention_schedule.py.
#include "attention/schedule.h"

using echo::attention::make_schedule;
using echo::attention::Piece;
using echo::attention::Schedule;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Writes tiles, steps, blocks, whole, sharers.
EXPORT void schedule(int tiles, int steps, int blocks, int (*out)[5]) {
  const Schedule s = make_schedule(tiles, steps, blocks);
  const int values[5] = {s.tiles, s.steps, s.blocks, s.whole, s.sharers};
  for (int i = 0; i < 5; ++i) (*out)[i] = values[i];
}

// Writes tile, begin, end, slot of the n-th piece of a block; false where it has none left.
EXPORT bool piece(int tiles, int steps, int blocks, int block, int n, int (*out)[4]) {
  Piece p;
  if (!make_schedule(tiles, steps, blocks).piece(block, n, p)) return false;
  const int values[4] = {p.tile, p.begin, p.end, p.slot};
  for (int i = 0; i < 4; ++i) (*out)[i] = values[i];
  return true;
}

// Writes the slots that a shared tile is joined from; returns their number.
EXPORT int slots(int tiles, int steps, int blocks, int shared_tile, int* out) {
  const Schedule s = make_schedule(tiles, steps, blocks);
  const int64_t begin = int64_t(shared_tile) * steps;
  const int first = s.sharer_of(begin), last = s.sharer_of(begin + steps - 1);
  for (int b = first; b <= last; ++b) out[b - first] = s.slot_of(b, shared_tile);
  return last - first + 1;
}
