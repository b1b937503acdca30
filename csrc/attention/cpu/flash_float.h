// Attention with float32 operands in any instruction set; bfloat16 tensors are widened as they are packed.
#pragma once
#include "attention/cpu/flash.h"

namespace echo {
namespace {
// A block of kRows_ x kColumns_ sums, its columns and one broadcast fit the registers of the instruction set
// `Set`.
template <class Set, int kRows_, int kColumns_>
struct Float : Set {
  using Vec = typename Set::Vec;
  using Operand = float;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPair = 1, kTile = 64;

  static ECHO_INLINE Vec load_operands(const float* x) { return Set::load(x); }
  static ECHO_INLINE void store_operands(float* to, Vec x) { Set::store(to, x); }
  static ECHO_INLINE Vec broadcast(const float* x) { return Set::splat(*x); }
  static ECHO_INLINE Vec dot(Vec a, Vec b, Vec c) { return Set::fma(a, b, c); }
  template <class T>
  static ECHO_INLINE Vec load_row(const T* x, int64_t) {  // d is a multiple of 16, so rows hold whole vectors
    return Set::load_wide(x);
  }

  template <class T>
  static ECHO_INLINE void pack_values(float* to, const T* x, const T*, int64_t d) {
    for (int64_t i = 0; i < d; i += Set::kLanes) Set::store(to + i, Set::load_wide(x + i));
  }

  template <int N>
  static ECHO_INLINE Vec store_weights(float* to, const Vec (&x)[N], Vec sum) {
    ECHO_UNROLL for (int j = 0; j < N; ++j) {
      Set::store(to + j * Set::kLanes, x[j]);
      sum = Set::add(sum, x[j]);
    }
    return sum;
  }
};
}  // namespace
}  // namespace echo
