// What the attention kernels of all architectures share: where a tile lies, softmax on the accumulators of
// mma.m16n8k16 (wgmma's are the same), and how results are written.
#pragma once
#include "attention/attention_params.h"
#include "simt/simt.h"

namespace echo::attention {

inline constexpr float kLn2 = 0.69314718056f;

// Which queries a tile holds: batch element, head, first row.
struct Place {
  int32_t b, h, row;
};
SIMT_DEV Place place_of(const AttentionParams& p, int32_t tile, int32_t rows) {
  const int32_t per_head = (p.queries + rows - 1) / rows, head = tile / per_head;
  return {head / p.heads, head % p.heads, (tile - head * per_head) * rows};
}

// The segment and first key of a step.
struct Keys {
  int32_t segment, first;
};
template <int kKeys>
SIMT_DEV Keys keys_of(const AttentionParams& p, int32_t step) {
  if (step < SIMT_OFF(1, p.step_end[0])) return {0, step * kKeys};
  if (step < SIMT_OFF(2, p.step_end[1])) return {1, (step - p.step_end[0]) * kKeys};
  return {2, (step - p.step_end[1]) * kKeys};
}

// The two functions below take fragments of one m16 tile, `s[4 n + e]` for n < kTiles.

// Keys from `left` on are not there.
template <int kTiles>
SIMT_DEV void mask_keys(float* s, int32_t left) {
  const int column = (threadIdx.x & 3) * 2;
  SIMT_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e)
      if (n * 8 + column + (e & 1) >= SIMT_OFF(3, left)) s[4 * n + e] = -INFINITY;
  }
}

// Turns the scores of a lane's upper (h = 0) or lower row into weights 2^(s scale - m), m the running maximum
// in units of log 2, and returns the factor by which everything before them shrinks. m is rounded once, and
// exactly that number is subtracted, kept and reported: scores may be as large as float32 holds.
template <int kTiles>
SIMT_DEV float to_weights(float* s, int h, float scale_log2, float& m, float& sum) {
  float top = s[2 * h];
  SIMT_UNROLL
  for (int n = 0; n < kTiles; ++n) top = fmaxf(top, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  const float next = fmaxf(m, top * scale_log2), shrink = simt::ex2(m - next);
  m = next;
  float add = 0;
  SIMT_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    SIMT_UNROLL
    for (int e = 0; e < 2; ++e) {
      float& weight = s[4 * n + 2 * h + e];
      weight = simt::ex2(fmaf(weight, scale_log2, -next));
      add += weight;
    }
  }
  sum = sum * shrink + add;
  return shrink;
}

// The first of a lane's two columns in fragment n of the output.
template <class T>
SIMT_DEV int column_of(int n, int lane) {
  return sizeof(T) == 4 ? n / 2 * 16 + (lane & 3) * 4 + n % 2 * 2 : n * 8 + (lane & 3) * 2;
}

// Writes a row's share of a lane; `sum` is the lane's own.
template <class T, int D, class Value>
SIMT_DEV void write_row(const AttentionParams& p, const Place& at, const Piece& piece, int rows, int row,
                        float m, float sum, const Value& value) {
  const int lane = threadIdx.x & 31;
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (at.row + row >= SIMT_OFF(4, p.queries)) return;
  const float inverse = 1 / sum, lse = m + log2f(sum);
  if (piece.slot >= 0) {
    const int64_t i = int64_t(piece.slot) * rows + row;
    SIMT_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const float2 pair = {value(n, 0) * inverse, value(n, 1) * inverse};
      *reinterpret_cast<float2*>(p.partial_out + i * D + column_of<T>(n, lane)) = pair;
    }
    if ((lane & 3) == 0) p.partial_lse[i] = lse;
    return;
  }
  T* out = static_cast<T*>(p.out) + ((int64_t(at.b) * p.queries + at.row + row) * p.heads + at.h) * D;
  SIMT_UNROLL
  for (int n = 0; n < D / 8; ++n) {
    const float2 pair = {value(n, 0) * inverse, value(n, 1) * inverse};
    T* to = out + column_of<T>(n, lane);
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float2*>(to) = pair;
    else
      *reinterpret_cast<uint32_t*>(to) = simt::Numeric<T>::pack(pair.x, pair.y);
  }
  if (p.lse && (lane & 3) == 0)
    p.lse[(int64_t(at.b) * p.heads + at.h) * p.queries + at.row + row] = lse * kLn2;
}

}  // namespace echo::attention
