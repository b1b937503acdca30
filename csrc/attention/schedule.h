// Who computes what: query tiles spread over a fixed number of blocks, the remainder cut along its keys.
//
// 4680 queries of 12 heads are 444 tiles of 128: on 132 multiprocessors three full rounds and a fourth that
// leaves 84 of them idle. So only full rounds run tile by tile; the keys of the remaining tiles are dealt out
// evenly and a second, small kernel joins what the blocks found. Nothing depends on timing.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define ECHO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ECHO_HOST_DEVICE inline
#endif

namespace echo::attention {

// A run of key steps of one tile, for one block to do.
struct Piece {
  int32_t tile = 0;
  int32_t begin = 0, end = 0;  // steps
  int32_t slot = -1;           // where its part of the result goes; -1: it is the whole tile
};

struct Schedule {
  int32_t tiles = 0;    // batch x heads x query tiles
  int32_t steps = 0;    // key steps of a tile
  int32_t blocks = 0;   // grid size
  int32_t whole = 0;    // the first tiles, done whole: block b does b, b + blocks, ..
  int32_t sharers = 0;  // blocks that share the other tiles; 0 where there are none

  // Workspace: two slots a sharing block, because its run of steps touches two tiles at most.
  ECHO_HOST_DEVICE int32_t slots() const { return 2 * sharers; }
  ECHO_HOST_DEVICE int32_t shared_tiles() const { return tiles - whole; }

  // First step (counted over all shared tiles) of a sharing block, and the block that does a step.
  ECHO_HOST_DEVICE int64_t first_step(int32_t block) const {
    return int64_t(shared_tiles()) * steps * block / sharers;
  }
  ECHO_HOST_DEVICE int32_t sharer_of(int64_t step) const {
    return int32_t(((step + 1) * sharers - 1) / (int64_t(shared_tiles()) * steps));
  }
  // Slot of a block's part of a shared tile (counted from the first shared one).
  ECHO_HOST_DEVICE int32_t slot_of(int32_t block, int32_t tile) const {
    return 2 * block + (first_step(block) < int64_t(tile) * steps);
  }

  // The n-th piece of a block; false where it has none left.
  ECHO_HOST_DEVICE bool piece(int32_t block, int32_t n, Piece& out) const {
    const int32_t rounds = (whole - block + blocks - 1) / blocks;  // of whole tiles for this block
    if (n < rounds) {
      out = {block + n * blocks, 0, steps, -1};
      return true;
    }
    if (block >= sharers) return false;
    const int64_t begin = first_step(block), end = first_step(block + 1);
    const int32_t tile = int32_t(begin / steps) + n - rounds;
    const int64_t base = int64_t(tile) * steps;
    if (base >= end) return false;
    const int32_t from = begin > base ? int32_t(begin - base) : 0;
    const int32_t to = end - base < steps ? int32_t(end - base) : steps;
    out = {whole + tile, from, to, to - from == steps ? -1 : slot_of(block, tile)};
    return true;
  }
};

// Spreads tiles over at most `blocks` blocks. Sharing costs about as much as a few steps, so it must save
// more.
inline Schedule make_schedule(int32_t tiles, int32_t steps, int32_t blocks) {
  constexpr int32_t kMinSteps = 4;  // of a block's share, and the least that sharing must save
  const int32_t rest = tiles % blocks;
  const int64_t shared = int64_t(rest) * steps;
  const int64_t most = shared / kMinSteps;
  const int32_t sharers = int32_t(most < blocks ? most : blocks);
  if (sharers <= rest || (shared + sharers - 1) / sharers + kMinSteps > steps)
    return {tiles, steps, tiles < blocks ? tiles : blocks, tiles, 0};
  return {tiles, steps, tiles > rest ? blocks : sharers, tiles - rest, sharers};
}

}  // namespace echo::attention
