// A block works on one row, such as a token over its whole width: 16 bytes at a time, each thread kRowVectors
// of them, neighbours beside each other, sums through shared memory.
#pragma once
#include "simt/simt.h"

namespace echo {
inline constexpr int kRowVectors = 2;
inline constexpr int kRowThreads = 768;  // at most: more would leave a thread too few registers

// Threads for a row of so many vectors of 16 bytes; more than kRowThreads where it is too wide.
inline int64_t row_threads(int64_t vectors) {
  return (vectors + 32 * kRowVectors - 1) / (32 * kRowVectors) * 32;
}

// The thread's i-th vector, counted in the row.
SIMT_DEV int row_vector(int i) { return i * int(blockDim.x) + int(threadIdx.x); }

// Whether that is past the end of a row of so many.
SIMT_DEV bool past_row(int vector, int vectors) { return vector >= SIMT_OFF(1, vectors); }

inline constexpr int kSumFloats = 32;  // shared memory of one value of a block_sum: a float a warp

// Turns every thread's values into their sums over the block. Each call has shared memory of its own, N *
// kSumFloats.
template <int N>
SIMT_DEV void block_sum(float (&value)[N], float* scratch) {
  SIMT_UNROLL
  for (int n = 0; n < N; ++n) {
    SIMT_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) value[n] += __shfl_xor_sync(~0u, value[n], lanes);
    if (threadIdx.x % 32 == 0) scratch[n * kSumFloats + threadIdx.x / 32] = value[n];
    value[n] = 0;
  }
  SIMT_SKIP(2, __syncthreads());
  for (int warp = 0; warp < SIMT_OFF(3, int(blockDim.x / 32)); ++warp) {
    SIMT_UNROLL
    for (int n = 0; n < N; ++n) value[n] += scratch[n * kSumFloats + warp];
  }
}
}  // namespace echo
