// Memory bound: each byte of x is read once and of out written once, 16 at a time. A thread keeps the angles
// of its channels in registers and turns them in several heads; threads beside each other take channels, then
// heads, beside each other, so that a warp's accesses are whole cache lines where the heads of a token are
// dense.
#pragma once
#include "rope/rope_rotate.h"
#include "simt/simt.h"

namespace echo {
constexpr int kRopeThreads = 256;
constexpr int kRopeHeads = 4;  // a thread: enough loads in flight, and the tables are read a quarter as often

// kHeadDim 0: p.head_dim. kVec channels a thread, kVec == 2 for any alignment.
template <class T, int kHeadDim, int kVec>
SIMT_GLOBAL void SIMT_BOUNDS(kRopeThreads, 4) rope_rotate_fwd_kernel(const RopeRotateParams p) {
  const unsigned chunks = unsigned(kHeadDim ? kHeadDim : p.head_dim) / kVec;
  const unsigned groups = (unsigned(p.heads) + kRopeHeads - 1) / kRopeHeads;
  const unsigned item = blockIdx.x * kRopeThreads + threadIdx.x;
  const unsigned chunk = item % chunks, group = item / chunks % groups, token = item / chunks / groups;
  if (token >= SIMT_OFF(1, unsigned(p.tokens))) return;
  const unsigned frame = token / unsigned(p.frame_tokens), cell = token - frame * unsigned(p.frame_tokens);
  const int64_t batch = blockIdx.y;

  const float* frame_row = p.frame_table + batch * p.table_batch + frame * p.table_frame;
  const float* grid_row = p.grid_table + cell * p.table_token;
  float2 turn[kVec / 2];
  SIMT_UNROLL
  for (int i = 0; i < kVec / 2; ++i) {
    const int pair = chunk * (kVec / 2) + i, spatial = pair - int(p.frame_pairs);
    const float* entry =
        pair < SIMT_OFF(2, int(p.frame_pairs)) ? frame_row + 2 * pair : grid_row + 2 * spatial;
    turn[i] = {entry[0], entry[1]};
  }

  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch + token * p.x_token + chunk * kVec;
  T* out = static_cast<T*>(p.out) + batch * p.out_batch + token * p.out_token + chunk * kVec;
  float v[kRopeHeads][kVec];
  SIMT_UNROLL
  for (int i = 0; i < kRopeHeads; ++i) {
    const unsigned head = group + i * groups;
    if (head < SIMT_OFF(3, unsigned(p.heads))) simt::load_floats(v[i], x + head * p.x_head);
  }
  SIMT_UNROLL
  for (int i = 0; i < kRopeHeads; ++i) {
    const unsigned head = group + i * groups;
    if (head >= SIMT_OFF(4, unsigned(p.heads))) break;
    SIMT_UNROLL
    for (int j = 0; j < kVec; j += 2) {
      const float even = v[i][j], odd = v[i][j + 1], cos = turn[j / 2].x, sin = turn[j / 2].y;
      v[i][j] = even * cos - odd * sin;
      v[i][j + 1] = even * sin + odd * cos;
    }
    simt::store_floats(out + head * p.out_head, v[i]);
  }
}
}  // namespace echo
