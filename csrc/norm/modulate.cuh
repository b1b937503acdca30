// Memory bound: a block reads a token once, keeps it in registers and writes once what is asked for. The
// vectors of its frame come from the cache, where the tokens before left them.
#pragma once
#include "common/block_row.cuh"
#include "norm/modulate.h"

namespace echo {
template <class T>
SIMT_GLOBAL void SIMT_BOUNDS(kRowThreads, 1) modulate_fwd_kernel(const ModulateParams p) {
  constexpr int kVec = simt::kPer16Bytes<T>;
  float* scratch = reinterpret_cast<float*>(simt::dyn_smem());
  const int64_t token = blockIdx.x, batch = blockIdx.y, frame = int(token) / int(p.frame_tokens);
  const int64_t row = (batch * p.tokens + token) * p.width;
  const int vectors = int(p.width) / kVec;

  const T* x = static_cast<const T*>(p.x) + batch * p.x_stride[0] + token * p.x_stride[1];
  float v[kRowVectors][kVec] = {};
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i)
    if (!past_row(row_vector(i), vectors)) simt::load_floats(v[i], x + row_vector(i) * kVec);

  if (p.y) {
    const T* y = static_cast<const T*>(p.y) + batch * p.y_stride[0] + token * p.y_stride[1];
    const T* gate = static_cast<const T*>(p.gate) + batch * p.gate_stride[0] + frame * p.gate_stride[1];
    SIMT_UNROLL
    for (int i = 0; i < kRowVectors; ++i) {
      const int at = row_vector(i) * kVec;
      if (past_row(row_vector(i), vectors)) break;
      float add[kVec], share[kVec];
      simt::load_floats(add, y + at);
      if (p.gate) simt::load_floats(share, gate + at);
      SIMT_UNROLL
      for (int j = 0; j < kVec; ++j) v[i][j] = p.gate ? fmaf(share[j], add[j], v[i][j]) : v[i][j] + add[j];
      simt::store_floats(static_cast<T*>(p.sum) + row + at, v[i]);
    }
  }
  if (!p.out) return;

  float mean[1] = {0};
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    SIMT_UNROLL
    for (int j = 0; j < kVec; ++j) mean[0] += v[i][j];
  }
  block_sum(mean, scratch);
  mean[0] /= float(p.width);
  // What is left of the mean after subtracting it is its rounding error: large where the mean is.
  float rest[2] = {0, 0};  // sums of the differences and of their squares
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    if (past_row(row_vector(i), vectors)) break;
    SIMT_UNROLL
    for (int j = 0; j < kVec; ++j) {
      v[i][j] -= mean[0];
      rest[0] += v[i][j];
      rest[1] = fmaf(v[i][j], v[i][j], rest[1]);
    }
  }
  block_sum(rest, scratch + kSumFloats);
  const float error = rest[0] / float(p.width);
  const float inverse = rsqrtf(rest[1] / float(p.width) - error * error + p.eps);

  const T* shift = static_cast<const T*>(p.shift) + batch * p.shift_stride[0] + frame * p.shift_stride[1];
  const T* scale = static_cast<const T*>(p.scale) + batch * p.scale_stride[0] + frame * p.scale_stride[1];
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    const int at = row_vector(i) * kVec;
    if (past_row(row_vector(i), vectors)) break;
    float by[kVec], add[kVec];
    simt::load_floats(by, scale + at);
    simt::load_floats(add, shift + at);
    SIMT_UNROLL
    for (int j = 0; j < kVec; ++j) v[i][j] = fmaf((v[i][j] - error) * inverse, by[j], add[j]);
    simt::store_floats(static_cast<T*>(p.out) + row + at, v[i]);
  }
}
}  // namespace echo
