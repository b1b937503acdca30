// Flash attention on one thread, written once for every instruction set. Each set's file includes this with
// its own compiler flags, so nothing here may be shared between files: internal linkage, no templates of the
// standard library.
//
// A task walks over tiles of keys. It packs a tile's K and V once, then passes over its rows in blocks of
// kRows, whose scores stay in registers from the product to the softmax.
#pragma once
#include "attention/cpu/task.h"
#include "common/cpu/scalar.h"

namespace echo {
namespace {
// How far a score may pass its row's reference, in powers of two, before the reference rises and the row is
// scaled down. Weights keep their relative precision at any size, so this only has to keep sums far from
// overflow.
constexpr float kSlack = 8.0f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Hands out pieces of one allocation, each on a cache line of its own.
struct Carver {
  char* memory;
  int64_t used = 0;

  template <class Element>
  void operator()(Element*& piece, int64_t count) {
    piece = reinterpret_cast<Element*>(memory + used);
    used += parts(count * int64_t(sizeof(Element)), 64) * 64;
  }
};

// A: instruction set and type of operands; T: type of the tensors.
template <class A, class T>
struct Flash {
  using Vec = typename A::Vec;
  using Operand = typename A::Operand;
  static constexpr int kRows = A::kRows, kLanes = A::kLanes, kPair = A::kPair, kColumns = A::kColumns;
  static constexpr int kPanel = kColumns * kLanes;  // keys whose scores fit into the registers
  static constexpr int kTile = A::kTile;            // keys packed at a time, at most

  const StreamAttentionCpuParams& p;
  const AttentionTask& task;
  int64_t rows, blocks, d, steps;
  int64_t tile;         // keys packed at a time: few enough for the first-level cache
  float unit;           // score -> power of two
  Operand *q, *turned;  // [blocks][steps][kRows][kPair]
  float* out;           // [blocks * kRows][d], not yet divided by the row's sum
  float* sums;          // [blocks * kRows][kLanes] of the weights as they are multiplied with values
  float* exact_sums;    // likewise of the weights before they were rounded: only the LSE needs them
  float* tops;          // [blocks * kRows] minus the row's reference, in powers of two
  float* limits;        // [blocks * kRows] the score above which the reference must rise
  Operand* k;           // panels of [steps][kPanel or the last one's width][kPair]
  Operand* v;           // [tile / kPair][d][kPair]
  Operand* weights;     // [kRows][kTile]
  float* scores;        // [kRows][kPanel]
  float* counts;  // [kLanes] how often the keys of the panel's last column weigh, read where one counts more

  Flash(const StreamAttentionCpuParams& params, const AttentionTask& job) : p(params), task(job) {
    rows = job.end - job.begin;
    blocks = parts(rows, kRows);
    d = p.head_dim;
    steps = d / kPair;
    tile = d <= 64 ? kTile : kPanel;
    unit = p.scale * kLog2E;
  }

  // Divides `memory` up and returns the bytes of it.
  int64_t carve(char* memory) {
    Carver take{memory};
    const int64_t padded = blocks * kRows;
    take(k, tile * d);
    take(v, tile * d);
    take(weights, kRows * kTile);
    take(scores, kRows * kPanel);
    take(counts, kLanes);
    take(q, padded * d);
    take(turned, p.shift ? padded * d : 0);
    take(out, padded * d);
    take(sums, padded * kLanes);
    take(exact_sums, sums_exactly() ? padded * kLanes : 0);
    take(tops, padded);
    take(limits, padded);
    return take.used;
  }

  // The task's head of `x`.
  T* rows_of(const HeadRows& x) const {
    return static_cast<T*>(x.ptr) + task.batch * x.batch + task.head * x.head;
  }

  bool sums_exactly() const { return kPair > 1 && p.lse; }

  void run() {
    pack_queries();
    const int64_t padded = blocks * kRows;
    memset(out, 0, size_t(padded * d) * sizeof(float));
    memset(sums, 0, size_t(padded * kLanes) * sizeof(float));
    if (sums_exactly()) memset(exact_sums, 0, size_t(padded * kLanes) * sizeof(float));
    for (int64_t row = 0; row < padded; ++row) {
      tops[row] = INFINITY;
      limits[row] = -INFINITY;
    }
    const AttentionTier tiers[] = {p.sink, p.memory, p.ring};
    if (p.shift) {
      attend(turned, tiers, 2, 1);
      attend(q, tiers + 2, 1, p.last_count);
    } else {
      attend(q, tiers, 3, p.last_count);
    }
    finish();
  }

  // Query rows as [blocks][steps][kRows][kPair], and once more with their temporal pairs turned.
  void pack_queries() {
    const T* base = rows_of(p.q);
    const float* shift = p.shift ? p.shift + task.batch * p.shift_batch : nullptr;
    for (int64_t row = 0; row < blocks * kRows; ++row) {
      Operand* to = q + (row / kRows * steps * kRows + row % kRows) * kPair;
      alignas(64) Operand line[kLanes * kPair];
      for (int64_t step = 0; step < steps; step += kLanes) {
        const int64_t count = smaller(kLanes, steps - step);
        Vec x = A::zero();
        if (row < rows) x = A::load_row(base + (task.begin + row) * p.q.token + step * kPair, count);
        A::store_operands(line, x);
        for (int64_t i = 0; i < count; ++i)
          memcpy(to + (step + i) * kRows * kPair, line + i * kPair, kPair * sizeof(Operand));
      }
    }
    if (!shift) return;
    memcpy(turned, q, size_t(blocks * kRows * d) * sizeof(Operand));
    for (int64_t row = 0; row < rows; ++row) {
      const T* x = base + (task.begin + row) * p.q.token;
      Operand* to = turned + (row / kRows * steps * kRows + row % kRows) * kPair;
      const auto place = [&](int64_t i) { return to + i / kPair * (kRows * kPair) + i % kPair; };
      for (int64_t i = 0; i < p.shift_pairs; ++i) {
        const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
        put(place(2 * i), a * shift[2 * i] - b * shift[2 * i + 1]);
        put(place(2 * i + 1), a * shift[2 * i + 1] + b * shift[2 * i]);
      }
    }
  }

  // All keys of `tiers`, as one sequence whose last key counts `last_count` times, for the queries `x`.
  void attend(const Operand* x, const AttentionTier* tiers, int count, int64_t last_count) {
    const T *keys[kTile], *values[kTile];
    int64_t held = 0;
    for (int i = 0; i < count; ++i) {
      const AttentionTier& tier = tiers[i];
      const T *key = rows_of(tier.k), *value = rows_of(tier.v);
      for (int64_t token = 0; token < tier.tokens; ++token) {
        if (held == tile) {
          pass(x, keys, values, held, 1);
          held = 0;
        }
        keys[held] = key + token * tier.k.token;
        values[held] = value + token * tier.v.token;
        if (token + tile < tier.tokens) {
          prefetch(keys[held] + tile * tier.k.token);
          prefetch(values[held] + tile * tier.v.token);
        }
        ++held;
      }
    }
    if (held) pass(x, keys, values, held, last_count);
  }

  // Fetches a row that the next tile will pack: rows are far apart, so the CPU doesn't foresee them.
  void prefetch(const T* row) const {
    for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
  }

  // One tile, for every row of the task.
  void pass(const Operand* x, const T* const* keys, const T* const* values, int64_t held,
            int64_t last_count) {
    for (int64_t first = 0; first < held; first += kPanel) {
      const int64_t n = smaller(held - first, kPanel);
      pack_panel(keys + first, n, parts(n, kLanes), k + first * d);
    }
    for (int64_t i = 0; i < held; i += kPair) {
      A::pack_values(v + i * d, values[i], i + 1 < held ? values[i + 1] : nullptr, d);
    }
    for (int i = 0; i < kLanes; ++i) counts[i] = (held - 1) % kLanes == i ? float(last_count) : 1.0f;
    for (int64_t block = 0; block < blocks; ++block) {
      const Operand* block_q = x + block * kRows * d;
      int64_t weighed = 0;
      for (int64_t first = 0; first < held; first += kPanel) {
        const int64_t n = smaller(held - first, kPanel);
        weighed = score_panel(block, block_q, first, n, first + n == held && last_count > 1, weighed);
      }
      weigh(block, weighed, held);
    }
  }

  // Transposes `n` keys into [steps][width * kLanes][kPair].
  void pack_panel(const T* const* keys, int64_t n, int64_t width, Operand* to) {
    for (int64_t group = 0; group < width; ++group) {
      for (int64_t step = 0; step < steps; step += kLanes) {
        const int64_t count = smaller(kLanes, steps - step);
        Vec square[kLanes];
        ECHO_UNROLL for (int i = 0; i < kLanes; ++i) {
          const int64_t key = group * kLanes + i;
          square[i] = key < n ? A::load_row(keys[key] + step * kPair, count) : A::zero();
        }
        A::transpose(square);
        for (int64_t i = 0; i < count; ++i) {
          A::store_operands(to + ((step + i) * width + group) * kLanes * kPair, square[i]);
        }
      }
    }
  }

  // Scores and weights of `n` keys from `first` on, the last column's by `counts` where some count more than
  // once. Returns the first key whose values are still to be added.
  int64_t score_panel(int64_t block, const Operand* x, int64_t first, int64_t n, bool counted,
                      int64_t weighed) {
    if (n == kPanel && !counted) return score<kColumns, false>(block, x, first, n, weighed);
    const int64_t columns = parts(n, kLanes);
    if (columns == 1) return score<1, true>(block, x, first, n, weighed);
    if constexpr (kColumns > 2) {
      if (columns == 2) return score<2, true>(block, x, first, n, weighed);
      if (columns == 3) return score<3, true>(block, x, first, n, weighed);
    }
    return score<kColumns, true>(block, x, first, n, weighed);
  }

  template <int N, bool kPartial>
  __attribute__((noinline)) int64_t score(int64_t block, const Operand* x, int64_t first, int64_t n,
                                          int64_t weighed) {
    const Operand* key = k + first * d;
    Vec s[kRows][N];
    ECHO_UNROLL for (int r = 0; r < kRows; ++r) {
      ECHO_UNROLL for (int j = 0; j < N; ++j) s[r][j] = A::zero();
    }
    for (int64_t step = 0; step < steps; ++step) {
      Vec b[N];
      ECHO_UNROLL for (int j = 0; j < N; ++j) b[j] = A::load_operands(key + j * kLanes * kPair);
      ECHO_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vec a = A::broadcast(x + r * kPair);
        ECHO_UNROLL for (int j = 0; j < N; ++j) s[r][j] = A::dot(a, b[j], s[r][j]);
      }
      key += N * kLanes * kPair;
      x += kRows * kPair;
    }
    const Vec count = A::load(counts);  // 1 but in the sequence's last panel
    const typename A::Mask valid = A::first_lanes(n - (N - 1) * kLanes);
    float* row_tops = tops + block * kRows;
    float* row_limits = limits + block * kRows;
    bool over = false;
    ECHO_UNROLL for (int r = 0; r < kRows; ++r) {
      Vec top = kPartial ? A::select(valid, s[r][N - 1], A::splat(-INFINITY)) : s[r][N - 1];
      ECHO_UNROLL for (int j = 0; j + 1 < N; ++j) top = A::max(top, s[r][j]);
      over |= A::any_above(top, A::splat(row_limits[r]));
    }
    if (over) {
      ECHO_UNROLL for (int r = 0; r < kRows; ++r) {
        ECHO_UNROLL for (int j = 0; j < N; ++j) A::store(scores + r * kPanel + j * kLanes, s[r][j]);
      }
      weigh(block, weighed, first);
      raise(block, n);
      weighed = first;
      ECHO_UNROLL for (int r = 0; r < kRows; ++r) {
        ECHO_UNROLL for (int j = 0; j < N; ++j) s[r][j] = A::load(scores + r * kPanel + j * kLanes);
      }
    }
    const Vec factor = A::splat(unit);
    ECHO_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec top = A::splat(row_tops[r]);
      ECHO_UNROLL for (int j = 0; j < N; ++j) s[r][j] = A::exp2(A::fma(s[r][j], factor, top));
      if (kPartial) s[r][N - 1] = A::select(valid, A::multiply(s[r][N - 1], count), A::zero());
      if (sums_exactly()) {
        float* exact = exact_sums + (block * kRows + r) * kLanes;
        Vec total = A::load(exact);
        ECHO_UNROLL for (int j = 0; j < N; ++j) total = A::add(total, s[r][j]);
        A::store(exact, total);
      }
      float* sum = sums + (block * kRows + r) * kLanes;
      A::store(sum, A::template store_weights<N>(weights + r * kTile + first, s[r], A::load(sum)));
    }
    return weighed;
  }

  // Moves the references of those rows up whose `n` scores in `scores` pass their limit.
  __attribute__((noinline)) void raise(int64_t block, int64_t n) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = block * kRows + r;
      float* own = scores + r * kPanel;
      for (int64_t i = n; i < kPanel; ++i) own[i] = -INFINITY;
      Vec tops_by_lane = A::load(own);
      ECHO_UNROLL for (int j = 1; j < kColumns; ++j) tops_by_lane =
          A::max(tops_by_lane, A::load(own + j * kLanes));
      const float top = A::highest(tops_by_lane);
      if (!(top > limits[row])) continue;
      const float down = exp2f(-top * unit - tops[row]);
      tops[row] = -top * unit;
      limits[row] = top + kSlack / unit;
      scale_down(out + row * d, d, down);
      scale_down(sums + row * kLanes, kLanes, down);
      if (sums_exactly()) scale_down(exact_sums + row * kLanes, kLanes, down);
    }
  }

  static ECHO_INLINE void scale_down(float* x, int64_t n, float by) {
    for (int64_t i = 0; i < n; i += kLanes) A::store(x + i, A::multiply(A::load(x + i), A::splat(by)));
  }

  // Adds the values of keys first .. last - 1 of the tile, by their weights.
  void weigh(int64_t block, int64_t first, int64_t last) {
    if (first == last) return;
    int64_t column = 0;
    for (; column + kPanel <= d; column += kPanel) add_values<kColumns>(block, first, last, column);
    for (; column + 2 * kLanes <= d; column += 2 * kLanes) add_values<2>(block, first, last, column);
    for (; column < d; column += kLanes) add_values<1>(block, first, last, column);
  }

  template <int N>
  __attribute__((noinline)) void add_values(int64_t block, int64_t first, int64_t last, int64_t column) {
    float* to = out + block * kRows * d + column;
    const Operand* value = v + first * d + column * kPair;
    const Operand* weight = weights + first;
    Vec o[kRows][N];
    ECHO_UNROLL for (int r = 0; r < kRows; ++r) {
      ECHO_UNROLL for (int j = 0; j < N; ++j) o[r][j] = A::load(to + r * d + j * kLanes);
    }
    for (int64_t i = first; i < last; i += kPair) {
      Vec b[N];
      ECHO_UNROLL for (int j = 0; j < N; ++j) b[j] = A::load_operands(value + j * kLanes * kPair);
      ECHO_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vec a = A::broadcast(weight + r * kTile);
        ECHO_UNROLL for (int j = 0; j < N; ++j) o[r][j] = A::dot(a, b[j], o[r][j]);
      }
      value += d * kPair;
      weight += kPair;
    }
    ECHO_UNROLL for (int r = 0; r < kRows; ++r) {
      ECHO_UNROLL for (int j = 0; j < N; ++j) A::store(to + r * d + j * kLanes, o[r][j]);
    }
  }

  void finish() {
    T* base = rows_of(p.out);
    float* lse = p.lse ? p.lse + (task.batch * p.heads + task.head) * p.tokens + task.begin : nullptr;
    for (int64_t row = 0; row < rows; ++row) {
      const float sum = A::total(A::load(sums + row * kLanes));
      T* to = base + (task.begin + row) * p.out.token;
      for (int64_t i = 0; i < d; i += kLanes)
        A::store_wide(to + i, A::quotient(A::load(out + row * d + i), A::splat(sum)));
      if (!lse) continue;
      const float exact = sums_exactly() ? A::total(A::load(exact_sums + row * kLanes)) : sum;
      lse[row] = (log2f(exact) - tops[row]) * kLn2;
    }
  }
};

template <class A, class T>
int64_t flash(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  Flash<A, T> work(params, task);
  const int64_t bytes = work.carve(scratch);
  if (scratch) work.run();
  return bytes;
}
}  // namespace
}  // namespace echo
