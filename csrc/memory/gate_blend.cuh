// A product with an epilogue: logits of 128 tokens x 128 channels a block, on tensor cores (or FFMA for
// float32 weights), then sigmoid and blend; the gate stays in registers. Tiles of [state ; proposal] and
// weight arrive by cp.async, several steps ahead. A float32 state beside 16-bit weights is rounded to their
// type on its way to the tensor cores, and blended as it is.
#pragma once
#include "memory/gate_blend.h"
#include "simt/simt.h"

namespace echo {
// S: storage type of the state, W: of the weight.
template <class S, class W>
struct GateTile {
  static constexpr bool kTensorCores = sizeof(W) == 2;
  static constexpr int kThreads = 256;
  static constexpr int kTokens = 128, kChannels = 128;
  static constexpr int kDepth = 64 / int(sizeof(W));  // elements of a row that a step multiplies
  static constexpr int kTokenBytes = kDepth * int(sizeof(S)), kWeightBytes = 64;  // of a row
  static constexpr int kStages = kTokenBytes == 64 ? 4 : 3;
  static constexpr int kStageBytes = kTokens * kTokenBytes + kChannels * kWeightBytes;
  static constexpr int kSmemBytes = kStages * kStageBytes;

  // Rows of 64 bytes: eight neighbouring rows at one chunk of 16 bytes fall into eight different banks of 16
  // bytes. Rows of 128 bytes: four neighbouring rows at two neighbouring chunks do.
  template <int kRowBytes>
  SIMT_DEV static uint32_t offset(int row, int chunk) {
    const int turn = kRowBytes == 64 ? row / 2 % 4 : row % 4 * 2;
    return uint32_t(row * kRowBytes + ((chunk ^ turn) << 4));
  }
};

// Copies 128 rows of kRowBytes to shared memory, from `first_row` of `rows` and column `first` of `width` on;
// what is past either end becomes zero.
template <class C, int kRowBytes, class T>
SIMT_DEV void load_gate_tile(uint32_t to, const T* from, int64_t stride, int first_row, int rows, int first,
                             int width) {
  constexpr int kChunks = kRowBytes / 16, kRowsAPass = C::kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, column = first + chunk * simt::kPer16Bytes<T>;
  const bool inside = column < SIMT_OFF(1, width);
  SIMT_UNROLL
  for (int i = 0; i < 128; i += kRowsAPass) {
    const int row = i + int(threadIdx.x) / kChunks;
    simt::cp_async16(to + C::template offset<kRowBytes>(row, chunk),
                     from + (first_row + row) * stride + column,
                     inside && first_row + row < SIMT_OFF(2, rows));
  }
}

// A warp multiplies 64 tokens with 32 channels. Fragments are those of mma.m16n8k16: element e of sum[m][n]
// is token 16 m + lane / 4 + 8 (e / 2), channel 8 n + 2 (lane % 4) + e % 2.
template <class S, class W>
SIMT_DEV void multiply_tensor(float (&sum)[4][4][4], uint32_t a_tile, uint32_t b_tile) {
  using C = GateTile<S, W>;
  const uint32_t smem = simt::smem_addr(simt::dyn_smem());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = warp % 2 * 64, channel = warp / 2 * 32;
  SIMT_UNROLL
  for (int k = 0; k < C::kDepth / 16; ++k) {
    uint32_t b[2][4];
    SIMT_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int row = channel + n * 16 + lane % 8 + lane / 16 * 8;
      simt::ldmatrix_x4(b[n], smem + b_tile + C::template offset<64>(row, 2 * k + lane / 8 % 2));
    }
    SIMT_UNROLL
    for (int m = 0; m < 4; ++m) {
      uint32_t a[4];
      if constexpr (sizeof(S) == 2) {
        simt::ldmatrix_x4(
            a, smem + a_tile + C::template offset<64>(token + m * 16 + lane % 16, 2 * k + lane / 16));
      } else {
        SIMT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = token + m * 16 + lane / 4 + i % 2 * 8, chunk = 4 * k + lane % 4 / 2 + i / 2 * 2;
          const unsigned char* at =
              simt::dyn_smem() + a_tile + C::template offset<128>(row, chunk) + lane % 2 * 8;
          const float2 pair = *reinterpret_cast<const float2*>(at);
          a[i] = simt::Numeric<W>::pack(pair.x, pair.y);
        }
      }
      SIMT_UNROLL
      for (int n = 0; n < 4; ++n)
        simt::Numeric<W>::mma(sum[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
}

// A thread multiplies tokens tid / 16 + 16 i with channels tid % 16 + 16 j.
SIMT_DEV void multiply_ffma(float (&sum)[8][8][1], uint32_t a_tile, uint32_t b_tile) {
  using C = GateTile<float, float>;
  const uint32_t a_row = a_tile + C::offset<64>(threadIdx.x / 16, 0);
  const uint32_t b_row = b_tile + C::offset<64>(threadIdx.x % 16, 0);
  for (int chunk = 0; chunk < 4; ++chunk) {
    // offset(row + 16 i, chunk) is offset(row, 0) ^ chunk << 4, and 16 i rows further.
    const unsigned char* a_at = simt::dyn_smem() + (a_row ^ uint32_t(chunk) << 4);
    const unsigned char* b_at = simt::dyn_smem() + (b_row ^ uint32_t(chunk) << 4);
    SIMT_UNROLL
    for (int pair = 0; pair < 16; pair += 8) {
      float2 b[8];
      SIMT_UNROLL
      for (int j = 0; j < 8; ++j) b[j] = *reinterpret_cast<const float2*>(b_at + j * 16 * 64 + pair);
      SIMT_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float2 a = *reinterpret_cast<const float2*>(a_at + i * 16 * 64 + pair);
        SIMT_UNROLL
        for (int j = 0; j < 8; ++j) sum[i][j][0] = fmaf(a.y, b[j].y, fmaf(a.x, b[j].x, sum[i][j][0]));
      }
    }
  }
}

template <int N, class T>
SIMT_DEV void load_few(float (&out)[N], const T* p) {
  if constexpr (N == 2 && sizeof(T) == 2) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(p);
    out[0] = simt::Numeric<T>::low(pair);
    out[1] = simt::Numeric<T>::high(pair);
  } else {
    simt::load_floats(out, p);
  }
}

// Turns N neighbouring logits of a token into the blend. A gate of exactly 1 keeps the state's bits, of 0 the
// proposal's.
template <class S, class W, int N>
SIMT_DEV void blend(const GateBlendParams& p, int token, int channel, const float (&logit)[N]) {
  if (token >= SIMT_OFF(3, int(p.tokens)) || channel >= SIMT_OFF(4, int(p.width))) return;
  const int64_t batch = blockIdx.z;
  float bias[N], state[N], proposal[N], out[N];
  load_few(bias, static_cast<const W*>(p.bias) + channel);
  load_few(state,
           static_cast<const S*>(p.state) + batch * p.state_stride[0] + token * p.state_stride[1] + channel);
  load_few(proposal, static_cast<const S*>(p.proposal) + batch * p.proposal_stride[0] +
                         token * p.proposal_stride[1] + channel);
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) {
    const float g = 1 / (1 + simt::ex2(-1.44269504f * (logit[i] + bias[i])));
    out[i] = fmaf(g, state[i], fmaf(-g, proposal[i], proposal[i]));
  }
  S* to = static_cast<S*>(p.out) + (batch * p.tokens + token) * p.width + channel;
  if constexpr (N == 2 && sizeof(S) == 2)
    *reinterpret_cast<uint32_t*>(to) = simt::Numeric<S>::pack(out[0], out[1]);
  else
    simt::store_floats(to, out);
}

template <class S, class W>
SIMT_GLOBAL void SIMT_BOUNDS(256, 2) gate_blend_fwd_kernel(const GateBlendParams p) {
  using C = GateTile<S, W>;
  const uint32_t smem = simt::smem_addr(simt::dyn_smem());
  const int first_token = blockIdx.x * C::kTokens, first_channel = blockIdx.y * C::kChannels;
  const int64_t batch = blockIdx.z;
  const int tokens = int(p.tokens), width = int(p.width);
  const int half = (width + C::kDepth - 1) / C::kDepth, steps = 2 * half;  // of state, then of proposal

  auto start_copy = [&](int step) {
    if (step < steps) {  // no mutant: past the last step only zeros would be copied, and not read
      const uint32_t to = smem + step % C::kStages * C::kStageBytes;
      const bool second = step >= SIMT_OFF(5, half);
      const int first = (second ? step - half : step) * C::kDepth;
      const int64_t stride = second ? p.proposal_stride[1] : p.state_stride[1];
      const S* rows = static_cast<const S*>(second ? p.proposal : p.state) +
                      batch * (second ? p.proposal_stride[0] : p.state_stride[0]);
      const W* weight = static_cast<const W*>(p.weight) + (second ? width : 0);
      load_gate_tile<C, C::kTokenBytes>(to, rows, stride, first_token, tokens, first, width);
      load_gate_tile<C, C::kWeightBytes>(to + C::kTokens * C::kTokenBytes, weight, p.weight_stride,
                                         first_channel, width, first, width);
    }
    simt::cp_async_commit();  // no mutant: a group more or less moves every wait
  };
  SIMT_UNROLL
  for (int step = 0; step < C::kStages - 1; ++step) start_copy(step);

  constexpr int kRows = C::kTensorCores ? 4 : 8;
  float sum[kRows][kRows][64 / kRows / kRows] = {};
  for (int step = 0; step < SIMT_OFF(6, steps); ++step) {
    SIMT_SKIP(7, simt::cp_async_wait<C::kStages - 2>());
    SIMT_SKIP(8, __syncthreads());
    start_copy(step + C::kStages - 1);  // into the stage that all had read before the barrier
    const uint32_t a_tile = step % C::kStages * C::kStageBytes, b_tile = a_tile + C::kTokens * C::kTokenBytes;
    if constexpr (C::kTensorCores)
      multiply_tensor<S, W>(sum, a_tile, b_tile);
    else
      multiply_ffma(sum, a_tile, b_tile);
  }
  SIMT_SKIP(9, simt::cp_async_wait<0>());  // of groups without a copy

  if constexpr (C::kTensorCores) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    SIMT_UNROLL
    for (int m = 0; m < 4; ++m) {
      SIMT_UNROLL
      for (int n = 0; n < 4; ++n) {
        SIMT_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float logits[2] = {sum[m][n][2 * e], sum[m][n][2 * e + 1]};
          blend<S, W>(p, first_token + warp % 2 * 64 + m * 16 + lane / 4 + e * 8,
                      first_channel + warp / 2 * 32 + n * 8 + lane % 4 * 2, logits);
        }
      }
    }
  } else {
    SIMT_UNROLL
    for (int i = 0; i < 8; ++i) {
      SIMT_UNROLL
      for (int j = 0; j < 8; ++j)
        blend<S, W>(p, first_token + int(threadIdx.x) / 16 + 16 * i,
                    first_channel + int(threadIdx.x) % 16 + 16 * j, sum[i][j]);
    }
  }
}
}  // namespace echo
