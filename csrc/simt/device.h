// The intrinsics under nvcc, sm_80 and later; host/intrinsics.h gives each the same name and meaning.
#pragma once
#include <cuda_runtime.h>

#include "simt/types.h"

#define SIMT_GLOBAL __global__
#define SIMT_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define SIMT_DEV __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")

namespace simt {
SIMT_DEV unsigned char* dyn_smem() {
  extern __shared__ __align__(1024) unsigned char smem[];
  return smem;
}

SIMT_DEV uint32_t smem_addr(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8.
SIMT_DEV void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}

SIMT_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}

// d (16x8, float) += a (16x16, row) b (16x8, column).
SIMT_DEV void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

SIMT_DEV void mma_f16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d (16x8, float) += a (16x8, row) b (8x8, column); operands are float bits of which the tensor core reads
// the upper 19.
SIMT_DEV void mma_tf32_1688(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest tf32, ties away from zero, as float bits.
SIMT_DEV uint32_t round_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0,%1;" : "=r"(r) : "f"(x));
  return r;
}

// 16 bytes from global to shared memory; 16 zero bytes unless pred.
SIMT_DEV void cp_async16(uint32_t dst, const void* src, bool pred = true) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(dst), "l"(src), "r"(pred ? 16 : 0)
               : "memory");
}

SIMT_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N committed groups of this thread are still on their way.
template <int N>
SIMT_DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

SIMT_DEV void bar_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0,%1;" ::"r"(id), "r"(threads) : "memory");
}

SIMT_DEV void bar_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0,%1;" ::"r"(id), "r"(threads) : "memory");
}

// 2^x; about 2 ulp, subnormals are zero.
SIMT_DEV float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

SIMT_DEV uint32_t pack_bf16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

SIMT_DEV uint32_t pack_f16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

SIMT_DEV uint16_t bf16_bits(float x) { return uint16_t(pack_bf16(x, 0.f)); }

SIMT_DEV uint16_t f16_bits(float x) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(r) : "f"(x));
  return r;
}

SIMT_DEV float bf16_value(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

SIMT_DEV float f16_value(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0,%1;" : "=f"(y) : "h"(bits));
  return y;
}

SIMT_DEV float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
SIMT_DEV uint32_t bits_of_float(float x) { return __float_as_uint(x); }

// x, but the compiler can't tell: what is computed from it is computed again, not kept in registers.
SIMT_DEV int32_t opaque(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 16 bytes in one instruction; p is aligned to 16.
SIMT_DEV uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
SIMT_DEV void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
}  // namespace simt
