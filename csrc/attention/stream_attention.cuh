// The kernel for sm_80 and later; attention_core.cuh does the work, here the query is turned.
#pragma once
#include "attention/attention_core.cuh"
#include "attention/stream_attention.h"

namespace echo::attention {

// Pairs of a head that rotate by frame: docs/method.md section 3.
template <int D>
inline constexpr int kTemporalPairs = D / 2 - 2 * (D / 2 / 3);

// Rotates the pairs of 16 bytes of a query row by the shift of its batch element.
template <class T, int D>
SIMT_DEV uint4 turn_chunk(const StreamAttentionParams& p, int b, int chunk, uint4 x) {
  constexpr int kPairs = simt::kPer16Bytes<T> / 2;
  uint32_t words[4] = {x.x, x.y, x.z, x.w};
  const float* shift = p.shift + b * p.shift_stride + chunk * kPairs * 2;
  SIMT_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    if (chunk * kPairs + i >= SIMT_OFF(1, kTemporalPairs<D>)) break;
    const float c = shift[2 * i], s = shift[2 * i + 1];
    if constexpr (sizeof(T) == 4) {
      const float x0 = simt::float_of_bits(words[2 * i]), x1 = simt::float_of_bits(words[2 * i + 1]);
      words[2 * i] = simt::bits_of_float(fmaf(x0, c, -x1 * s));
      words[2 * i + 1] = simt::bits_of_float(fmaf(x1, c, x0 * s));
    } else {
      const float x0 = simt::Numeric<T>::low(words[i]), x1 = simt::Numeric<T>::high(words[i]);
      words[i] = simt::Numeric<T>::pack(fmaf(x0, c, -x1 * s), fmaf(x1, c, x0 * s));
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class T, int D>
SIMT_GLOBAL void SIMT_BOUNDS(128, (Tile<T, D>::kBlocks))
    stream_attention_fwd_kernel(StreamAttentionParams p) {
  attend<T, D>(p, [&](int b, int row, int h, int chunk, bool turned) {
    const uint4 x = load_chunk<T>(p, b, row, h, chunk);
    return turned ? turn_chunk<T, D>(p, b, chunk, x) : x;
  });
}

}  // namespace echo::attention
