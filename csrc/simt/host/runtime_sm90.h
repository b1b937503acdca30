// The emulator's Hopper units; see runtime.h.
#pragma once
#include "simt/host/runtime.h"

namespace simt {
// What tensor_map() makes for the emulator; under nvcc it is opaque.
struct alignas(64) TensorMap {
  const char* base;
  int64_t size[5], stride[5];  // strides in bytes
  int32_t box[5];
  int32_t rank, item_bytes, swizzle;
};

namespace rt {
// All but the registers of one wgmma; the same in every thread of the warpgroup.
struct WgmmaShape {
  int kind, n;
  uint64_t a, b;
  bool accumulate, trans_a, trans_b;
};

void mbar_init(uint32_t addr, int arrivals);
void mbar_fence_init();
void mbar_arrive(uint32_t addr, int bytes);
void mbar_wait(uint32_t addr, int parity);
void fence_proxy_async();
bool elect_one();
void stmatrix(uint32_t addr, const uint32_t* r, bool trans);
void tma_load(int rank, uint32_t dst, const TensorMap* map, uint32_t mbar, const int* at);
void tma_store(int rank, const TensorMap* map, uint32_t src, const int* at);
void tma_store_commit();
void tma_store_wait_read(int keep);
void wgmma_fence();
void wgmma(const WgmmaShape& shape, float* d, const uint32_t* a);  // a: null where it is in shared memory
void wgmma_commit();
void wgmma_wait(int keep);
}  // namespace rt
}  // namespace simt
