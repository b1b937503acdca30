// The kernel for Hopper: one warpgroup of which one thread feeds tiles by TMA, two that multiply with wgmma.
// While one of the two turns scores into weights, the other keeps the tensor cores busy; and within each, the
// weights of a step are computed while the values of the step before are being summed.
//
// A step of 128 queries and 176 keys at d = 128 takes the tensor cores 2816 cycles, its 22,528 exponentials
// the special function units 1408, and 90,112 bytes from L2: 32 a cycle at the tensor cores' peak.
#pragma once
#include "attention/attention_tile.cuh"
#include "attention/stream_attention.cuh"
#include "simt/simt_sm90.h"

namespace echo::attention {

template <int D>
struct HopperTile {
  static constexpr int kConsumers = 2;  // warpgroups, 64 rows each
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = D == 128 ? 176 : 192;  // what registers and shared memory hold
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kStages = 2;  // of keys, and of values
  // Tiles are panels of 64 columns, rows of 128 bytes under the 128-byte swizzle.
  static constexpr int kPanels = D / 64;
  static constexpr int kQueryPanel = kRows * 128;
  static constexpr int kKeyPanel = kKeys * 128;
  static constexpr int kKeyTile = kPanels * kKeyPanel;
  // Shared memory: the query, its first panel turned (only that has temporal pairs), keys, values, barriers,
  // a word a consumer thread.
  static constexpr int kTurned = kPanels * kQueryPanel;
  static constexpr int kK = kTurned + kQueryPanel;
  static constexpr int kV = kK + kStages * kKeyTile;
  static constexpr int kBarriers = kV + kStages * kKeyTile;
  static constexpr int kHeld = kBarriers + 8 * (2 + 4 * kStages);
  static constexpr int kSmemBytes = kHeld + 4 * 128 * kConsumers;
  static_assert(kTemporalPairs<D> <= 32, "the turned pairs lie in the first panel");
};

struct HopperMaps {
  simt::TensorMap q, k[kMaxSegments], v[kMaxSegments];  // (d, H, T, B), box (64, 1, rows or keys, 1)
};

// mbarriers: a query tile came and was used, and likewise for the stages of keys and values.
template <int D>
struct HopperBarriers {
  uint32_t base;
  SIMT_DEV uint32_t query_full() const { return base; }
  SIMT_DEV uint32_t query_empty() const { return base + 8; }
  SIMT_DEV uint32_t full(bool values, int stage) const { return base + 16 + 8 * (2 * values + stage); }
  SIMT_DEV uint32_t empty(bool values, int stage) const { return full(values, stage) + 32; }
};

// Tile `count` of a sequence through the stages: its stage, and the parity of its barriers' phase.
template <int D>
SIMT_DEV int stage_of(int count) {
  return count % HopperTile<D>::kStages;
}
template <int D>
SIMT_DEV int parity_of(int count) {
  return count / HopperTile<D>::kStages & 1;
}

// One thread: queries, keys and values of all pieces of this block, as far ahead as there are stages.
template <int D>
SIMT_DEV void produce(const StreamAttentionParams& p, const HopperMaps& maps, uint32_t smem) {
  using C = HopperTile<D>;
  const HopperBarriers<D> barriers = {smem + C::kBarriers};
  int count = 0;  // key tiles of the pieces before
  Piece piece;
  for (int32_t n = 0; p.schedule.piece(blockIdx.x, n, piece); ++n) {
    const Place at = place_of(p, piece.tile, C::kRows);
    auto load = [&](int32_t step, bool values) {
      const Keys keys = keys_of<C::kKeys>(p, step);
      const simt::TensorMap* map = (values ? maps.v : maps.k) + keys.segment;
      const int number = count + step - piece.begin, stage = stage_of<D>(number);
      const uint32_t full = barriers.full(values, stage);
      const uint32_t to = smem + (values ? C::kV : C::kK) + stage * C::kKeyTile;
      SIMT_SKIP(1, simt::mbar_wait(barriers.empty(values, stage), parity_of<D>(number) ^ 1));
      SIMT_SKIP(2, simt::mbar_arrive_tx(full, C::kKeyTile));
      SIMT_UNROLL
      for (int i = 0; i < C::kPanels; ++i)
        simt::tma_load_4d(to + i * C::kKeyPanel, map, full, i * 64, at.h, keys.first, at.b);
    };
    SIMT_SKIP(3, simt::mbar_wait(barriers.query_empty(), n & 1 ^ 1));
    SIMT_SKIP(4, simt::mbar_arrive_tx(barriers.query_full(), C::kPanels * C::kQueryPanel));
    SIMT_UNROLL
    for (int i = 0; i < C::kPanels; ++i)
      simt::tma_load_4d(smem + i * C::kQueryPanel, &maps.q, barriers.query_full(), i * 64, at.h, at.row,
                        at.b);
    load(piece.begin, false);
    for (int32_t step = piece.begin; step < SIMT_OFF(5, piece.end); ++step) {
      if (step + 1 < SIMT_OFF(6, piece.end)) load(step + 1, false);
      load(step, true);
    }
    count += piece.end - piece.begin;
  }
}

// A warpgroup's rows of the first query panel, turned, for the products with sink and memory.
template <class T, int D>
SIMT_DEV void turn_query(const StreamAttentionParams& p, int b, int group) {
  using C = HopperTile<D>;
  unsigned char* smem = simt::dyn_smem();
  const int chunk = threadIdx.x % 8;
  SIMT_UNROLL
  for (int i = 0; i < 64; i += 16) {
    const int row = group * 64 + i + threadIdx.x % 128 / 8;
    const int at = row * 128 + ((chunk ^ (row & 7)) << 4);
    simt::store16(smem + C::kTurned + at, turn_chunk<T, D>(p, b, chunk, simt::load16(smem + at)));
  }
  SIMT_SKIP(7, simt::fence_proxy_async());
  SIMT_SKIP(8, simt::bar_sync(3 + group, 128));
}

// A warpgroup: 64 rows of every piece of this block.
template <class T, int D>
SIMT_DEV void consume(const StreamAttentionParams& p, uint32_t smem) {
  using C = HopperTile<D>;
  constexpr int kTiles = C::kKeys / 8;
  const HopperBarriers<D> barriers = {smem + C::kBarriers};
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x & 31;  // seen to be uniform
  float o[D / 2], s[C::kKeys / 2];
  uint32_t w[C::kKeys / 16][4];
  float m[2], sum[2];
  int count = 0;

  auto release = [&](uint32_t barrier) {
    if (lane == 0) SIMT_SKIP(9, simt::mbar_arrive(barrier));
  };
  auto start_scores = [&](int32_t step) {
    const uint32_t k = smem + C::kK + stage_of<D>(count) * C::kKeyTile;
    const uint32_t first = smem + (step < SIMT_OFF(10, p.turned_steps) ? C::kTurned : 0) + group * 64 * 128;
    SIMT_SKIP(11, simt::mbar_wait(barriers.full(false, stage_of<D>(count)), parity_of<D>(count)));
    SIMT_SKIP(12, simt::wgmma_fence());
    SIMT_UNROLL
    for (int kk = 0; kk < D / 16; ++kk) {
      const uint32_t q = kk < 4 ? first : smem + C::kQueryPanel * (kk / 4) + group * 64 * 128;
      simt::wgmma_ss<T, C::kKeys, 0, 0>(
          s, simt::smem_desc<128>(q + kk % 4 * 32, 0, 1024),
          simt::smem_desc<128>(k + kk / 4 * C::kKeyPanel + kk % 4 * 32, 0, 1024), kk != 0);
    }
    SIMT_SKIP(13, simt::wgmma_commit());
  };
  // Values of the step before.
  auto start_values = [&](int number) {
    const uint32_t v = smem + C::kV + stage_of<D>(number) * C::kKeyTile;
    SIMT_SKIP(14, simt::mbar_wait(barriers.full(true, stage_of<D>(number)), parity_of<D>(number)));
    SIMT_SKIP(15, simt::wgmma_fence());
    SIMT_UNROLL
    for (int kk = 0; kk < C::kKeys / 16; ++kk)
      simt::wgmma_rs<T, D, 1>(o, w[kk], simt::smem_desc<128>(v + kk * 2048, C::kKeyPanel, 1024), 1);
    SIMT_SKIP(16, simt::wgmma_commit());
  };
  auto mask = [&](int32_t step) {
    const Keys keys = keys_of<C::kKeys>(p, step);
    const int32_t left = p.segment[keys.segment].tokens - keys.first;
    if (left < C::kKeys) mask_keys<kTiles>(s, left);
  };
  auto pack = [&] {
    SIMT_UNROLL
    for (int kk = 0; kk < C::kKeys / 16; ++kk) {
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) w[kk][i] = simt::Numeric<T>::pack(s[8 * kk + 2 * i], s[8 * kk + 2 * i + 1]);
    }
  };

  // The groups take turns at the tensor cores: barrier 1 is the first one's turn, 2 the second's.
  if (group == 1) SIMT_SKIP(17, simt::bar_arrive(1, 256));
  Piece piece;
  for (int32_t n = 0; p.schedule.piece(blockIdx.x, n, piece); ++n) {
    SIMT_SKIP(18, simt::mbar_wait(barriers.query_full(), n & 1));
    const bool turned = piece.begin < p.turned_steps;  // no mutant: a turned query is used by step alone
    if (turned) turn_query<T, D>(p, place_of(p, piece.tile, C::kRows).b, group);
    SIMT_UNROLL
    for (int i = 0; i < D / 2; ++i) o[i] = 0;
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      m[h] = -INFINITY;
      sum[h] = 0;
    }
    start_scores(piece.begin);
    SIMT_SKIP(19, simt::wgmma_wait<0>());
    simt::wgmma_pin(s);
    release(barriers.empty(false, stage_of<D>(count)));
    mask(piece.begin);
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) to_weights<kTiles>(s, h, p.scale_log2, m[h], sum[h]);
    pack();
    for (int32_t step = piece.begin + 1; step < SIMT_OFF(20, piece.end); ++step) {
      const int before = count++;
      simt::bar_sync(1 + group, 256);  // no mutant: the order is for speed alone
      start_scores(step);
      start_values(before);
      SIMT_SKIP(21, simt::bar_arrive(2 - group, 256));
      SIMT_SKIP(22, simt::wgmma_wait<1>());
      simt::wgmma_pin(s);
      release(barriers.empty(false, stage_of<D>(count)));
      mask(step);
      float shrink[2];
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) shrink[h] = to_weights<kTiles>(s, h, p.scale_log2, m[h], sum[h]);
      // Without this store, which needs all weights, the compiler moves their computation below the wait.
      reinterpret_cast<float*>(simt::dyn_smem() + C::kHeld)[threadIdx.x] = sum[0] + sum[1];
      SIMT_SKIP(23, simt::wgmma_wait<0>());
      simt::wgmma_pin(o);
      release(barriers.empty(true, stage_of<D>(before)));
      SIMT_UNROLL
      for (int i = 0; i < D / 2; ++i) o[i] *= shrink[i / 2 % 2];
      pack();
    }
    release(barriers.query_empty());
    start_values(count);
    SIMT_SKIP(24, simt::wgmma_wait<0>());
    simt::wgmma_pin(o);
    release(barriers.empty(true, stage_of<D>(count)));
    ++count;
    const Place at = place_of(p, piece.tile, C::kRows);
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h)
      write_row<T, D>(p, at, piece, C::kRows, threadIdx.x / 32 * 16 + (lane >> 2) + 8 * h, m[h], sum[h],
                      [&](int i, int e) { return o[4 * i + 2 * h + e]; });
  }
}

template <class T, int D>
SIMT_GLOBAL void SIMT_BOUNDS(HopperTile<D>::kThreads, 1)
    stream_attention_sm90_fwd_kernel(const StreamAttentionParams p, const SIMT_GRIDCONST HopperMaps maps) {
  using C = HopperTile<D>;
  const uint32_t smem = simt::smem_addr(simt::dyn_smem());
  if (threadIdx.x == 0) {
    const HopperBarriers<D> barriers = {smem + C::kBarriers};
    constexpr int kWarps = 4 * C::kConsumers;
    simt::mbar_init(barriers.query_full(), 1);
    simt::mbar_init(barriers.query_empty(), kWarps);
    for (int i = 0; i < 2 * C::kStages; ++i) {
      simt::mbar_init(barriers.full(i / C::kStages, i % C::kStages), 1);
      simt::mbar_init(barriers.empty(i / C::kStages, i % C::kStages), kWarps);
    }
    SIMT_SKIP(25, simt::mbar_fence_init());
  }
  SIMT_SKIP(26, __syncthreads());
  if (threadIdx.x >= 128 * C::kConsumers) {
    simt::registers_lower<40>();
    if (threadIdx.x == 128 * C::kConsumers) produce<D>(p, maps, smem);
  } else {
    simt::registers_raise<232>();
    consume<T, D>(p, smem);
  }
}

}  // namespace echo::attention
