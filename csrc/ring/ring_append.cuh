// Memory bound: a block reads a token of q, k and v once and writes each where it belongs. Slots are read
// here, on the device, so that a captured graph sees new ones.
#pragma once
#include "ring/ring_append.h"
#include "rope/rope_row.cuh"

namespace echo {
template <class T>
SIMT_GLOBAL void SIMT_BOUNDS(kRowThreads, 1) ring_append_fwd_kernel(const RingAppendParams p) {
  constexpr int kVec = simt::kPer16Bytes<T>;
  const int64_t token = blockIdx.x, batch = blockIdx.y;
  const int frame = int(token) / int(p.frame_tokens), cell = int(token) - frame * int(p.frame_tokens);
  const int width = int(p.heads * p.head_dim), vectors = width / kVec;
  const auto row_of = [&](auto* base, const int64_t (&stride)[3], int64_t at) {
    return base + batch * stride[0] + at * stride[1];
  };
  const T* q_row = row_of(static_cast<const T*>(p.q), p.q_stride, token);
  const T* k_row = row_of(static_cast<const T*>(p.k), p.k_stride, token);
  const T* v_row = row_of(static_cast<const T*>(p.v), p.v_stride, token);

  float q[kRowVectors][kVec] = {}, k[kRowVectors][kVec] = {}, squares[2] = {0, 0};
  uint4 v[kRowVectors];
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    if (past_row(row_vector(i), vectors)) break;
    const Channels at = channels_of<T>(row_vector(i), int(p.head_dim));
    simt::load_floats(q[i], q_row + offset_of(at, p.q_stride[2]));
    simt::load_floats(k[i], k_row + offset_of(at, p.k_stride[2]));
    v[i] = simt::load16(v_row + offset_of(at, p.v_stride[2]));
  }
  const int64_t slot = p.slots[batch * p.slots_stride[0] + frame * p.slots_stride[1]];
  const bool inside = slot >= 0 && slot < SIMT_OFF(1, p.ring_slots);
  const int64_t to = slot * p.frame_tokens + cell;

  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    squares[0] = add_squares(squares[0], q[i]);
    squares[1] = add_squares(squares[1], k[i]);
  }
  block_sum(squares, reinterpret_cast<float*>(simt::dyn_smem()));
  const float q_by = rsqrtf(squares[0] / float(width) + p.eps),
              k_by = rsqrtf(squares[1] / float(width) + p.eps);

  const float* table = p.frame_table + batch * p.table_stride[0] + frame * p.table_stride[1];
  const float* key_table = p.key_frame_table + batch * p.key_table_stride[0] + frame * p.key_table_stride[1];
  const float* grid = p.grid_table + cell * p.grid_stride;
  T* out = static_cast<T*>(p.out) + (batch * p.tokens + token) * width;
  T* ring_k = row_of(static_cast<T*>(p.ring_k), p.ring_k_stride, to);
  T* ring_v = row_of(static_cast<T*>(p.ring_v), p.ring_v_stride, to);
  T* ring_raw = row_of(static_cast<T*>(p.ring_raw), p.ring_raw_stride, to);
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    const int column = row_vector(i) * kVec;
    if (past_row(row_vector(i), vectors)) break;
    const Channels at = channels_of<T>(row_vector(i), int(p.head_dim));
    float2 angle[kVec / 2];
    load_angles(angle, at.first, int(p.frame_pairs), table, grid);
    if (p.q_weight) scale_row(q[i], q_by, static_cast<const T*>(p.q_weight) + column);
    rotate(q[i], angle);
    simt::store_floats(out + column, q[i]);
    if (!inside) continue;
    simt::store16(ring_v + offset_of(at, p.ring_v_stride[2]), v[i]);
    if (p.k_weight) scale_row(k[i], k_by, static_cast<const T*>(p.k_weight) + column);
    if (p.ring_raw) simt::store_floats(ring_raw + offset_of(at, p.ring_raw_stride[2]), k[i]);
    if (key_table != table) load_angles(angle, at.first, int(p.frame_pairs), key_table, grid);
    rotate(k[i], angle);
    simt::store_floats(ring_k + offset_of(at, p.ring_k_stride[2]), k[i]);
  }
}
}  // namespace echo
