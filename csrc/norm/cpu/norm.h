// One token after the other. Included by each instruction set's file; see common/cpu/scalar.h for what that
// forbids.
#pragma once
#include "common/cpu/scalar.h"
#include "norm/cpu/task.h"

namespace echo {
namespace {
// A: instruction set; T: type of the tensors.
template <class A, class T>
struct Norm {
  using Vec = typename A::Vec;
  static constexpr int kLanes = A::kLanes;

  const NormCpuParams& p;

  // The vector of one frame, or null.
  const T* of_frame(const void* vectors, int64_t batch_step, int64_t frame_step, int64_t batch,
                    int64_t frame) const {
    return vectors ? static_cast<const T*>(vectors) + batch * batch_step + frame * frame_step : nullptr;
  }

  void run(int64_t begin, int64_t end) const {
    alignas(64) float row[kCpuMaxNormWidth];
    for (int64_t number = begin; number < end; ++number) {
      const int64_t batch = number / p.tokens, token = number % p.tokens,
                    frame = token / (p.tokens / p.frames);
      const T* x = static_cast<const T*>(p.x) + batch * p.x_batch + token * p.x_token;
      const T* y = p.y ? static_cast<const T*>(p.y) + batch * p.y_batch + token * p.y_token : nullptr;
      const T* gate = of_frame(p.gate, p.gate_batch, p.gate_frame, batch, frame);
      T* sum = p.sum ? static_cast<T*>(p.sum) + number * p.width : nullptr;
      Vec total = A::zero();
      for (int64_t i = 0; i < p.width; i += kLanes) {
        Vec s = A::load_wide(x + i);
        if (y && gate) s = A::fma(A::load_wide(gate + i), A::load_wide(y + i), s);
        if (y && !gate) s = A::add(s, A::load_wide(y + i));
        if (sum) A::store_wide(sum + i, s);
        A::store(row + i, s);
        total = A::add(total, s);
      }
      if (!p.out) continue;
      const Vec mean = A::splat(p.centred ? A::total(total) / float(p.width) : 0.0f);
      Vec squares = A::zero();
      for (int64_t i = 0; i < p.width; i += kLanes) {
        const Vec s = A::subtract(A::load(row + i), mean);
        squares = A::fma(s, s, squares);
      }
      const Vec factor = A::splat(1.0f / sqrtf(A::total(squares) / float(p.width) + p.eps));
      const T* scale = of_frame(p.scale, p.scale_batch, p.scale_frame, batch, frame);
      const T* shift = of_frame(p.shift, p.shift_batch, p.shift_frame, batch, frame);
      T* out = static_cast<T*>(p.out) + number * p.width;
      for (int64_t i = 0; i < p.width; i += kLanes) {
        Vec s = A::multiply(A::subtract(A::load(row + i), mean), factor);
        if (scale) s = A::multiply(s, A::load_wide(scale + i));
        if (shift) s = A::add(s, A::load_wide(shift + i));
        A::store_wide(out + i, s);
      }
    }
  }
};
}  // namespace
}  // namespace echo
