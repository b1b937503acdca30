// Memory bound, and the half of ring_append that concerns queries: a block reads a token once and writes it
// once.
#pragma once
#include "memory/memory_query.h"
#include "rope/rope_row.cuh"

namespace echo {
template <class T>
SIMT_GLOBAL void SIMT_BOUNDS(kRowThreads, 1) memory_query_fwd_kernel(const MemoryQueryParams p) {
  constexpr int kVec = simt::kPer16Bytes<T>;
  const int64_t token = blockIdx.x, batch = blockIdx.y;
  const int frame = int(token) / int(p.frame_tokens), cell = int(token) - frame * int(p.frame_tokens);
  const int width = int(p.heads * p.head_dim), vectors = width / kVec;
  const T* row = static_cast<const T*>(p.q) + batch * p.q_stride[0] + token * p.q_stride[1];
  T* out = static_cast<T*>(p.out) + (batch * p.tokens + token) * width;

  float q[kRowVectors][kVec] = {}, squares[1] = {0};
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    if (past_row(row_vector(i), vectors)) break;
    simt::load_floats(q[i], row + offset_of(channels_of<T>(row_vector(i), int(p.head_dim)), p.q_stride[2]));
    squares[0] = add_squares(squares[0], q[i]);
  }
  if (p.weight) block_sum(squares, reinterpret_cast<float*>(simt::dyn_smem()));
  const float by = rsqrtf(squares[0] / float(width) + p.eps);

  const float* table = p.frame_table + batch * p.table_stride[0] + frame * p.table_stride[1];
  const float* grid = p.grid_table + cell * p.grid_stride;
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    const int column = row_vector(i) * kVec;
    if (past_row(row_vector(i), vectors)) break;
    if (p.weight) scale_row(q[i], by, static_cast<const T*>(p.weight) + column);
    if (p.frame_table) {
      float2 angle[kVec / 2];
      load_angles(angle, column % int(p.head_dim), int(p.frame_pairs), table, grid);
      rotate(q[i], angle);
    }
    simt::store_floats(out + column, q[i]);
  }
}
}  // namespace echo
