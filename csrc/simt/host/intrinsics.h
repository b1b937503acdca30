// The intrinsics of device.h under g++: the same names, carried out by the emulator.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "simt/host/number.h"
#include "simt/host/runtime.h"

#define SIMT_GLOBAL
#define SIMT_BOUNDS(threads, blocks)
#define SIMT_DEV inline __attribute__((always_inline))
#define SIMT_UNROLL _Pragma("GCC unroll 16")

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace simt {
SIMT_DEV unsigned char* dyn_smem() { return rt::smem(); }
SIMT_DEV uint32_t smem_addr(const void* p) { return rt::smem_offset(p); }

// Registers pass through locals: the runtime is not instrumented, so the kernel's arrays must not escape into
// it.
SIMT_DEV void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  uint32_t q[4];
  rt::ldmatrix(q, 4, false, addr);
  for (int i = 0; i < 4; ++i) r[i] = q[i];
}

SIMT_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  uint32_t q[4];
  rt::ldmatrix(q, 4, true, addr);
  for (int i = 0; i < 4; ++i) r[i] = q[i];
}

SIMT_DEV void mma(int kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float sum[4] = {d[0], d[1], d[2], d[3]};
  const uint32_t left[4] = {a[0], a[1], a[2], a[3]}, right[2] = {b0, b1};
  rt::mma(kind, sum, left, right);
  for (int i = 0; i < 4; ++i) d[i] = sum[i];
}

SIMT_DEV void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(rt::kMmaBf16, d, a, b0, b1);
}
SIMT_DEV void mma_f16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(rt::kMmaF16, d, a, b0, b1);
}
SIMT_DEV void mma_tf32_1688(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(rt::kMmaTf32, d, a, b0, b1);
}

SIMT_DEV void cp_async16(uint32_t dst, const void* src, bool pred = true) {
  rt::cp_async(dst, src, 16, pred ? 16 : 0);
}
SIMT_DEV void cp_async_commit() { rt::cp_commit(); }
template <int N>
SIMT_DEV void cp_async_wait() {
  rt::cp_wait(N);
}

SIMT_DEV void bar_sync(int id, int threads) { rt::barrier(id, threads, true); }
SIMT_DEV void bar_arrive(int id, int threads) { rt::barrier(id, threads, false); }

SIMT_DEV float ex2(float x) { return std::exp2(x); }
SIMT_DEV uint32_t pack_bf16(float lo, float hi) { return bf16_bits(lo) | uint32_t(bf16_bits(hi)) << 16; }
SIMT_DEV uint32_t pack_f16(float lo, float hi) { return f16_bits(lo) | uint32_t(f16_bits(hi)) << 16; }

SIMT_DEV int32_t opaque(int32_t x) { return x; }

SIMT_DEV uint4 load16(const void* p) {
  uint4 v;
  rt::load_vector(&v, p, 16);
  return v;
}
SIMT_DEV void store16(void* p, uint4 v) { rt::store_vector(p, &v, 16); }

template <class T>
SIMT_DEV T shuffle(int kind, uint32_t mask, T v, int lane, int width) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = rt::shuffle(kind, mask, bits, lane, width);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
}  // namespace simt

#define threadIdx (simt::rt::tid())
#define blockIdx (simt::rt::bid())
#define blockDim (simt::rt::bdim())
#define gridDim (simt::rt::gdim())

template <class T>
SIMT_DEV T __shfl_sync(uint32_t mask, T v, int lane, int width = 32) {
  return simt::shuffle(simt::rt::kIdx, mask, v, lane, width);
}
template <class T>
SIMT_DEV T __shfl_up_sync(uint32_t mask, T v, int delta, int width = 32) {
  return simt::shuffle(simt::rt::kUp, mask, v, delta, width);
}
template <class T>
SIMT_DEV T __shfl_down_sync(uint32_t mask, T v, int delta, int width = 32) {
  return simt::shuffle(simt::rt::kDown, mask, v, delta, width);
}
template <class T>
SIMT_DEV T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32) {
  return simt::shuffle(simt::rt::kXor, mask, v, lanes, width);
}
SIMT_DEV uint32_t __ballot_sync(uint32_t mask, int pred) { return simt::rt::ballot(mask, pred); }
SIMT_DEV void __syncwarp(uint32_t mask = ~0u) { simt::rt::syncwarp(mask); }
SIMT_DEV void __syncthreads() { simt::rt::barrier(0, -1, true); }
SIMT_DEV float __fdividef(float a, float b) { return a / b; }
SIMT_DEV float rsqrtf(float x) { return 1.f / std::sqrt(x); }
template <class T>
SIMT_DEV T atomicAdd(T* p, T v) {
  return simt::rt::atomic_add(p, v);
}
