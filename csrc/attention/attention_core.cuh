// Attention of query tiles over up to three runs of keys, for sm_80 and later: mma.sync or FFMA, cp.async,
// online softmax. To build a kernel on it:
//
//   template <class T, int D>
//   SIMT_GLOBAL void SIMT_BOUNDS(128, Tile<T, D>::kBlocks) my_fwd_kernel(MyParams p) {
//     attend<T, D>(p, [&](int b, int row, int h, int chunk, bool turned) -> uint4 { .. });
//   }
//
// `p` is (derived from) AttentionParams with plan() called for Tile<T, D>::kRows, kKeys. The functor returns
// 16 bytes of the query as its keys must meet it: elements chunk * 16 / sizeof(T) and on of row `row` <
// p.queries; `turned` is true for the first p.turned segments. load_chunk() returns them unchanged. Launch
// with schedule.blocks blocks of 128 threads and Tile<T, D>::kSmemBytes, then launch_join<T, D>
// (attention_join.cuh).
//
// Layouts: q, k and v rows are 16-byte aligned. Shared memory holds the query tile and a ring of three tiles,
// keys and values in turn, rows of 16-byte chunks swizzled so that ldmatrix meets no bank conflict.
#pragma once
#include "attention/attention_tile.cuh"

namespace echo::attention {

template <class T, int D>
struct Tile {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kThreads = 128;
  // Tiles of 16 rows a warp: two halve the traffic of keys and values.
  static constexpr int kRowTiles = kHalf ? 2 : 1;
  static constexpr int kRows = 64 * kRowTiles;
  static constexpr int kKeys = kHalf ? 64 : 32;
  static constexpr int kRowBytes = D * sizeof(T);
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStages = 3;
  static constexpr int kSmemBytes = kRows * kRowBytes + kStages * kTileBytes;
  static constexpr int kBlocks = 2;  // a multiprocessor

  // Byte offset of a chunk of a row. Eight rows at one chunk fall into eight different 16-byte banks. The
  // pattern repeats every 8 rows, and offset(row, chunk ^ c) is offset(row, chunk) ^ (c << 4): no address
  // need be kept.
  SIMT_DEV static uint32_t offset(int row, int chunk) {
    constexpr int kRowsALine = kChunks < 8 ? 8 / kChunks : 1;
    constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7;
    return uint32_t(row * kRowBytes + ((chunk ^ (row / kRowsALine & kMask)) << 4));
  }
};

// 16 bytes of a query row, as they are.
template <class T>
SIMT_DEV uint4 load_chunk(const AttentionParams& p, int b, int row, int h, int chunk) {
  const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + row * p.q_stride[1] + h * p.q_stride[2];
  return simt::load16(q + chunk * simt::kPer16Bytes<T>);
}

// Starts copying a tile of keys or values; rows from `left` on become zero.
template <class T, int D>
SIMT_DEV void load_tile(uint32_t to, const T* from, int64_t stride, int32_t left) {
  using C = Tile<T, D>;
  constexpr int kRowsAPass = C::kThreads / C::kChunks;
  const int chunk = threadIdx.x % C::kChunks, first = threadIdx.x / C::kChunks;
  from += first * stride + chunk * simt::kPer16Bytes<T>;
  SIMT_UNROLL
  for (int r = 0; r < C::kKeys; r += kRowsAPass) {
    simt::cp_async16(to + C::offset(first + r, chunk), from, first + r < SIMT_OFF(1, left));
    from += kRowsAPass * stride;
  }
}

template <class T, int D>
SIMT_DEV void load_keys(const AttentionParams& p, int32_t b, int32_t h, int32_t step, bool values,
                        uint32_t to) {
  const Keys keys = keys_of<Tile<T, D>::kKeys>(p, step);
  const Segment& s = p.segment[keys.segment];
  const int64_t* stride = values ? s.v_stride : s.k_stride;
  const T* from = static_cast<const T*>(values ? s.v : s.k);
  from += b * stride[0] + keys.first * stride[1] + h * stride[2];
  load_tile<T, D>(to, from, stride[1], s.tokens - keys.first);
}

// Writes the query tile to shared memory; rows past the last query become zero.
template <class T, int D, class Query>
SIMT_DEV void load_query(const AttentionParams& p, const Place& at, const Query& query, bool turned) {
  using C = Tile<T, D>;
  unsigned char* smem = simt::dyn_smem();
  const int chunk = threadIdx.x % C::kChunks;
  for (int row = threadIdx.x / C::kChunks; row < C::kRows; row += C::kThreads / C::kChunks) {
    uint4 x = {0, 0, 0, 0};
    if (at.row + row < SIMT_OFF(2, p.queries)) x = query(at.b, at.row + row, at.h, chunk, turned);
    simt::store16(smem + C::offset(row, chunk), x);
  }
}

// The memory behind a shared address.
SIMT_DEV const unsigned char* shared_at(uint32_t address) {
  return simt::dyn_smem() + (address - simt::smem_addr(simt::dyn_smem()));
}

SIMT_DEV float add_dot(float sum, const float4& a, const float4& b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// S = Q K^T for the warp's rows. Fragments are those of mma.m16n8k16: element e of tile n is row lane / 4 + 8
// (e / 2), column 8 n + 2 (lane % 4) + e % 2.
template <class T, int D>
SIMT_DEV void scores(float (&s)[Tile<T, D>::kRowTiles][Tile<T, D>::kKeys / 8][4], uint32_t q, uint32_t k) {
  using C = Tile<T, D>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  SIMT_UNROLL
  for (int r = 0; r < C::kRowTiles; ++r) {
    SIMT_UNROLL
    for (int n = 0; n < C::kKeys / 8; ++n) s[r][n][0] = s[r][n][1] = s[r][n][2] = s[r][n][3] = 0;
  }
  if constexpr (C::kHalf) {
    q += C::offset(warp * 16 * C::kRowTiles + (lane & 15), lane >> 4);
    k += C::offset((lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
    SIMT_UNROLL
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a[C::kRowTiles][4];
      SIMT_UNROLL
      for (int r = 0; r < C::kRowTiles; ++r) simt::ldmatrix_x4(a[r], (q ^ (kk << 5)) + r * 16 * C::kRowBytes);
      SIMT_UNROLL
      for (int n = 0; n < C::kKeys / 16; ++n) {
        uint32_t b[4];
        simt::ldmatrix_x4(b, (k ^ (kk << 5)) + n * 16 * C::kRowBytes);
        SIMT_UNROLL
        for (int r = 0; r < C::kRowTiles; ++r) {
          simt::Numeric<T>::mma(s[r][2 * n], a[r], b[0], b[1]);
          simt::Numeric<T>::mma(s[r][2 * n + 1], a[r], b[2], b[3]);
        }
      }
    }
  } else {
    const unsigned char *queries = shared_at(q), *keys = shared_at(k);
    const int row = warp * 16 + (lane >> 2);
    for (int c = 0; c < C::kChunks; ++c) {
      const float4 a0 = *reinterpret_cast<const float4*>(queries + C::offset(row, c));
      const float4 a1 = *reinterpret_cast<const float4*>(queries + C::offset(row + 8, c));
      SIMT_UNROLL
      for (int n = 0; n < C::kKeys / 8; ++n) {
        SIMT_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int key = n * 8 + (lane & 3) * 2 + e;
          const float4 b = *reinterpret_cast<const float4*>(keys + C::offset(key, c));
          s[0][n][e] = add_dot(s[0][n][e], a0, b);
          s[0][n][e + 2] = add_dot(s[0][n][e + 2], a1, b);
        }
      }
    }
  }
}

// O += P V; P is what scores() left, turned into weights.
template <class T, int D>
SIMT_DEV void add_values(float (&o)[Tile<T, D>::kRowTiles][D / 8][4],
                         const float (&w)[Tile<T, D>::kRowTiles][Tile<T, D>::kKeys / 8][4], uint32_t v) {
  using C = Tile<T, D>;
  const int lane = threadIdx.x & 31;
  if constexpr (C::kHalf) {
    v += C::offset(lane & 15, lane >> 4);
    SIMT_UNROLL
    for (int kk = 0; kk < C::kKeys / 16; ++kk) {
      // The accumulators of two neighbouring tiles are the operand of the next product.
      uint32_t a[C::kRowTiles][4];
      SIMT_UNROLL
      for (int r = 0; r < C::kRowTiles; ++r) {
        SIMT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float* pair = &w[r][2 * kk + i / 2][i % 2 * 2];
          a[r][i] = simt::Numeric<T>::pack(pair[0], pair[1]);
        }
      }
      SIMT_UNROLL
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        simt::ldmatrix_x4_trans(b, (v ^ (n << 5)) + kk * 16 * C::kRowBytes);
        SIMT_UNROLL
        for (int r = 0; r < C::kRowTiles; ++r) {
          simt::Numeric<T>::mma(o[r][2 * n], a[r], b[0], b[1]);
          simt::Numeric<T>::mma(o[r][2 * n + 1], a[r], b[2], b[3]);
        }
      }
    }
  } else {
    const unsigned char* values = shared_at(v);
    SIMT_UNROLL
    for (int key = 0; key < C::kKeys; ++key) {
      const int owner = (lane & ~3) | (key % 8 / 2);  // the lane of this row that has the key's weight
      const float w0 = __shfl_sync(~0u, w[0][key / 8][key % 2], owner);
      const float w1 = __shfl_sync(~0u, w[0][key / 8][key % 2 + 2], owner);
      SIMT_UNROLL
      for (int n = 0; n < D / 8; n += 2) {
        const uint32_t at = C::offset(key, n * 2 + (lane & 3));
        const float4 x = *reinterpret_cast<const float4*>(values + at);
        SIMT_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float weight = h ? w1 : w0;
          o[0][n][2 * h] = fmaf(weight, x.x, o[0][n][2 * h]);
          o[0][n][2 * h + 1] = fmaf(weight, x.y, o[0][n][2 * h + 1]);
          o[0][n + 1][2 * h] = fmaf(weight, x.z, o[0][n + 1][2 * h]);
          o[0][n + 1][2 * h + 1] = fmaf(weight, x.w, o[0][n + 1][2 * h + 1]);
        }
      }
    }
  }
}

// The kernel: see the top of this file.
template <class T, int D, class Query>
SIMT_DEV void attend(const AttentionParams& p, const Query& query) {
  using C = Tile<T, D>;
  const uint32_t smem = simt::smem_addr(simt::dyn_smem()), ring = smem + C::kRows * C::kRowBytes;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int stage = 0;  // of the ring, where the next tile is
  // Registers are full in the loop over keys: what only its ends need is worked out again from n.
  for (int32_t n = 0;; ++n) {
    Piece piece;
    if (!p.schedule.piece(blockIdx.x, n, piece)) break;
    Place at = place_of(p, piece.tile, C::kRows);
    const int32_t first = piece.begin;
    const bool turned = first < p.turned_steps;  // no mutant: where they are equal the loop loads it again
    load_query<T, D>(p, at, query, turned);
    const int32_t b = at.b, h = at.h, end = piece.end;
    // Tiles are read two ahead; the stage a copy goes to was read by all before the barrier that precedes the
    // copy.
    auto start_copy = [&](int32_t step, bool values, int ahead) {
      int to = stage + ahead;
      to = to >= SIMT_OFF(3, C::kStages) ? to - C::kStages : to;
      if (step < SIMT_OFF(4, end)) load_keys<T, D>(p, b, h, step, values, ring + to * C::kTileBytes);
      SIMT_SKIP(5, simt::cp_async_commit());
    };
    auto next_tile = [&] {
      const uint32_t tile = ring + stage * C::kTileBytes;
      stage = stage + 1 == C::kStages ? 0 : stage + 1;
      return tile;
    };
    start_copy(first, false, 0);
    start_copy(first, true, 1);
    float o[C::kRowTiles][D / 8][4] = {}, m[C::kRowTiles][2], sum[C::kRowTiles][2] = {};
    SIMT_UNROLL
    for (int r = 0; r < C::kRowTiles; ++r) m[r][0] = m[r][1] = -INFINITY;

    for (int32_t step = first; step < SIMT_OFF(6, end); ++step) {
      // The products with the turned query ended before the last barrier.
      if (step == p.turned_steps) {
        p.schedule.piece(blockIdx.x, simt::opaque(n), piece);
        load_query<T, D>(p, place_of(p, piece.tile, C::kRows), query, false);
      }
      SIMT_SKIP(7, simt::cp_async_wait<1>());
      SIMT_SKIP(8, __syncthreads());
      start_copy(step + 1, false, 2);
      float s[C::kRowTiles][C::kKeys / 8][4];
      scores<T, D>(s, smem, next_tile());
      SIMT_SKIP(9, simt::cp_async_wait<1>());
      SIMT_SKIP(10, __syncthreads());
      start_copy(step + 1, true, 2);
      const Keys keys = keys_of<C::kKeys>(p, step);
      const int32_t left = p.segment[keys.segment].tokens - keys.first;
      if (left < C::kKeys) {
        SIMT_UNROLL
        for (int r = 0; r < C::kRowTiles; ++r) mask_keys<C::kKeys / 8>(s[r][0], left);
      }
      SIMT_UNROLL
      for (int r = 0; r < C::kRowTiles; ++r) {
        SIMT_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float shrink = to_weights<C::kKeys / 8>(s[r][0], h, p.scale_log2, m[r][h], sum[r][h]);
          SIMT_UNROLL
          for (int i = 0; i < D / 8; ++i) {
            o[r][i][2 * h] *= shrink;
            o[r][i][2 * h + 1] *= shrink;
          }
        }
      }
      add_values<T, D>(o, s, next_tile());
    }
    p.schedule.piece(blockIdx.x, simt::opaque(n), piece);
    at = place_of(p, piece.tile, C::kRows);
    SIMT_UNROLL
    for (int r = 0; r < C::kRowTiles; ++r) {
      SIMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = (warp * C::kRowTiles + r) * 16 + (lane >> 2) + 8 * h;
        write_row<T, D>(p, at, piece, C::kRows, row, m[r][h], sum[r][h],
                        [&](int i, int e) { return o[r][i][2 * h + e]; });
      }
    }
  }
  SIMT_SKIP(11, simt::cp_async_wait<0>());  // of groups without a copy
}

}  // namespace echo::attention
