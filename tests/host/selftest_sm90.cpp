// The same for Hopper: mbarriers, TMA, wgmma and the fences between them. Each kernel multiplies or moves
// small matrices and writes what differs from the truth, so that a wrong number is a report of the Python
// side.
#include "selftest.h"
#include "simt/simt_sm90.h"
#include "simt/tensor_map.h"

using simt::bf16;

enum Mistake {
  kNone,
  kNoProxyFence,
  kNoWgmmaFence,
  kNoWait,
  kWaitOneTooFew,
  kNoFullWait,
  kNoEmptyWait,
  kWrongBytes,
  kEarlyRelease,
  kNoInitFence,
  kWrongStride,
  kNoStoreWait,
  kNoStoreFence,
  kSecondGroupUnfenced,
};

static float value(int row, int column) { return float((row * 7 + column * 3) % 16) - 8.f; }

// A and B written by ordinary stores, one wgmma: B is the identity, so d is A.
static void generic_to_wgmma(float* out, Mistake mistake) {
  unsigned char* smem = simt::dyn_smem();
  const int t = threadIdx.x;
  const uint32_t a = simt::smem_addr(smem), b = a + 64 * 128;
  for (int i = t; i < 64 * 64; i += 128) {
    const uint32_t offset = simt::swizzled<128>(uint32_t(i / 64 * 128 + i % 64 * 2));
    *reinterpret_cast<uint16_t*>(smem + offset) = simt::bf16_bits(value(i / 64, i % 64));
    *reinterpret_cast<uint16_t*>(smem + 64 * 128 + offset) = simt::bf16_bits(i / 64 == i % 64);
  }
  if (mistake != kNoProxyFence) simt::fence_proxy_async();
  __syncthreads();
  float d[32];
  for (float& x : d) x = 0.f;
  if (mistake != kNoWgmmaFence) simt::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    simt::wgmma_ss<bf16, 64, 0, 0>(d, simt::smem_desc<128>(a + k * 32, 16, 1024),
                                   simt::smem_desc<128>(b + k * 32, 16, 1024), k > 0);
    if (k == 1) {
      simt::wgmma_commit();
      if (mistake != kSecondGroupUnfenced) simt::wgmma_fence();
    }
  }
  simt::wgmma_commit();
  if (mistake != kNoWait) simt::wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + (i & 2) * 4, column = i / 4 * 8 + t % 4 * 2 + (i & 1);
    out[t * 32 + i] = d[i] - value(row, column);
  }
  if (mistake == kNoWait) simt::wgmma_wait<0>();
}
static simt::Result run_wgmma(const simt::Config& config, Mistake mistake) {
  float* out = static_cast<float*>(simt::guarded_alloc("out", 4096 * sizeof(float), true));
  simt::Result result =
      simt::launch(config, dim3(1), dim3(128), 2 * 64 * 128, generic_to_wgmma, out, mistake);
  wrong(result, out);
  simt::guarded_free(out);
  return result;
}
#define WGMMA(name, mistake) \
  static const Register register_##name(#name, [](const simt::Config& c) { return run_wgmma(c, mistake); });
WGMMA(wgmma, kNone)
WGMMA(wgmma_without_proxy_fence, kNoProxyFence)
WGMMA(wgmma_without_fence, kNoWgmmaFence)
WGMMA(second_group_without_fence, kSecondGroupUnfenced)
WGMMA(wgmma_read_before_the_wait, kNoWait)

// C (64 x 64) = A (64 x K) B (64 x K)^T: one warp loads by TMA, a warpgroup multiplies, two stages.
static constexpr int kStages = 2, kTile = 64 * 128, kDepth = 200, kSteps = (kDepth + 63) / 64;

static void gemm(float* out, simt::TensorMap map_a, simt::TensorMap map_b, Mistake mistake) {
  const uint32_t smem = simt::smem_addr(simt::dyn_smem()), full = smem + kStages * 2 * kTile,
                 empty = full + 8 * kStages;
  const int t = threadIdx.x;
  if (t == 0) {
    for (int s = 0; s < kStages; ++s) {
      simt::mbar_init(full + 8 * s, 1);
      simt::mbar_init(empty + 8 * s, 4);
    }
    if (mistake != kNoInitFence) simt::mbar_fence_init();
  }
  __syncthreads();
  if (t >= 128) {
    if (!simt::elect_one()) return;
    for (int i = 0; i < kSteps; ++i) {
      const int stage = i % kStages, parity = i / kStages & 1;
      const uint32_t tile = smem + stage * 2 * kTile;
      if (mistake != kNoEmptyWait) simt::mbar_wait(empty + 8 * stage, parity ^ 1);
      simt::mbar_arrive_tx(full + 8 * stage, mistake == kWrongBytes ? kTile : 2 * kTile);
      simt::tma_load_2d(tile, &map_a, full + 8 * stage, i * 64, 0);
      simt::tma_load_2d(tile + kTile, &map_b, full + 8 * stage, i * 64, 0);
    }
    return;
  }
  float d[32];
  for (float& x : d) x = 0.f;
  for (int i = 0; i < kSteps; ++i) {
    const int stage = i % kStages, parity = i / kStages & 1;
    const uint32_t a = smem + stage * 2 * kTile, b = a + kTile;
    if (mistake != kNoFullWait) simt::mbar_wait(full + 8 * stage, parity);
    simt::wgmma_fence();
    for (int k = 0; k < 4; ++k)
      simt::wgmma_ss<bf16, 64, 0, 0>(
          d, simt::smem_desc<128>(a + k * 32, 16, mistake == kWrongStride ? 512 : 1024),
          simt::smem_desc<128>(b + k * 32, 16, 1024), 1);
    simt::wgmma_commit();
    if (mistake == kEarlyRelease && t % 32 == 0) simt::mbar_arrive(empty + 8 * stage);
    if (mistake == kWaitOneTooFew)
      simt::wgmma_wait<1>();
    else
      simt::wgmma_wait<0>();
    if (mistake != kEarlyRelease && t % 32 == 0) simt::mbar_arrive(empty + 8 * stage);
  }
  for (int i = 0; i < 32; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + (i & 2) * 4, column = i / 4 * 8 + t % 4 * 2 + (i & 1);
    float sum = 0.f;
    for (int k = 0; k < kDepth; ++k) sum += value(row, k) * value(column + 1, k);
    out[t * 32 + i] = d[i] - sum;
  }
}

static simt::Result run_gemm(const simt::Config& config, Mistake mistake) {
  float* out = static_cast<float*>(simt::guarded_alloc("out", 4096 * sizeof(float), true));
  uint16_t* operands[2];
  for (int m = 0; m < 2; ++m) {
    operands[m] = static_cast<uint16_t*>(simt::guarded_alloc(m ? "b" : "a", 64 * kDepth * 2, false));
    for (int i = 0; i < 64 * kDepth; ++i) operands[m][i] = simt::bf16_bits(value(i / kDepth + m, i % kDepth));
  }
  const auto map = [&](int m) {
    return simt::tensor_map<bf16>(operands[m], {{kDepth, 1, 64}, {64, kDepth, 64}}, 128);
  };
  simt::Result result = simt::launch(config, dim3(1), dim3(160), kStages * 2 * kTile + 16 * kStages, gemm,
                                     out, map(0), map(1), mistake);
  wrong(result, out);
  for (void* p : {static_cast<void*>(out), static_cast<void*>(operands[0]), static_cast<void*>(operands[1])})
    simt::guarded_free(p);
  return result;
}
#define GEMM(name, mistake) \
  static const Register register_##name(#name, [](const simt::Config& c) { return run_gemm(c, mistake); });
GEMM(tma_gemm, kNone)
GEMM(tma_without_full_wait, kNoFullWait)
GEMM(tma_without_empty_wait, kNoEmptyWait)
GEMM(tma_expecting_too_few_bytes, kWrongBytes)
GEMM(stage_released_before_the_wait, kEarlyRelease)
GEMM(wgmma_waited_for_one_group_too_few, kWaitOneTooFew)
GEMM(descriptor_with_a_wrong_stride, kWrongStride)
GEMM(mbarrier_without_init_fence, kNoInitFence)

// Two tiles through one buffer to a 4-D tensor, cut off at its end.
static void store_tiles(float* out, simt::TensorMap map, Mistake mistake) {
  float* tile = reinterpret_cast<float*>(simt::dyn_smem());
  const int t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    for (int e = t; e < 8 * 4; e += 32) tile[e] = float(i * 100 + e);
    if (mistake != kNoStoreFence) simt::fence_proxy_async();
    __syncwarp();
    if (t == 0) {
      simt::tma_store_4d(&map, simt::smem_addr(tile), 4 * i, 0, 1, 1);
      simt::tma_store_commit();
      if (mistake != kNoStoreWait || i == 1) simt::tma_store_wait_read<0>();
    }
    __syncwarp();
  }
  (void)out;
}

static simt::Result run_store(const simt::Config& config, Mistake mistake) {
  // (2, 2, 3, 7) floats with rows of 8: boxes of 4 x 8 rows reach past both the row and the 3 rows.
  float* out = static_cast<float*>(simt::guarded_alloc("out", 2 * 2 * 3 * 8 * sizeof(float), true));
  const simt::TensorMap map = simt::tensor_map<float>(out, {{7, 1, 4}, {3, 8, 8}, {2, 24, 1}, {2, 48, 1}}, 0);
  for (int i = 0; i < 96; ++i) out[i] = -1.f;
  simt::Result result = simt::launch(config, dim3(1), dim3(32), 128, store_tiles, out, map, mistake);
  for (int i = 0; i < 96; ++i) {
    const int row = i / 8 - 9, column = i % 8;
    out[i] -= row < 0 || column == 7 ? -1.f : float(column / 4 * 100 + row * 4 + column % 4);
  }
  wrong(result, out, 96);
  simt::guarded_free(out);
  return result;
}
#define STORE(name, mistake) \
  static const Register register_##name(#name, [](const simt::Config& c) { return run_store(c, mistake); });
STORE(tma_store, kNone)
STORE(tma_store_without_proxy_fence, kNoStoreFence)
STORE(tma_store_whose_buffer_is_reused_too_early, kNoStoreWait)
