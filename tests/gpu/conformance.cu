// The intrinsics of sm_80, and the entry point that Python calls.
#include "conformance.h"

using simt::bf16;
using simt::f16;
using simt::float_of_bits;

SIMT_DEV uint32_t* words() { return reinterpret_cast<uint32_t*>(simt::dyn_smem()); }

INTRINSIC(vector16, 32, 0) {
  const int t = threadIdx.x;
  simt::store16(out + 4 * (31 - t), simt::load16(in + 4 * t));
}

// Rows of 16 bytes, named to the matrices in an order of their own.
SIMT_DEV uint32_t fill_rows(const uint32_t* in) {
  const int t = threadIdx.x;
  for (int i = 0; i < 4; ++i) words()[4 * t + i] = in[4 * t + i];
  __syncwarp();
  return simt::smem_addr(words()) + 16 * (t * 5 % 32);
}

INTRINSIC(ldmatrix_x4, 32, 512) {
  uint32_t r[4];
  simt::ldmatrix_x4(r, fill_rows(in));
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

INTRINSIC(ldmatrix_x4_trans, 32, 512) {
  uint32_t r[4];
  simt::ldmatrix_x4_trans(r, fill_rows(in));
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

// Each lane's a, b and c, as the fragments lie.
template <class Multiply>
SIMT_DEV void multiply(const uint32_t* in, uint32_t* out, Multiply mma) {
  const uint32_t* mine = in + 10 * threadIdx.x;
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = float_of_bits(mine[6 + i]);
  mma(d, a, mine[4], mine[5]);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = simt::bits_of_float(d[i]);
}

struct MmaBf16 {
  SIMT_DEV void operator()(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    simt::mma_bf16_16816(d, a, b0, b1);
  }
};
struct MmaF16 {
  SIMT_DEV void operator()(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    simt::mma_f16_16816(d, a, b0, b1);
  }
};
struct MmaTf32 {
  SIMT_DEV void operator()(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    simt::mma_tf32_1688(d, a, b0, b1);
  }
};
INTRINSIC(mma_bf16_16816, 32, 0) { multiply(in, out, MmaBf16()); }
INTRINSIC(mma_f16_16816, 32, 0) { multiply(in, out, MmaF16()); }
INTRINSIC(mma_tf32_1688, 32, 0) { multiply(in, out, MmaTf32()); }

INTRINSIC(round_tf32, 128, 0) { out[threadIdx.x] = simt::round_tf32(float_of_bits(in[threadIdx.x])); }
INTRINSIC(bf16_bits, 128, 0) { out[threadIdx.x] = simt::bf16_bits(float_of_bits(in[threadIdx.x])); }
INTRINSIC(f16_bits, 128, 0) { out[threadIdx.x] = simt::f16_bits(float_of_bits(in[threadIdx.x])); }
INTRINSIC(bf16_value, 128, 0) {
  out[threadIdx.x] = simt::bits_of_float(simt::bf16_value(uint16_t(in[threadIdx.x])));
}
INTRINSIC(f16_value, 128, 0) {
  out[threadIdx.x] = simt::bits_of_float(simt::f16_value(uint16_t(in[threadIdx.x])));
}
INTRINSIC(pack_bf16, 64, 0) {
  out[threadIdx.x] =
      simt::pack_bf16(float_of_bits(in[2 * threadIdx.x]), float_of_bits(in[2 * threadIdx.x + 1]));
}
INTRINSIC(pack_f16, 64, 0) {
  out[threadIdx.x] =
      simt::pack_f16(float_of_bits(in[2 * threadIdx.x]), float_of_bits(in[2 * threadIdx.x + 1]));
}
INTRINSIC(ex2, 128, 0) { out[threadIdx.x] = simt::bits_of_float(simt::ex2(float_of_bits(in[threadIdx.x]))); }

// 8 values a lane, read and written by vectors and, one value further, one by one.
template <class T>
SIMT_DEV void round_trip(const uint32_t* in, uint32_t* out) {
  const T* from = reinterpret_cast<const T*>(in) + 8 * threadIdx.x;
  T* to = reinterpret_cast<T*>(out) + 8 * threadIdx.x;
  float v[8], odd[3];
  simt::load_floats(v, from);
  simt::load_floats(odd, from + 1);
  for (float& x : v) x *= 2.f;
  v[1] += odd[0];
  simt::store_floats(to, v);
  const float last[3] = {odd[0], odd[1], odd[2]};
  simt::store_floats(to + 5, last);
}
INTRINSIC(floats_f32, 32, 0) { round_trip<float>(in, out); }
INTRINSIC(floats_f16, 32, 0) { round_trip<f16>(in, out); }
INTRINSIC(floats_bf16, 32, 0) { round_trip<bf16>(in, out); }

INTRINSIC(shuffles, 32, 0) {
  const int t = threadIdx.x;
  const uint32_t v = in[t];
  out[t] = __shfl_sync(~0u, v, t * 7);
  out[32 + t] = __shfl_up_sync(~0u, v, 3);
  out[64 + t] = __shfl_down_sync(~0u, v, 5);
  out[96 + t] = __shfl_xor_sync(~0u, v, 9);
  out[128 + t] = __shfl_sync(~0u, v, t * 3, 8);
  out[160 + t] = __shfl_up_sync(~0u, v, 1, 4);
  out[192 + t] = __shfl_down_sync(~0u, v, 2, 16);
}

INTRINSIC(ballot, 32, 0) { out[threadIdx.x] = __ballot_sync(~0u, in[threadIdx.x] & 1); }

INTRINSIC(atomic_add, 128, 64) {
  const int t = threadIdx.x;
  if (t < 8) words()[t] = 0;
  __syncthreads();
  atomicAdd(&words()[t & 7], in[t]);
  __syncthreads();
  if (t < 8) out[t] = words()[t];
}

// Two groups: the first is complete while the second is on its way; a third of the copies write zeros.
INTRINSIC(cp_async16, 32, 1024) {
  const int t = threadIdx.x;
  const uint32_t smem = simt::smem_addr(words());
  simt::cp_async16(smem + 16 * t, in + 4 * t, t % 3 != 0);
  simt::cp_async_commit();
  simt::cp_async16(smem + 512 + 16 * t, in + 128 + 4 * t);
  simt::cp_async_commit();
  simt::cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = words()[4 * t + i];
  simt::cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[128 + 4 * t + i] = words()[128 + 4 * (31 - t) + i];
}

// Warps 0 and 1 produce what 2 and 3 consume, four times through one buffer.
INTRINSIC(named_barriers, 128, 256) {
  const int t = threadIdx.x;
  for (int i = 0; i < 4; ++i)
    if (t < 64) {
      if (i) simt::bar_sync(2, 128);
      words()[t] = in[64 * i + t];
      simt::bar_arrive(1, 128);
    } else {
      simt::bar_sync(1, 128);
      out[64 * i + t - 64] = words()[127 - t];
      if (i < 3) simt::bar_arrive(2, 128);
    }
}

INTRINSIC(syncwarp, 32, 128) {
  words()[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = words()[31 - threadIdx.x];
}

extern "C" __attribute__((visibility("default"))) const char* conformance_name(int i) {
  return i < int(intrinsics().size()) ? intrinsics()[size_t(i)].name : nullptr;
}

#if defined(SIMT_HOST)
static void run(const Intrinsic& intrinsic, const uint32_t* in, int64_t in_words, uint32_t* out,
                int64_t out_words) {
  const int64_t stride = 1;
  simt::add_buffer("in", in, 4, 1, &in_words, &stride, false);
  simt::add_buffer("out", out, 4, 1, &out_words, &stride, true);
  struct Clear {
    ~Clear() { simt::clear_buffers(); }
  } clear;
  intrinsic.launch(in, out, simt::Stream());
}
#else
static void run(const Intrinsic& intrinsic, const uint32_t* in, int64_t in_words, uint32_t* out,
                int64_t out_words) {
  uint32_t* device = nullptr;  // out starts at a multiple of 256 bytes, for TMA
  const int64_t start = (in_words + 63) / 64 * 64;
  ECHO_CUDA_CHECK(cudaMalloc(&device, size_t(start + out_words) * 4));
  struct Free {
    uint32_t* p;
    ~Free() { (void)cudaFree(p); }
  } free{device};
  ECHO_CUDA_CHECK(cudaMemcpy(device, in, size_t(in_words) * 4, cudaMemcpyHostToDevice));
  ECHO_CUDA_CHECK(cudaMemcpy(device + start, out, size_t(out_words) * 4, cudaMemcpyHostToDevice));
  intrinsic.launch(device, device + start, simt::Stream());
  ECHO_CUDA_CHECK(cudaMemcpy(out, device + start, size_t(out_words) * 4, cudaMemcpyDeviceToHost));
}
#endif

// 0, or -1 and the error. `out` is what the kernel finds there, and then what it leaves.
extern "C" __attribute__((visibility("default"))) int conformance_run(const char* name, const uint32_t* in,
                                                                      int64_t in_words, uint32_t* out,
                                                                      int64_t out_words, char* error,
                                                                      int capacity) {
  try {
    for (const Intrinsic& intrinsic : intrinsics())
      if (!std::strcmp(intrinsic.name, name)) {
        run(intrinsic, in, in_words, out, out_words);
        return 0;
      }
    std::snprintf(error, size_t(capacity), "no kernel is named %s", name);
  } catch (const std::exception& e) {
    std::snprintf(error, size_t(capacity), "%s", e.what());
  }
  return -1;
}
