// One token after the other: square sum, norm, rotation, write. Included by each instruction set's file; see
// common/cpu/scalar.h for what that forbids.
#pragma once
#include "common/cpu/scalar.h"
#include "ring/cpu/task.h"

namespace echo {
namespace {
// A: instruction set; T: type of the tensors.
template <class A, class T>
struct Append {
  using Vec = typename A::Vec;
  static constexpr int kLanes = A::kLanes;

  const RingAppendCpuParams& p;

  T* at(const HeadRows& x, int64_t batch, int64_t token) const {
    return x.ptr ? static_cast<T*>(x.ptr) + batch * x.batch + token * x.token : nullptr;
  }

  // 1 / sqrt(mean of squares + eps) over all heads.
  float inverse(const T* x, int64_t head_step) const {
    Vec a = A::zero(), b = A::zero();
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t i = 0; i < p.head_dim; i += 2 * kLanes) {
        const Vec y = A::load_wide(x + h * head_step + i);
        a = A::fma(y, y, a);
        if (i + kLanes == p.head_dim) break;
        const Vec z = A::load_wide(x + h * head_step + i + kLanes);
        b = A::fma(z, z, b);
      }
    }
    return 1.0f / sqrtf((A::total(a) + A::total(b)) / float(p.heads * p.head_dim) + p.eps);
  }

  // Normalises `x` if there are weights, keeps it in `raw` if there is one, and writes it rotated by `table`.
  void row(const T* x, int64_t step, const T* weight, const float* table, T* raw, int64_t raw_step, T* to,
           int64_t to_step) const {
    const Vec factor = A::splat(weight ? inverse(x, step) : 1.0f);
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t i = 0; i < p.head_dim; i += kLanes) {
        Vec y = A::load_wide(x + h * step + i);
        if (weight) y = A::multiply(A::multiply(y, factor), A::load_wide(weight + h * p.head_dim + i));
        if (raw) A::store_wide(raw + h * raw_step + i, y);
        A::store_wide(to + h * to_step + i, A::rotate(y, A::load_wide(table + i)));
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t frame_floats = 2 * p.frame_pairs, grid_floats = p.head_dim - frame_floats;
    float table[kCpuMaxHeadDim], key_table[kCpuMaxHeadDim];
    for (int64_t number = begin; number < end; ++number) {
      const int64_t batch = number / (p.frames * p.frame_tokens),
                    token = number % (p.frames * p.frame_tokens);
      const int64_t frame = token / p.frame_tokens, place = token % p.frame_tokens;
      const int64_t into = p.slots[batch * p.slots_batch + frame] * p.frame_tokens + place;
      const auto fill = [&](float* whole, const float* frames, int64_t step) {
        memcpy(whole, frames + batch * step + frame * frame_floats, size_t(frame_floats) * sizeof(float));
        memcpy(whole + frame_floats, p.grid_table + place * grid_floats, size_t(grid_floats) * sizeof(float));
      };
      fill(table, p.frame_table, p.table_batch);
      fill(key_table, p.key_frame_table, p.key_table_batch);
      row(at(p.q, batch, token), p.q.head, static_cast<const T*>(p.q_weight), table, nullptr, 0,
          at(p.out, batch, token), p.out.head);
      row(at(p.k, batch, token), p.k.head, static_cast<const T*>(p.k_weight), key_table,
          at(p.ring_raw, batch, into), p.ring_raw.head, at(p.ring_k, batch, into), p.ring_k.head);
      const T* value = at(p.v, batch, token);
      T* kept = at(p.ring_v, batch, into);
      for (int64_t h = 0; h < p.heads; ++h) {
        memcpy(kept + h * p.ring_v.head, value + h * p.v.head, size_t(p.head_dim) * sizeof(T));
      }
    }
  }
};
}  // namespace
}  // namespace echo
