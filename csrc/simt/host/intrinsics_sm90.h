// The intrinsics of device_sm90.h and wgmma.h under g++.
#pragma once
#include "simt/host/intrinsics.h"
#include "simt/host/runtime_sm90.h"

#define SIMT_GRIDCONST

namespace simt {
SIMT_DEV void mbar_init(uint32_t addr, int arrivals) { rt::mbar_init(addr, arrivals); }
SIMT_DEV void mbar_fence_init() { rt::mbar_fence_init(); }
SIMT_DEV void mbar_arrive(uint32_t addr) { rt::mbar_arrive(addr, 0); }
SIMT_DEV void mbar_arrive_tx(uint32_t addr, int bytes) { rt::mbar_arrive(addr, bytes); }
SIMT_DEV void mbar_wait(uint32_t addr, int parity) { rt::mbar_wait(addr, parity); }
SIMT_DEV void fence_proxy_async() { rt::fence_proxy_async(); }

SIMT_DEV void tma_prefetch(const TensorMap*) {}
SIMT_DEV void tma_load(int rank, uint32_t dst, const TensorMap* map, uint32_t mbar, int c0, int c1, int c2,
                       int c3, int c4) {
  const int at[5] = {c0, c1, c2, c3, c4};
  rt::tma_load(rank, dst, map, mbar, at);
}
SIMT_DEV void tma_load_2d(uint32_t dst, const TensorMap* map, uint32_t mbar, int c0, int c1) {
  tma_load(2, dst, map, mbar, c0, c1, 0, 0, 0);
}
SIMT_DEV void tma_load_3d(uint32_t dst, const TensorMap* map, uint32_t mbar, int c0, int c1, int c2) {
  tma_load(3, dst, map, mbar, c0, c1, c2, 0, 0);
}
SIMT_DEV void tma_load_4d(uint32_t dst, const TensorMap* map, uint32_t mbar, int c0, int c1, int c2, int c3) {
  tma_load(4, dst, map, mbar, c0, c1, c2, c3, 0);
}
SIMT_DEV void tma_load_5d(uint32_t dst, const TensorMap* map, uint32_t mbar, int c0, int c1, int c2, int c3,
                          int c4) {
  tma_load(5, dst, map, mbar, c0, c1, c2, c3, c4);
}
SIMT_DEV void tma_store(int rank, const TensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
  const int at[5] = {c0, c1, c2, c3, 0};
  rt::tma_store(rank, map, src, at);
}
SIMT_DEV void tma_store_2d(const TensorMap* map, uint32_t src, int c0, int c1) {
  tma_store(2, map, src, c0, c1, 0, 0);
}
SIMT_DEV void tma_store_3d(const TensorMap* map, uint32_t src, int c0, int c1, int c2) {
  tma_store(3, map, src, c0, c1, c2, 0);
}
SIMT_DEV void tma_store_4d(const TensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
  tma_store(4, map, src, c0, c1, c2, c3);
}
SIMT_DEV void tma_store_commit() { rt::tma_store_commit(); }
template <int N>
SIMT_DEV void tma_store_wait_read() {
  rt::tma_store_wait_read(N);
}

SIMT_DEV bool elect_one() { return rt::elect_one(); }
template <int kRegisters>
SIMT_DEV void registers_raise() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "a multiple of 8 in 24..256");
}
template <int kRegisters>
SIMT_DEV void registers_lower() {
  registers_raise<kRegisters>();
}

SIMT_DEV void stmatrix_x4(uint32_t addr, const uint32_t (&r)[4]) {
  const uint32_t q[4] = {r[0], r[1], r[2], r[3]};
  rt::stmatrix(addr, q, false);
}
SIMT_DEV void stmatrix_x4_trans(uint32_t addr, const uint32_t (&r)[4]) {
  const uint32_t q[4] = {r[0], r[1], r[2], r[3]};
  rt::stmatrix(addr, q, true);
}

SIMT_DEV void wgmma_fence() { rt::wgmma_fence(); }
SIMT_DEV void wgmma_commit() { rt::wgmma_commit(); }
template <int N>
SIMT_DEV void wgmma_wait() {
  rt::wgmma_wait(N);
}
template <int N>
SIMT_DEV void wgmma_pin(float (&)[N]) {}

template <class T>
inline constexpr int kWgmmaKind = std::is_same<T, bf16>::value ? rt::kMmaBf16 : rt::kMmaF16;

template <class T, int N, int kTransA, int kTransB>
SIMT_DEV void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  rt::wgmma({kWgmmaKind<T>, N, a, b, accumulate != 0, kTransA != 0, kTransB != 0}, d, nullptr);
}
template <class T, int N, int kTransB>
SIMT_DEV void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  const uint32_t q[4] = {a[0], a[1], a[2], a[3]};
  rt::wgmma({kWgmmaKind<T>, N, 0, b, accumulate != 0, false, kTransB != 0}, d, q);
}
}  // namespace simt
