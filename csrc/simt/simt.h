// simt.h - thin intrinsics layer: the same kernel source compiles with nvcc (sm_80+) and with a
// plain C++17 host compiler, where every CUDA thread of a block is a fiber (see simt_host.cpp).
// Rules for kernels: dynamic shared memory only (simt::dyn_smem), raw PTX only inside this file,
// no static __shared__, no warp-synchronous assumptions (use __syncwarp), no inter-block spinning.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)  // ------------------------------------------------------------ device
#define SIMT_GLOBAL __global__
#define SIMT_BOUNDS(t, b) __launch_bounds__(t, b)
#define SIMT_DEV __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")
namespace simt {
struct alignas(2) bf16 {
  uint16_t x;
};
SIMT_DEV unsigned char* dyn_smem() {
  extern __shared__ __align__(1024) unsigned char simt_smem_[];
  return simt_smem_;
}
SIMT_DEV uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
SIMT_DEV void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
SIMT_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
SIMT_DEV void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SIMT_DEV void cp_async16(uint32_t dst, const void* src, bool pred = true) {  // !pred: writes 16 zero bytes
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(dst), "l"(src), "r"(pred ? 16 : 0)
               : "memory");
}
SIMT_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
SIMT_DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
SIMT_DEV void bar_sync(int id, int n) {
  asm volatile("barrier.cta.sync %0,%1;" ::"r"(id), "r"(n) : "memory");
}
SIMT_DEV void bar_arrive(int id, int n) {
  asm volatile("barrier.cta.arrive %0,%1;" ::"r"(id), "r"(n) : "memory");
}
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
}  // namespace simt

#else  // -------------------------------------------------------------------------------- host
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#define SIMT_HOST 1
#define SIMT_GLOBAL
#define SIMT_BOUNDS(t, b)
#define SIMT_DEV inline __attribute__((always_inline))
#define SIMT_UNROLL _Pragma("GCC unroll 16")
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
namespace simt {
struct alignas(2) bf16 {
  uint16_t x;
};
enum Sched { FORWARD, REVERSE, RANDOM };
struct Config {
  int sched = FORWARD;
  uint64_t seed = 1;
  bool race = true;
  int os_threads = 1;
  int max_reports = 8;
};
struct Result {
  int errors = 0;
  std::string text;
  uint64_t switches = 0, collectives = 0, bank_conflicts = 0;
};
namespace rt {  // implemented in simt_host.cpp (compiled WITHOUT -fsanitize=thread)
dim3 tid();
dim3 bid();
dim3 bdim();
dim3 gdim();
unsigned char* smem();
uint32_t smem_off(const void*);
void barrier(int id, int n, bool wait);  // n < 0: all live threads (= __syncthreads)
void syncwarp(uint32_t mask);
uint64_t shfl(int op, uint32_t mask, uint64_t bits, int arg, int width);  // op: 0 idx 1 up 2 down 3 xor
uint32_t ballot(uint32_t mask, bool p);
void ldmatrix(uint32_t* r, int num, bool trans, uint32_t addr);
void mma16816(float* d, const uint32_t* a, const uint32_t* b);
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes);
void cp_commit();
void cp_wait(int n);
void atomic_note(void* p, size_t n);
void yield();
Result launch(const Config&, dim3 g, dim3 b, size_t smem, void (*f)(void*), void* ctx, size_t ctx_size);
}  // namespace rt
// Guarded, named global buffers: PROT_NONE page on both sides, end flush with the guard page.
void* gm_alloc(const char* name, size_t bytes, bool writable);
void gm_free(void*);
template <class K, class... A>
Result launch(const Config& c, dim3 g, dim3 b, size_t smem, K k, A... a) {
  auto body = [=] { k(a...); };
  return rt::launch(c, g, b, smem, [](void* p) { (*static_cast<decltype(body)*>(p))(); }, &body, sizeof body);
}
SIMT_DEV unsigned char* dyn_smem() { return rt::smem(); }
SIMT_DEV uint32_t smem_addr(const void* p) { return rt::smem_off(p); }
SIMT_DEV void ldm_(uint32_t (&r)[4], uint32_t a, bool t) {
  uint32_t q[4];
  rt::ldmatrix(q, 4, t, a);
  for (int i = 0; i < 4; i++) r[i] = q[i];
}
SIMT_DEV void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) { ldm_(r, a, false); }
SIMT_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) { ldm_(r, a, true); }
SIMT_DEV void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float t[4] = {d[0], d[1], d[2], d[3]};
  uint32_t A[4] = {a[0], a[1], a[2], a[3]}, B[2] = {b0, b1};
  rt::mma16816(t, A, B);
  for (int i = 0; i < 4; i++) d[i] = t[i];
}
SIMT_DEV void cp_async16(uint32_t dst, const void* src, bool pred = true) {
  rt::cp_async(dst, src, 16, pred ? 16 : 0);
}
SIMT_DEV void cp_async_commit() { rt::cp_commit(); }
template <int N>
SIMT_DEV void cp_async_wait() {
  rt::cp_wait(N);
}
SIMT_DEV void bar_sync(int id, int n) { rt::barrier(id, n, true); }
SIMT_DEV void bar_arrive(int id, int n) { rt::barrier(id, n, false); }
SIMT_DEV float ex2(float x) { return exp2f(x); }
SIMT_DEV uint16_t f2bf(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return f != f ? 0x7fff : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
SIMT_DEV float bf2f(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
SIMT_DEV uint32_t pack_bf16(float lo, float hi) { return f2bf(lo) | uint32_t(f2bf(hi)) << 16; }
template <class T>
SIMT_DEV T shfl_(int op, uint32_t m, T v, int a, int w) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "");
  uint64_t u = 0;
  memcpy(&u, &v, sizeof v);
  u = rt::shfl(op, m, u, a, w);
  memcpy(&v, &u, sizeof v);
  return v;
}
}  // namespace simt
#define threadIdx (simt::rt::tid())
#define blockIdx (simt::rt::bid())
#define blockDim (simt::rt::bdim())
#define gridDim (simt::rt::gdim())
template <class T>
SIMT_DEV T __shfl_sync(uint32_t m, T v, int l, int w = 32) {
  return simt::shfl_(0, m, v, l, w);
}
template <class T>
SIMT_DEV T __shfl_up_sync(uint32_t m, T v, int d, int w = 32) {
  return simt::shfl_(1, m, v, d, w);
}
template <class T>
SIMT_DEV T __shfl_down_sync(uint32_t m, T v, int d, int w = 32) {
  return simt::shfl_(2, m, v, d, w);
}
template <class T>
SIMT_DEV T __shfl_xor_sync(uint32_t m, T v, int x, int w = 32) {
  return simt::shfl_(3, m, v, x, w);
}
SIMT_DEV uint32_t __ballot_sync(uint32_t m, int p) { return simt::rt::ballot(m, p); }
SIMT_DEV void __syncwarp(uint32_t m = ~0u) { simt::rt::syncwarp(m); }
SIMT_DEV void __syncthreads() { simt::rt::barrier(0, -1, true); }
SIMT_DEV float __fdividef(float a, float b) { return a / b; }
template <class T>
__attribute__((noinline, no_sanitize_thread)) T atomicAdd(T* p, T v) {
  simt::rt::atomic_note(p, sizeof *p);
  T o, n;
  __atomic_load(p, &o, __ATOMIC_RELAXED);
  do n = o + v;
  while (!__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return o;
}
#endif
