// The intrinsics of sm_90a under nvcc, but for wgmma's (wgmma.h).
#pragma once
#include <cuda.h>

#include "simt/device.h"

#define SIMT_GRIDCONST __grid_constant__

namespace simt {
using TensorMap = CUtensorMap;

SIMT_DEV void mbar_init(uint32_t addr, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(addr), "r"(arrivals) : "memory");
}

// After the mbar_init and before the barrier that shows it to others and to TMA.
SIMT_DEV void mbar_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

SIMT_DEV void mbar_arrive(uint32_t addr) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(addr) : "memory");
}

// Arrives, and lets the phase end only when this many more bytes of TMA have landed.
SIMT_DEV void mbar_arrive_tx(uint32_t addr, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(addr), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended; parity 1 returns at once from a fresh barrier.
SIMT_DEV void mbar_wait(uint32_t addr, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nL_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n@!p bra L_%=;\n}" ::"r"(
          addr),
      "r"(parity)
      : "memory");
}

// Shows this thread's ordinary writes to shared memory to TMA and wgmma, once a barrier orders them.
SIMT_DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

SIMT_DEV void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of the tensor into shared memory, innermost coordinate first; zeros outside the tensor.
SIMT_DEV void tma_load_2d(uint32_t dst, const TensorMap* map, uint32_t mbar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%3,%4}],[%2];" ::
          "r"(dst),
      "l"(map), "r"(mbar), "r"(c0), "r"(c1)
      : "memory");
}
SIMT_DEV void tma_load_3d(uint32_t dst, const TensorMap* map, uint32_t mbar, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0],[%1,{%3,%4,%5}],[%2];" ::"r"(dst),
      "l"(map), "r"(mbar), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
SIMT_DEV void tma_load_4d(uint32_t dst, const TensorMap* map, uint32_t mbar, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0],[%1,{%3,%4,%5,%6}],[%2];" ::"r"(dst),
      "l"(map), "r"(mbar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
SIMT_DEV void tma_load_5d(uint32_t dst, const TensorMap* map, uint32_t mbar, int c0, int c1, int c2, int c3,
                          int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0],[%1,{%3,%4,%5,%6,%7}],[%2];" ::"r"(dst),
      "l"(map), "r"(mbar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// The inverse; nothing is written outside the tensor. The thread that stores is the one that commits and
// waits.
SIMT_DEV void tma_store_2d(const TensorMap* map, uint32_t src, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0,{%2,%3}],[%1];" ::"l"(map),
               "r"(src), "r"(c0), "r"(c1)
               : "memory");
}
SIMT_DEV void tma_store_3d(const TensorMap* map, uint32_t src, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0,{%2,%3,%4}],[%1];" ::"l"(map),
               "r"(src), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
SIMT_DEV void tma_store_4d(const TensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0,{%2,%3,%4,%5}],[%1];" ::"l"(map),
               "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
SIMT_DEV void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most N groups still read their shared memory, which may then be written again.
template <int N>
SIMT_DEV void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// One lane of a converged warp, the same one every time.
SIMT_DEV bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p,0xffffffff;\nselp.u32 %0,1,0,p;\n}" : "=r"(elected));
  return elected != 0;
}

// Registers a thread of this warpgroup may use from here on: a multiple of 8 in 24..256.
template <int kRegisters>
SIMT_DEV void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SIMT_DEV void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The inverse of ldmatrix_x4.
SIMT_DEV void stmatrix_x4(uint32_t addr, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(addr), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
SIMT_DEV void stmatrix_x4_trans(uint32_t addr, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(addr), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
}  // namespace simt
