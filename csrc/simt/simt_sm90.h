// simt_sm90.h - Hopper additions: mbarrier, TMA 2D tile load, wgmma m64n64k16 with smem descriptors.
#pragma once
#include "simt.h"
#if defined(__CUDACC__)
#include <cuda.h>
namespace simt {
using TensorMap = CUtensorMap;
#define SIMT_GRIDCONST __grid_constant__
SIMT_DEV void mbar_init(uint32_t a, int n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(a), "r"(n) : "memory");
}
SIMT_DEV void mbar_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
SIMT_DEV void mbar_arrive(uint32_t a) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(a) : "memory");
}
SIMT_DEV void mbar_arrive_tx(uint32_t a, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(a), "r"(bytes) : "memory");
}
SIMT_DEV void mbar_wait(uint32_t a, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nL_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n@!p bra L_%=;\n}" ::"r"(
          a),
      "r"(parity)
      : "memory");
}
SIMT_DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
SIMT_DEV void tma_load_2d(uint32_t dst, const TensorMap* m, uint32_t mbar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%3,%4}],[%2];" ::
          "r"(dst),
      "l"(m), "r"(mbar), "r"(x), "r"(y)
      : "memory");
}
SIMT_DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SIMT_DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
SIMT_DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
#define D8_(i)                                                                                \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
template <int TB>
SIMT_DEV void wgmma_m64n64k16(float (&d)[32], uint64_t da, uint64_t db, int scale_d) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p,%34,0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%"
      "27,%28,%29,%30,%31},"
      "%32,%33,p,1,1,0,%35;\n}"
      : D8_(0), D8_(8), D8_(16), D8_(24)
      : "l"(da), "l"(db), "r"(scale_d), "n"(TB));
}
}  // namespace simt
#else
#define SIMT_GRIDCONST
namespace simt {
struct alignas(64) TensorMap {
  const void* base;
  uint64_t dim0, dim1, stride1;
  uint32_t box0, box1;
  int swizzle;
};  // bf16; dim0 contiguous; swizzle 0|128
namespace rt {
void mbar_init(uint32_t a, int n);
void mbar_arrive(uint32_t a, int tx);
void mbar_wait(uint32_t a, int parity);
void fence_async();
void tma2d(uint32_t dst, const TensorMap* m, uint32_t mbar, int x, int y);
void wgmma(float* d, int n, uint64_t da, uint64_t db, int scale_d, bool tb);
void wg_fence();
void wg_commit();
void wg_wait(int n);
}  // namespace rt
SIMT_DEV void mbar_init(uint32_t a, int n) { rt::mbar_init(a, n); }
SIMT_DEV void mbar_fence_init() {}
SIMT_DEV void mbar_arrive(uint32_t a) { rt::mbar_arrive(a, 0); }
SIMT_DEV void mbar_arrive_tx(uint32_t a, int bytes) { rt::mbar_arrive(a, bytes); }
SIMT_DEV void mbar_wait(uint32_t a, int parity) { rt::mbar_wait(a, parity); }
SIMT_DEV void fence_proxy_async() { rt::fence_async(); }
SIMT_DEV void tma_load_2d(uint32_t dst, const TensorMap* m, uint32_t mbar, int x, int y) {
  rt::tma2d(dst, m, mbar, x, y);
}
SIMT_DEV void wgmma_fence() { rt::wg_fence(); }
SIMT_DEV void wgmma_commit() { rt::wg_commit(); }
template <int N>
SIMT_DEV void wgmma_wait() {
  rt::wg_wait(N);
}
template <int TB>
SIMT_DEV void wgmma_m64n64k16(float (&d)[32], uint64_t da, uint64_t db, int s) {
  rt::wgmma(d, 64, da, db, s, TB);
}
}  // namespace simt
#endif
namespace simt {  // 128B-swizzle shared memory matrix descriptor; lbo/sbo in bytes
SIMT_DEV uint64_t smem_desc_sw128(uint32_t addr, uint32_t lbo, uint32_t sbo) {
  return uint64_t((addr & 0x3FFFF) >> 4) | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32 |
         uint64_t(1) << 62;
}
}  // namespace simt
