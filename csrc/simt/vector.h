// Conversions and vector access for kernels templated on a storage type: float, simt::f16 or simt::bf16.
#pragma once

namespace simt {
template <class A, class B>
SIMT_DEV constexpr A min(A a, B b) {
  return a < A(b) ? a : A(b);
}

template <class A, class B>
SIMT_DEV constexpr A max(A a, B b) {
  return a > A(b) ? a : A(b);
}

SIMT_DEV float to_float(float x) { return x; }
SIMT_DEV float to_float(bf16 x) { return bf16_value(x.x); }
SIMT_DEV float to_float(f16 x) { return f16_value(x.x); }

// How a type is rounded to, packed in pairs and multiplied on the tensor cores.
template <class T>
struct Numeric;

template <>
struct Numeric<float> {
  SIMT_DEV static float round(float x) { return x; }
};

template <>
struct Numeric<bf16> {
  SIMT_DEV static bf16 round(float x) { return {bf16_bits(x)}; }
  SIMT_DEV static uint32_t pack(float lo, float hi) { return pack_bf16(lo, hi); }
  SIMT_DEV static float low(uint32_t pair) { return bf16_value(uint16_t(pair)); }
  SIMT_DEV static float high(uint32_t pair) { return bf16_value(uint16_t(pair >> 16)); }
  SIMT_DEV static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16_16816(d, a, b0, b1);
  }
};

template <>
struct Numeric<f16> {
  SIMT_DEV static f16 round(float x) { return {f16_bits(x)}; }
  SIMT_DEV static uint32_t pack(float lo, float hi) { return pack_f16(lo, hi); }
  SIMT_DEV static float low(uint32_t pair) { return f16_value(uint16_t(pair)); }
  SIMT_DEV static float high(uint32_t pair) { return f16_value(uint16_t(pair >> 16)); }
  SIMT_DEV static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16_16816(d, a, b0, b1);
  }
};

template <class T>
inline constexpr int kPer16Bytes = 16 / int(sizeof(T));

// N values at p as floats. Where they fill 16-byte words p is aligned to 16 and they are read 16 bytes at a
// time.
template <int N, class T>
SIMT_DEV void load_floats(float (&out)[N], const T* p) {
  if constexpr (N % kPer16Bytes<T> != 0) {
    SIMT_UNROLL
    for (int i = 0; i < N; ++i) out[i] = to_float(p[i]);
  } else {
    SIMT_UNROLL
    for (int i = 0; i < N; i += kPer16Bytes<T>) {
      const uint4 v = load16(p + i);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      SIMT_UNROLL
      for (int w = 0; w < 4; ++w)
        if constexpr (sizeof(T) == 4) {
          out[i + w] = float_of_bits(words[w]);
        } else {
          out[i + 2 * w] = Numeric<T>::low(words[w]);
          out[i + 2 * w + 1] = Numeric<T>::high(words[w]);
        }
    }
  }
}

// The inverse: rounded to T and written, 16 bytes at a time where they fill such words.
template <int N, class T>
SIMT_DEV void store_floats(T* p, const float (&in)[N]) {
  if constexpr (N % kPer16Bytes<T> != 0) {
    SIMT_UNROLL
    for (int i = 0; i < N; ++i) p[i] = Numeric<T>::round(in[i]);
  } else {
    SIMT_UNROLL
    for (int i = 0; i < N; i += kPer16Bytes<T>) {
      uint32_t words[4];
      SIMT_UNROLL
      for (int w = 0; w < 4; ++w)
        if constexpr (sizeof(T) == 4)
          words[w] = bits_of_float(in[i + w]);
        else
          words[w] = Numeric<T>::pack(in[i + 2 * w], in[i + 2 * w + 1]);
      store16(p + i, uint4{words[0], words[1], words[2], words[3]});
    }
  }
}
}  // namespace simt
