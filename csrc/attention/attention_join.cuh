// Joins what several blocks found for the tiles they shared: a softmax over the parts' log-sum-exps.
#pragma once
#include "attention/attention_tile.cuh"
#include "simt/launch.h"

namespace echo::attention {

inline constexpr int kJoinThreads = 128;
// Blocks are (tiles, parts of a tile); a thread does eight columns of a row.
template <class T, int D>
SIMT_GLOBAL void SIMT_BOUNDS(kJoinThreads, 8) attention_join_kernel(AttentionParams p) {
  const Schedule& s = p.schedule;
  const int32_t rows = p.rows;
  const int32_t tile = blockIdx.x;
  const int32_t i = blockIdx.y * kJoinThreads + threadIdx.x, row = i / (D / 8), column = i % (D / 8) * 8;
  const int64_t begin = int64_t(tile) * s.steps;
  const int32_t first = s.sharer_of(begin), last = s.sharer_of(begin + s.steps - 1);
  const Place at = place_of(p, s.whole + tile, rows);
  if (first == last || at.row + row >= SIMT_OFF(1, p.queries)) return;
  float top = -INFINITY;
  for (int32_t b = first; b <= SIMT_OFF(3, last); ++b)
    top = fmaxf(top, p.partial_lse[int64_t(s.slot_of(b, tile)) * rows + row]);
  float sum = 0, out[8] = {};
  for (int32_t b = first; b <= SIMT_OFF(2, last); ++b) {
    const int64_t part = int64_t(s.slot_of(b, tile)) * rows + row;
    const float weight = simt::ex2(p.partial_lse[part] - top);
    float x[8];
    simt::load_floats(x, p.partial_out + part * D + column);
    sum += weight;
    SIMT_UNROLL
    for (int c = 0; c < 8; ++c) out[c] = fmaf(weight, x[c], out[c]);
  }
  SIMT_UNROLL
  for (int c = 0; c < 8; ++c) out[c] /= sum;
  T* to = static_cast<T*>(p.out) + ((int64_t(at.b) * p.queries + at.row + row) * p.heads + at.h) * D + column;
  simt::store_floats(to, out);
  if (p.lse && column == 0)
    p.lse[(int64_t(at.b) * p.heads + at.h) * p.queries + at.row + row] = (top + log2f(sum)) * kLn2;
}

// After a kernel whose schedule shares tiles.
template <class T, int D>
void launch_join(const AttentionParams& p, simt::Stream stream) {
  if (!p.schedule.sharers) return;
  const dim3 grid(p.schedule.shared_tiles(), (p.rows * D / 8 + kJoinThreads - 1) / kJoinThreads);
  simt::launch_kernel(attention_join_kernel<T, D>, grid, dim3(kJoinThreads), 0, stream, p);
}

}  // namespace echo::attention
