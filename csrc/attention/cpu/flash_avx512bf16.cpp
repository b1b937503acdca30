// AVX-512 with bfloat16 products: two neighbours of d, or of the keys, to a lane; sums in float32.
#include "attention/cpu/flash.h"
#include "common/cpu/avx512.h"

namespace echo {
namespace {
struct Bfloat16 : Avx512 {
  using Operand = uint16_t;
  static constexpr int kRows = 6, kColumns = 4;  // 24 sums, 4 columns and a broadcast in 32 registers
  static constexpr int kPair = 2, kTile = 128;

  static ECHO_INLINE Vec load_operands(const uint16_t* x) { return _mm512_load_ps(x); }
  static ECHO_INLINE void store_operands(uint16_t* to, Vec x) { _mm512_store_ps(to, x); }
  static ECHO_INLINE Vec broadcast(const uint16_t* x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static ECHO_INLINE Vec dot(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  static ECHO_INLINE Vec load_row(const uint16_t* x, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(first_lanes(n), x));
  }

  static ECHO_INLINE void pack_values(uint16_t* to, const uint16_t* x, const uint16_t* y, int64_t d) {
    for (int64_t i = 0; i < d; i += kLanes) {
      __m512i pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + i)));
      if (y) {
        const __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(y + i)));
        pair = _mm512_or_si512(pair, _mm512_slli_epi32(next, 16));
      }
      _mm512_store_si512(to + i * kPair, pair);
    }
  }

  static ECHO_INLINE Vec exp2(Vec x) {  // relative error 7.5e-5; the rounding that follows has 2e-3
    constexpr float c[] = {0.9999252f, 0.69583356f, 0.22606716f, 0.078024521f};
    return exp2_by(c, x);
  }

  // Sums the rounded weights: then one key that takes all gets exactly its value.
  template <int N>
  static ECHO_INLINE Vec store_weights(uint16_t* to, const Vec (&x)[N], Vec sum) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    ECHO_UNROLL for (int j = 0; j + 1 < N; j += 2) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(x[j + 1], x[j]);
      _mm512_store_si512(to + j * kLanes, (__m512i)pairs);
      sum = _mm512_dpbf16_ps(sum, pairs, ones);
    }
    if (N % 2) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(zero(), x[N - 1]);
      _mm256_store_si256((__m256i*)(to + (N - 1) * kLanes), _mm512_castsi512_si256((__m512i)pairs));
      sum = _mm512_dpbf16_ps(sum, pairs, ones);
    }
    return sum;
  }
};
}  // namespace

int64_t flash_avx512bf16_bf16(const StreamAttentionCpuParams& params, const AttentionTask& task,
                              char* scratch) {
  return flash<Bfloat16, uint16_t>(params, task, scratch);
}
}  // namespace echo
