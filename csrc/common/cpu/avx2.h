// Vectors of AVX2 with FMA: 8 float32 lanes.
#pragma once
#include <immintrin.h>

#include "common/cpu/scalar.h"

namespace echo {
namespace {
struct Avx2 {
  using Vec = __m256;
  using Mask = __m256;
  static constexpr int kLanes = 8;

  static ECHO_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static ECHO_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
  static ECHO_INLINE Vec load(const float* x) { return _mm256_load_ps(x); }
  static ECHO_INLINE void store(float* to, Vec x) { _mm256_store_ps(to, x); }
  static ECHO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static ECHO_INLINE Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static ECHO_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static ECHO_INLINE Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static ECHO_INLINE Vec quotient(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static ECHO_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
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

  static ECHO_INLINE Vec load_wide(const float* x) { return _mm256_loadu_ps(x); }
  static ECHO_INLINE Vec load_wide(const uint16_t* x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static ECHO_INLINE void store_wide(float* to, Vec x) { _mm256_storeu_ps(to, x); }
  static ECHO_INLINE void store_wide(uint16_t* to, Vec x) {
    alignas(32) float line[kLanes];
    store(line, x);
    for (int i = 0; i < kLanes; ++i) put(to + i, line[i]);
  }

  // Pairs (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos); the table holds (cos, sin) pairs.
  static ECHO_INLINE Vec rotate(Vec x, Vec table) {
    const Vec crossed = _mm256_mul_ps(_mm256_permute_ps(x, 0xb1), _mm256_movehdup_ps(table));
    return _mm256_fmaddsub_ps(x, _mm256_moveldup_ps(table), crossed);
  }

  static ECHO_INLINE Vec exp2(Vec x) {     // relative error 2e-9 before rounding
    x = _mm256_max_ps(splat(-126.0f), x);  // NaN stays NaN; smaller powers are denormal
    const Vec whole = _mm256_floor_ps(x), f = _mm256_sub_ps(x, whole);
    constexpr float c[] = {1.0f, 0.693147004f, 0.24022983f, 0.0554833412f, 0.00967884064f, 0.00124396873f};
    Vec y = splat(0.000217022549f);
    ECHO_UNROLL for (int i = 5; i >= 0; --i) y = fma(y, f, splat(c[i]));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
  }

  // A square of 32-bit elements.
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
};
}  // namespace
}  // namespace echo
