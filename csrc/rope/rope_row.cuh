// RMSNorm and 3-D rotation of a row that a block holds: a token over all its heads.
#pragma once
#include "common/block_row.cuh"
#include "simt/simt.h"

namespace echo {
// 16 bytes of a token: where they lie in its heads.
struct Channels {
  int head, first;
};
template <class T>
SIMT_DEV Channels channels_of(int vector, int head_dim) {
  const int element = vector * simt::kPer16Bytes<T>, head = element / head_dim;
  return {head, element - head * head_dim};
}

SIMT_DEV int64_t offset_of(const Channels& at, int64_t head_stride) {
  return at.head * head_stride + at.first;
}

template <int N>
SIMT_DEV float add_squares(float sum, const float (&x)[N]) {
  SIMT_UNROLL
  for (int j = 0; j < N; ++j) sum = fmaf(x[j], x[j], sum);
  return sum;
}

template <int N, class T>
SIMT_DEV void scale_row(float (&x)[N], float by, const T* weight) {
  float w[N];
  simt::load_floats(w, weight);
  SIMT_UNROLL
  for (int j = 0; j < N; ++j) x[j] = x[j] * by * w[j];
}

// (cos, sin) of neighbouring pairs, the first of them of channel `first`: frame_pairs of a head turn by
// frame, the rest by place.
template <int N>
SIMT_DEV void load_angles(float2 (&angle)[N], int first, int frame_pairs, const float* frame,
                          const float* grid) {
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) {
    const int pair = first / 2 + i;
    const float* entry = pair < SIMT_OFF(1, frame_pairs) ? frame + 2 * pair : grid + 2 * (pair - frame_pairs);
    angle[i] = {entry[0], entry[1]};
  }
}

template <int N>
SIMT_DEV void rotate(float (&x)[N], const float2 (&angle)[N / 2]) {
  SIMT_UNROLL
  for (int j = 0; j < N; j += 2) {
    const float even = x[j], odd = x[j + 1], cos = angle[j / 2].x, sin = angle[j / 2].y;
    x[j] = even * cos - odd * sin;
    x[j + 1] = even * sin + odd * cos;
  }
}
}  // namespace echo
