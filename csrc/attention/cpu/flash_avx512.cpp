// AVX-512 without bfloat16 products: float32 operands; bfloat16 tensors are widened as they are packed.
#include "attention/cpu/flash.h"
#include "common/cpu/avx512.h"

namespace echo {
namespace {
struct Float : Avx512 {
  using Operand = float;
  static constexpr int kRows = 6, kColumns = 4;  // 24 sums, 4 columns and a broadcast in 32 registers
  static constexpr int kPair = 1, kTile = 64;

  static ECHO_INLINE Vec load_operands(const float* x) { return _mm512_load_ps(x); }
  static ECHO_INLINE void store_operands(float* to, Vec x) { _mm512_store_ps(to, x); }
  static ECHO_INLINE Vec broadcast(const float* x) { return _mm512_set1_ps(*x); }
  static ECHO_INLINE Vec dot(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  template <class T>
  static ECHO_INLINE Vec load_row(const T* x, int64_t) {  // d is a multiple of 16, so rows hold whole vectors
    return load_wide(x);
  }

  template <class T>
  static ECHO_INLINE void pack_values(float* to, const T* x, const T*, int64_t d) {
    for (int64_t i = 0; i < d; i += kLanes) store(to + i, load_wide(x + i));
  }

  template <int N>
  static ECHO_INLINE Vec store_weights(float* to, const Vec (&x)[N], Vec sum) {
    ECHO_UNROLL for (int j = 0; j < N; ++j) {
      store(to + j * kLanes, x[j]);
      sum = add(sum, x[j]);
    }
    return sum;
  }
};
}  // namespace

int64_t flash_avx512_f32(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  return flash<Float, float>(params, task, scratch);
}

int64_t flash_avx512_bf16(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  return flash<Float, uint16_t>(params, task, scratch);
}
}  // namespace echo
