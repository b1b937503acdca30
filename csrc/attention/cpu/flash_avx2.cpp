// AVX2 with FMA: float32 operands; bfloat16 tensors are widened as they are packed.
#include "attention/cpu/flash.h"
#include "common/cpu/avx2.h"

namespace echo {
namespace {
struct Float : Avx2 {
  using Operand = float;
  static constexpr int kRows = 6, kColumns = 2;  // 12 sums, 2 columns and a broadcast in 16 registers
  static constexpr int kPair = 1, kTile = 64;

  static ECHO_INLINE Vec load_operands(const float* x) { return _mm256_load_ps(x); }
  static ECHO_INLINE void store_operands(float* to, Vec x) { _mm256_store_ps(to, x); }
  static ECHO_INLINE Vec broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  static ECHO_INLINE Vec dot(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  template <class T>
  static ECHO_INLINE Vec load_row(const T* x, int64_t) {  // d is a multiple of 16, so rows hold whole vectors
    return load_wide(x);
  }

  template <class T>
  static ECHO_INLINE void pack_values(float* to, const T* x, const T*, int64_t d) {
    for (int64_t i = 0; i < d; i += kLanes) store(to + i, load_wide(x + i));
  }

  static ECHO_INLINE Vec exp2(Vec x) {     // relative error 7.5e-8 before rounding
    x = _mm256_max_ps(splat(-126.0f), x);  // NaN stays NaN; smaller powers are denormal
    const Vec whole = _mm256_floor_ps(x), f = _mm256_sub_ps(x, whole);
    Vec y = splat(0.0018775767f);
    y = fma(y, f, splat(0.0089893397f));
    y = fma(y, f, splat(0.055826318f));
    y = fma(y, f, splat(0.24015361f));
    y = fma(y, f, splat(0.69315308f));
    y = fma(y, f, splat(0.99999994f));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
  }

  template <int N>
  static ECHO_INLINE Vec store_weights(float* to, const Vec (&x)[N], Vec sum) {
    ECHO_UNROLL for (int j = 0; j < N; ++j) {
      store(to + j * kLanes, x[j]);
      sum = _mm256_add_ps(sum, x[j]);
    }
    return sum;
  }
};
}  // namespace

int64_t flash_avx2_f32(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  return flash<Float, float>(params, task, scratch);
}

int64_t flash_avx2_bf16(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  return flash<Float, uint16_t>(params, task, scratch);
}
}  // namespace echo
