// What every attention kernel is told: queries, up to three runs of keys read in place, where results go.
#pragma once
#include <cstdint>

#include "attention/schedule.h"

namespace echo::attention {

inline constexpr int kMaxSegments = 3;

// Keys and values of one run. Rows past `tokens` are never read: they may hold anything.
struct Segment {
  const void* k = nullptr;   // (B, T, H, d)
  const void* v = nullptr;   // (B, T, H, d)
  int64_t k_stride[3] = {};  // batch, token, head, in elements; the last dim is contiguous
  int64_t v_stride[3] = {};  // likewise
  int32_t tokens = 0;        // T, at least 1
};

struct AttentionParams {
  const void* q = nullptr;        // (B, Tq, H, d)
  int64_t q_stride[3] = {};       // batch, token, head
  Segment segment[kMaxSegments];  // those that meet the turned query first
  int32_t segments = 0;           // 1 .. kMaxSegments
  int32_t turned = 0;             // how many of them meet the turned query
  void* out = nullptr;            // (B, Tq, H, d), contiguous
  float* lse = nullptr;           // (B, H, Tq), contiguous, natural logarithm; may be null
  float* partial_out = nullptr;   // (slots, rows of a tile, d) workspace
  float* partial_lse = nullptr;   // (slots, rows of a tile), base 2
  int32_t batch = 0, queries = 0, heads = 0;
  float scale_log2 = 0;                 // score scale * log2(e), above 0
  int32_t rows = 0;                     // of a query tile
  int32_t step_end[kMaxSegments] = {};  // key steps up to and including each segment
  int32_t turned_steps = -1;            // of them with the turned query; -1 where that is none
  Schedule schedule;
};

// Fills in steps and schedule for kernels with tiles of `rows` queries and `keys` keys on `blocks` blocks.
inline void plan(AttentionParams& p, int32_t rows, int32_t keys, int32_t blocks) {
  int32_t steps = 0;
  for (int i = 0; i < kMaxSegments; ++i) {
    if (i < p.segments) steps += (p.segment[i].tokens + keys - 1) / keys;
    p.step_end[i] = steps;
    if (i + 1 == p.turned) p.turned_steps = steps;
  }
  p.rows = rows;
  p.schedule = make_schedule(p.batch * p.heads * ((p.queries + rows - 1) / rows), steps, blocks);
}

// Floats of workspace a planned `p` needs, and where they are.
inline int64_t workspace_floats(const AttentionParams& p, int32_t head_dim) {
  return int64_t(p.schedule.slots()) * p.rows * (head_dim + 1);
}
inline void set_workspace(AttentionParams& p, int32_t head_dim, float* workspace) {
  p.partial_out = workspace;
  p.partial_lse = workspace + int64_t(p.schedule.slots()) * p.rows * head_dim;
}

}  // namespace echo::attention
