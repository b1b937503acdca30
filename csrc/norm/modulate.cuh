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

  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch + token * p.x_token;
  float v[kRowVectors][kVec] = {};
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i)
    if (!past_row(row_vector(i), vectors)) simt::load_floats(v[i], x + row_vector(i) * kVec);

  if (p.y) {
    const T* y = static_cast<const T*>(p.y) + batch * p.y_batch + token * p.y_token;
    const T* gate = static_cast<const T*>(p.gate) + batch * p.gate_batch + frame * p.gate_frame;
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

  float mean[1] = {0}, variance[1] = {0};
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    SIMT_UNROLL
    for (int j = 0; j < kVec; ++j) mean[0] += v[i][j];
  }
  block_sum(mean, scratch);
  mean[0] /= float(p.width);
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    if (past_row(row_vector(i), vectors)) break;
    SIMT_UNROLL
    for (int j = 0; j < kVec; ++j) {
      v[i][j] -= mean[0];
      variance[0] = fmaf(v[i][j], v[i][j], variance[0]);
    }
  }
  block_sum(variance, scratch + kSumFloats);
  const float inverse = rsqrtf(variance[0] / float(p.width) + p.eps);

  const T* shift = static_cast<const T*>(p.shift) + batch * p.shift_batch + frame * p.shift_frame;
  const T* scale = static_cast<const T*>(p.scale) + batch * p.scale_batch + frame * p.scale_frame;
  SIMT_UNROLL
  for (int i = 0; i < kRowVectors; ++i) {
    const int at = row_vector(i) * kVec;
    if (past_row(row_vector(i), vectors)) break;
    float by[kVec], add[kVec];
    simt::load_floats(by, scale + at);
    simt::load_floats(add, shift + at);
    SIMT_UNROLL
    for (int j = 0; j < kVec; ++j) v[i][j] = fmaf(v[i][j] * inverse, by[j], add[j]);
    simt::store_floats(static_cast<T*>(p.out) + row + at, v[i]);
  }
}
}  // namespace echo
