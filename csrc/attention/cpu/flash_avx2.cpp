// AVX2 with FMA: float32 operands; bfloat16 tensors are widened as they are packed.
#include <immintrin.h>

#include "attention/cpu/flash.h"

namespace echo {
namespace {
struct Avx2 {
  using Vec = __m256;
  using Mask = __m256;
  using Operand = float;
  static constexpr int kLanes = 8, kRows = 6,
                       kColumns = 2;  // 12 sums, 2 columns and a broadcast in 16 registers
  static constexpr int kPair = 1, kTile = 64;

  static ECHO_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static ECHO_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
  static ECHO_INLINE Vec load(const float* x) { return _mm256_load_ps(x); }
  static ECHO_INLINE void store(float* to, Vec x) { _mm256_store_ps(to, x); }
  static ECHO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static ECHO_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static ECHO_INLINE Vec divide(Vec x, float by) { return _mm256_div_ps(x, splat(by)); }
  static ECHO_INLINE void scale(float* x, float by) { store(x, _mm256_mul_ps(load(x), splat(by))); }
  static ECHO_INLINE Mask first_lanes(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane));
  }
  static ECHO_INLINE Vec select(Mask mask, Vec a, Vec b) { return _mm256_blendv_ps(b, a, mask); }
  static ECHO_INLINE bool any_above(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
  }
  static ECHO_INLINE float highest(Vec x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }
  static ECHO_INLINE float total(Vec x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }

  static ECHO_INLINE Vec load_operands(const float* x) { return _mm256_load_ps(x); }
  static ECHO_INLINE void store_operands(float* to, Vec x) { _mm256_store_ps(to, x); }
  static ECHO_INLINE Vec broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  static ECHO_INLINE Vec multiply(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // d is a multiple of 16, so rows hold whole vectors.
  static ECHO_INLINE Vec load_row(const float* x, int64_t) { return _mm256_loadu_ps(x); }
  static ECHO_INLINE Vec load_row(const uint16_t* x, int64_t) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static ECHO_INLINE void store_row(float* to, Vec x) { _mm256_storeu_ps(to, x); }
  static ECHO_INLINE void store_row(uint16_t* to, Vec x) {
    alignas(32) float line[kLanes];
    store(line, x);
    for (int i = 0; i < kLanes; ++i) put(to + i, line[i]);
  }

  template <class T>
  static ECHO_INLINE void pack_values(float* to, const T* x, const T*, int64_t d) {
    for (int64_t i = 0; i < d; i += kLanes) store(to + i, load_row(x + i, kLanes));
  }

  static ECHO_INLINE void transpose(Vec (&x)[8]) {
    Vec t[8];
    ECHO_UNROLL for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    ECHO_UNROLL for (int i = 0; i < 8; i += 4) {
      x[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      x[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      x[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      x[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    ECHO_UNROLL for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
    }
    ECHO_UNROLL for (int i = 0; i < 8; ++i) x[i] = t[i];
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
  return flash<Avx2, float>(params, task, scratch);
}

int64_t flash_avx2_bf16(const StreamAttentionCpuParams& params, const AttentionTask& task, char* scratch) {
  return flash<Avx2, uint16_t>(params, task, scratch);
}
}  // namespace echo
