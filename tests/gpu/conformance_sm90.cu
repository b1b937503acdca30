// The intrinsics of sm_90a: mbarriers, TMA, stmatrix, elect, wgmma.
#include "conformance.h"
#include "simt/simt_sm90.h"
#include "simt/tensor_map.h"

using simt::bf16;
using simt::f16;
using simt::TensorMap;

SIMT_DEV uint32_t* words() { return reinterpret_cast<uint32_t*>(simt::dyn_smem()); }

INTRINSIC(stmatrix_x4, 32, 512) {
  const int t = threadIdx.x;
  const uint32_t r[4] = {in[4 * t], in[4 * t + 1], in[4 * t + 2], in[4 * t + 3]};
  simt::stmatrix_x4(simt::smem_addr(words()) + 16 * (t * 5 % 32), r);
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = words()[4 * t + i];
}

INTRINSIC(stmatrix_x4_trans, 32, 512) {
  const int t = threadIdx.x;
  const uint32_t r[4] = {in[4 * t], in[4 * t + 1], in[4 * t + 2], in[4 * t + 3]};
  simt::stmatrix_x4_trans(simt::smem_addr(words()) + 16 * (t * 5 % 32), r);
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = words()[4 * t + i];
}

// One lane, and the same again.
INTRINSIC(elect_one, 32, 0) {
  const uint32_t first = __ballot_sync(~0u, simt::elect_one()),
                 second = __ballot_sync(~0u, simt::elect_one());
  if (threadIdx.x == 0) {
    out[0] = first != 0 && (first & (first - 1)) == 0;
    out[1] = first == second;
  }
}

INTRINSIC(registers, 256, 0) {
  if (threadIdx.x < 128)
    simt::registers_lower<40>();
  else
    simt::registers_raise<160>();
  out[threadIdx.x] = in[threadIdx.x];
}

// Threads 0 to 63 produce what the others consume, through one buffer and two mbarriers.
INTRINSIC(mbarriers, 128, 320) {
  const int t = threadIdx.x;
  const uint32_t full = simt::smem_addr(words()) + 256, empty = full + 8;
  if (t == 0) {
    simt::mbar_init(full, 64);
    simt::mbar_init(empty, 64);
    simt::mbar_fence_init();
  }
  __syncthreads();
  for (int i = 0; i < 4; ++i)
    if (t < 64) {
      simt::mbar_wait(empty, (i & 1) ^ 1);
      words()[t] = in[64 * i + t];
      simt::mbar_arrive(full);
    } else {
      simt::mbar_wait(full, i & 1);
      out[64 * i + t - 64] = words()[127 - t];
      simt::mbar_arrive(empty);
    }
}

// A box, as it lies in shared memory.
template <int kRank, int kBytes>
SIMT_GLOBAL void load_kernel(const SIMT_GRIDCONST TensorMap map, uint32_t* out, int c0, int c1, int c2) {
  const uint32_t box = simt::smem_addr(words()), full = box + kBytes;
  if (threadIdx.x == 0) {
    simt::mbar_init(full, 1);
    simt::mbar_fence_init();
    simt::tma_prefetch(&map);
    simt::mbar_arrive_tx(full, kBytes);
    if (kRank == 2) simt::tma_load_2d(box, &map, full, c0, c1);
    if (kRank == 3) simt::tma_load_3d(box, &map, full, c0, c1, c2);
    if (kRank == 4) simt::tma_load_4d(box, &map, full, c0, c1, c2, 1);
    if (kRank == 5) simt::tma_load_5d(box, &map, full, c0, c1, c2, 1, -1);
  }
  __syncthreads();
  simt::mbar_wait(full, 0);
  for (int i = threadIdx.x; i < kBytes / 4; i += 32) out[i] = words()[i];
}

#define LOAD(name, type, rank, bytes, swizzle, c0, c1, c2, ...)                                             \
  static const Register register_##name(#name, [](const uint32_t* in, uint32_t* out, simt::Stream stream) { \
    const TensorMap map = simt::tensor_map<type>(in, __VA_ARGS__, swizzle);                                 \
    simt::launch_kernel(load_kernel<rank, bytes>, dim3(1), dim3(32), bytes + 16, stream, map, out, c0, c1,  \
                        c2);                                                                                \
  });
// Tensors of axes (..., 6, 80): boxes that reach past the end, before the start, or stay inside.
LOAD(tma_load_2d_128, bf16, 2, 2048, 128, 24, 3, 0, {{80, 1, 64}, {10, 80, 16}})
LOAD(tma_load_2d_64, bf16, 2, 1024, 64, -8, -2, 0, {{80, 1, 32}, {10, 80, 16}})
LOAD(tma_load_2d_32, bf16, 2, 256, 32, 5, 1, 0, {{80, 1, 16}, {10, 80, 8}})
LOAD(tma_load_2d_0, float, 2, 512, 0, 33, 2, 0, {{40, 1, 16}, {10, 40, 8}})
LOAD(tma_load_3d, f16, 3, 2048, 128, 8, 4, 1, {{80, 1, 64}, {6, 80, 8}, {3, 480, 2}})
LOAD(tma_load_4d, bf16, 4, 2048, 64, 60, -1, 1, {{80, 1, 32}, {6, 80, 4}, {2, 480, 4}, {2, 960, 2}})
LOAD(tma_load_5d, float, 5, 2048, 32, 3, 1, 0, {{20, 1, 8}, {3, 20, 4}, {2, 60, 4}, {2, 120, 2}, {2, 240, 2}})

// The inverse; what of the box lies outside the tensor is not written.
template <int kRank, int kBytes>
SIMT_GLOBAL void store_kernel(const SIMT_GRIDCONST TensorMap map, const uint32_t* in, int c0, int c1,
                              int c2) {
  for (int i = threadIdx.x; i < kBytes / 4; i += 32) words()[i] = in[i];
  simt::fence_proxy_async();
  __syncwarp();
  if (threadIdx.x == 0) {
    const uint32_t box = simt::smem_addr(words());
    if (kRank == 2) simt::tma_store_2d(&map, box, c0, c1);
    if (kRank == 3) simt::tma_store_3d(&map, box, c0, c1, c2);
    if (kRank == 4) simt::tma_store_4d(&map, box, c0, c1, c2, 1);
    simt::tma_store_commit();
    simt::tma_store_wait_read<0>();
  }
}

#define STORE(name, type, rank, bytes, swizzle, c0, c1, c2, ...)                                            \
  static const Register register_##name(#name, [](const uint32_t* in, uint32_t* out, simt::Stream stream) { \
    const TensorMap map = simt::tensor_map<type>(out, __VA_ARGS__, swizzle);                                \
    simt::launch_kernel(store_kernel<rank, bytes>, dim3(1), dim3(32), bytes, stream, map, in, c0, c1, c2);  \
  });
STORE(tma_store_2d, bf16, 2, 2048, 128, 24, -3, 0, {{80, 1, 64}, {10, 80, 16}})
STORE(tma_store_3d, float, 3, 1024, 0, 12, 1, 1, {{20, 1, 16}, {6, 20, 8}, {3, 120, 2}})
STORE(tma_store_4d, f16, 4, 2048, 64, 60, 4, 1, {{80, 1, 32}, {6, 80, 4}, {2, 480, 4}, {2, 960, 2}})

// Where element (mn, k) of a 16-deep operand lies: 16 columns of wider lines, or 16 lines of k. What is not
// the operand is NaN. These are the canonical layouts of the PTX ISA, written down here a second time.
template <int kSwizzle, int kTrans>
struct Operand {
  static constexpr int kLine = kSwizzle ? kSwizzle : 16;
  static constexpr int kMnPerLine = kLine / 2;
  static constexpr int kStart = kSwizzle == 128 && !kTrans ? 64 : 0;  // the third 16 columns of a line
  int count;                                                          // of mn

  SIMT_DEV uint32_t bytes() const {
    return kTrans ? count * 2 * 16 : uint32_t(count * kLine * (kSwizzle ? 1 : 2));
  }
  // Between 8 k or 8 rows; of MN-major without swizzle between 8 of mn.
  SIMT_DEV uint32_t stride() const { return kSwizzle == 0 && kTrans ? 256 : kLine * 8; }
  SIMT_DEV uint32_t leading() const {
    if (kSwizzle == 0) return kTrans ? 128 : count * 16;  // between 8 k
    return kTrans ? kLine * 16 : 16;                      // between lines of the same k
  }
  SIMT_DEV uint32_t at(int mn, int k) const {
    if (kSwizzle == 0)
      return kTrans ? mn / 8 * 256 + k / 8 * 128 + k % 8 * 16 + mn % 8 * 2
                    : mn / 8 * 128 + mn % 8 * 16 + k / 8 * (count * 16) + k % 8 * 2;
    return simt::swizzled<kSwizzle>(kTrans ? mn / kMnPerLine * (kLine * 16) + k * kLine + mn % kMnPerLine * 2
                                           : mn * kLine + kStart + k * 2);
  }
  SIMT_DEV uint64_t descriptor(uint32_t smem) const {
    return simt::smem_desc<kSwizzle>(smem + kStart, leading(), stride());
  }
};

// in: a (64, 16) and b (16, N) as 16-bit words in pairs, c (64, N); out: a b + c. kRegisters: a from
// registers.
template <class T, int N, int kTransA, int kTransB, int kSwizzle, bool kRegisters>
SIMT_GLOBAL void wgmma_kernel(const uint32_t* in, uint32_t* out) {
  const Operand<kSwizzle, kTransA> a{64};
  const Operand<kSwizzle, kTransB> b{N};
  unsigned char* smem = simt::dyn_smem();
  const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  const uint32_t b_start = (a.bytes() + 1023) & ~1023u;
  const uint16_t* a_in = reinterpret_cast<const uint16_t*>(in);
  const uint16_t* b_in = a_in + 64 * 16;
  const uint32_t* c_in = in + (64 * 16 + 16 * N) / 2;
  for (uint32_t i = t; i < (b_start + b.bytes()) / 4; i += 128) words()[i] = ~0u;
  __syncthreads();
  for (int i = t; i < 64 * 16; i += 128) *reinterpret_cast<uint16_t*>(smem + a.at(i / 16, i % 16)) = a_in[i];
  for (int i = t; i < 16 * N; i += 128)
    *reinterpret_cast<uint16_t*>(smem + b_start + b.at(i % N, i / N)) = b_in[i];
  simt::fence_proxy_async();
  __syncthreads();
  float d[N / 2];
  SIMT_UNROLL
  for (int i = 0; i < N / 2; ++i)
    d[i] = simt::float_of_bits(c_in[(row + (i & 2) * 4) * N + i / 4 * 8 + column + (i & 1)]);
  const uint32_t start = simt::smem_addr(smem);
  simt::wgmma_pin(d);
  simt::wgmma_fence();
  if constexpr (kRegisters) {
    uint32_t r[4];
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) r[i] = in[((row + (i & 1) * 8) * 16 + column + (i & 2) * 4) / 2];
    simt::wgmma_fence();
    simt::wgmma_rs<T, N, kTransB>(d, r, b.descriptor(start + b_start), 1);
  } else {
    simt::wgmma_ss<T, N, kTransA, kTransB>(d, a.descriptor(start), b.descriptor(start + b_start), 1);
  }
  simt::wgmma_commit();
  simt::wgmma_wait<0>();
  simt::wgmma_pin(d);
  SIMT_UNROLL
  for (int i = 0; i < N / 2; ++i)
    out[(row + (i & 2) * 4) * N + i / 4 * 8 + column + (i & 1)] = simt::bits_of_float(d[i]);
}

#define WGMMA(name, ...)                                                                                    \
  static const Register register_##name(#name, [](const uint32_t* in, uint32_t* out, simt::Stream stream) { \
    simt::launch_kernel(wgmma_kernel<__VA_ARGS__>, dim3(1), dim3(128), 48 * 1024, stream, in, out);         \
  });
// Type, N, a and b MN-major, swizzle, a in registers.
WGMMA(wgmma_bf16_64_kk_128, bf16, 64, 0, 0, 128, false)
WGMMA(wgmma_bf16_64_km_128, bf16, 64, 0, 1, 128, false)
WGMMA(wgmma_bf16_64_mk_128, bf16, 64, 1, 0, 128, false)
WGMMA(wgmma_f16_64_mm_128, f16, 64, 1, 1, 128, false)
WGMMA(wgmma_f16_64_kk_64, f16, 64, 0, 0, 64, false)
WGMMA(wgmma_bf16_64_mm_64, bf16, 64, 1, 1, 64, false)
WGMMA(wgmma_bf16_64_kk_32, bf16, 64, 0, 0, 32, false)
WGMMA(wgmma_f16_64_mm_32, f16, 64, 1, 1, 32, false)
WGMMA(wgmma_bf16_64_kk_0, bf16, 64, 0, 0, 0, false)
WGMMA(wgmma_bf16_64_mm_0, bf16, 64, 1, 1, 0, false)
WGMMA(wgmma_bf16_16_kk_32, bf16, 16, 0, 0, 32, false)
WGMMA(wgmma_bf16_32_km_64, bf16, 32, 0, 1, 64, false)
WGMMA(wgmma_bf16_96_kk_128, bf16, 96, 0, 0, 128, false)
WGMMA(wgmma_bf16_128_km_128, bf16, 128, 0, 1, 128, false)
WGMMA(wgmma_bf16_160_kk_128, bf16, 160, 0, 0, 128, false)
WGMMA(wgmma_f16_192_km_128, f16, 192, 0, 1, 128, false)
WGMMA(wgmma_bf16_224_kk_128, bf16, 224, 0, 0, 128, false)
WGMMA(wgmma_bf16_256_km_128, bf16, 256, 0, 1, 128, false)
WGMMA(wgmma_registers_bf16_64_k_128, bf16, 64, 0, 0, 128, true)
WGMMA(wgmma_registers_f16_16_m_32, f16, 16, 0, 1, 32, true)
WGMMA(wgmma_registers_bf16_128_m_128, bf16, 128, 0, 1, 128, true)
WGMMA(wgmma_registers_f16_256_m_128, f16, 256, 0, 1, 128, true)
