// Vectors of AVX-512 (F, BW, DQ, VL): 16 float32 lanes.
#pragma once
#include <immintrin.h>

#include "common/cpu/scalar.h"

namespace echo {
namespace {
struct Avx512 {
  using Vec = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  static ECHO_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static ECHO_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
  static ECHO_INLINE Vec load(const float* x) { return _mm512_load_ps(x); }
  static ECHO_INLINE void store(float* to, Vec x) { _mm512_store_ps(to, x); }
  static ECHO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static ECHO_INLINE Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static ECHO_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static ECHO_INLINE Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static ECHO_INLINE Vec quotient(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static ECHO_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static ECHO_INLINE float highest(Vec x) { return _mm512_reduce_max_ps(x); }
  static ECHO_INLINE float total(Vec x) { return _mm512_reduce_add_ps(x); }
  static ECHO_INLINE Vec load_wide(const float* x) { return _mm512_loadu_ps(x); }
  static ECHO_INLINE Vec load_wide(const uint16_t* bf16) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)bf16));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static ECHO_INLINE void store_wide(float* to, Vec x) { _mm512_storeu_ps(to, x); }
  static ECHO_INLINE void store_wide(uint16_t* to, Vec x) {  // to the nearest bfloat16, ties to even
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded =
        _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  // Pairs (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos); the table holds (cos, sin) pairs.
  static ECHO_INLINE Vec rotate(Vec x, Vec table) {
    const Vec crossed = _mm512_mul_ps(_mm512_permute_ps(x, 0xb1), _mm512_movehdup_ps(table));
    return _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(table), crossed);
  }

  static ECHO_INLINE Mask first_lanes(int64_t n) { return n >= kLanes ? Mask(0xffff) : Mask((1u << n) - 1); }
  static ECHO_INLINE Vec select(Mask mask, Vec a, Vec b) { return _mm512_mask_blend_ps(mask, b, a); }
  static ECHO_INLINE bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

  // c0 + c1 f + ... at the fraction of x, times two to the power of its floor.
  template <int kTerms>
  static ECHO_INLINE Vec exp2_by(const float (&c)[kTerms], Vec x) {
    const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vec y = splat(c[kTerms - 1]);
    ECHO_UNROLL for (int i = kTerms - 2; i >= 0; --i) y = fma(y, f, splat(c[i]));
    return _mm512_scalef_ps(y, x);
  }

  static ECHO_INLINE Vec exp2(Vec x) {  // relative error 2e-9 before rounding
    constexpr float c[] = {1.0f,           0.693147004f,   0.24022983f,    0.0554833412f,
                           0.00967884064f, 0.00124396873f, 0.000217022549f};
    return exp2_by(c, x);
  }

  // A square of 32-bit elements.
  static ECHO_INLINE void transpose(Vec (&x)[16]) {
    Vec t[16];
    ECHO_UNROLL for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    const auto low = [](Vec a, Vec b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto high = [](Vec a, Vec b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    ECHO_UNROLL for (int i = 0; i < 16; i += 4) {  // rows i .. i + 3 of each group of four columns
      x[i] = low(t[i], t[i + 2]);
      x[i + 1] = high(t[i], t[i + 2]);
      x[i + 2] = low(t[i + 1], t[i + 3]);
      x[i + 3] = high(t[i + 1], t[i + 3]);
    }
    ECHO_UNROLL for (int i = 0; i < 4; ++i) {  // pairs of groups
      t[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
    ECHO_UNROLL for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      x[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      x[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      x[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }
};
}  // namespace
}  // namespace echo
