// Kernels with and without the mistakes that the emulator must report: warps, barriers, memory, cp.async.
#include "selftest.h"

#include "simt/simt.h"

static float* shared() { return reinterpret_cast<float*>(simt::dyn_smem()); }

static void exchange(float* out, bool sync) {
  const int t = threadIdx.x;
  shared()[t] = float(t);
  if (sync) __syncwarp();
  const float v = shared()[t ^ 1];
  if (sync) __syncwarp();
  shared()[t] = v;
  out[t] = v;
}
CASE(warp_exchange, 128, 512, exchange, true)
CASE(warp_exchange_without_syncwarp, 128, 512, exchange, false)

static void histogram(float* out, bool atomic) {
  int* bins = reinterpret_cast<int*>(simt::dyn_smem());
  const int t = threadIdx.x;
  if (t < 8) bins[t] = 0;
  __syncthreads();
  if (atomic)
    atomicAdd(&bins[t & 7], 1);
  else
    bins[t & 7] += 1;
  __syncthreads();
  if (t < 8) out[t] = float(bins[t]);
}
CASE(atomic_histogram, 128, 512, histogram, true)
CASE(plain_histogram, 128, 512, histogram, false)

// Warps 0 and 1 fill, 2 and 3 read; barrier 1 says full, 2 says empty.
static void pipeline(float* out, bool wait_for_empty) {
  const int t = threadIdx.x;
  for (int i = 0; i < 4; ++i)
    if (t < 64) {
      if (i && wait_for_empty) simt::bar_sync(2, 128);
      shared()[t] = float(i * 100 + t);
      simt::bar_arrive(1, 128);
    } else {
      simt::bar_sync(1, 128);
      out[t - 64] = shared()[t - 64];
      if (i < 3 && wait_for_empty) simt::bar_arrive(2, 128);
    }
}
CASE(named_barrier_pipeline, 128, 512, pipeline, true)
CASE(pipeline_that_does_not_wait_for_empty, 128, 512, pipeline, false)

static void store(float* out, int threads_each) { out[threadIdx.x / threads_each] = 1.f; }
CASE(one_store_each, 128, 0, store, 1)
CASE(two_threads_store_to_one_place, 128, 0, store, 2)

static void pass_on(float* out, bool write_first) {
  const int b = blockIdx.x;
  out[b] = 1.f;
  if (b) out[8] = out[write_first ? b : b - 1];
}
static simt::Result blocks(const simt::Config& config, bool own) {
  float* out = static_cast<float*>(simt::guarded_alloc("out", 64, true));
  const simt::Result result = simt::launch(config, dim3(2), dim3(1), 0, pass_on, out, own);
  simt::guarded_free(out);
  return result;
}
static const Register own_store("a_block_reads_what_it_stored",
                                [](const simt::Config& c) { return blocks(c, true); });
static const Register other_store("a_block_reads_what_another_stored",
                                  [](const simt::Config& c) { return blocks(c, false); });

static void early_exit(float* out) {
  const int t = threadIdx.x;
  if (t >= 100) return;
  shared()[t] = float(t);
  __syncthreads();
  out[t] = shared()[99 - t];
}
CASE(threads_may_exit_before_a_barrier, 128, 512, early_exit)

static void split_barrier(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    simt::bar_sync(1, 128);
  out[threadIdx.x] = 1.f;
}
CASE(warps_at_different_barriers, 128, 512, split_barrier)

static void read_ahead(float* out) {
  out[threadIdx.x] = shared()[threadIdx.x + 1];
  if (threadIdx.x == 0) shared()[0] = 1.f;
}
CASE(uninitialised_shared_memory, 128, 1024, read_ahead)

static void shared_store(float* out, int offset) {
  shared()[int(threadIdx.x) + offset] = 1.f;
  out[threadIdx.x] = 1.f;
}
CASE(shared_store_inside, 128, 512, shared_store, 0)
CASE(shared_store_past_the_end, 128, 512, shared_store, 1)

static void global_load(float* out, int offset) {
  out[threadIdx.x] = 1.f;
  shared()[threadIdx.x] = out[4096 - 128 + int(threadIdx.x) + offset];
}
CASE(global_load_inside, 128, 512, global_load, 0)
CASE(global_load_past_the_end, 128, 512, global_load, 1)

static void misaligned(float* out, int offset) {
  const uint4 v = simt::load16(out + 4 * threadIdx.x + offset);
  simt::store16(out + 1024 + 4 * threadIdx.x, v);
}
CASE(aligned_vectors, 128, 0, misaligned, 0)
CASE(misaligned_vector, 128, 0, misaligned, 1)

static void peek(float* out) {
  float mine[4] = {0.f, 1.f, 2.f, 3.f};
  float** slot = reinterpret_cast<float**>(simt::dyn_smem());
  if (threadIdx.x == 0) *slot = mine;
  __syncthreads();
  out[threadIdx.x] = (*slot)[threadIdx.x & 3];
}
CASE(local_memory_of_another_thread, 128, 512, peek)

static void halves(float* out, bool cross) {
  const int t = threadIdx.x;
  float v = float(t);
  if ((t & 31) < 16)
    v = __shfl_xor_sync(0xffffu, v, cross ? 16 : 1);
  else if (!cross)
    v = __shfl_xor_sync(0xffff0000u, v, 2);
  out[t] = v;
}
CASE(shuffles_of_half_warps, 128, 0, halves, false)
CASE(shuffle_from_a_lane_outside_the_mask, 128, 0, halves, true)

static void divergent(float* out) {
  float v = float(threadIdx.x);
  if ((threadIdx.x & 31) < 16) v += __shfl_xor_sync(~0u, v, 1);
  out[threadIdx.x] = v;
}
CASE(shuffle_in_a_divergent_branch, 128, 0, divergent)

// One thread copies; barrier orders the block's reads of what it copied.
static void copy(float* out, int mistake) {
  const int t = threadIdx.x;
  simt::cp_async16(simt::smem_addr(shared() + 4 * t), out + 4 * t);
  simt::cp_async_commit();
  if (mistake != 1) simt::cp_async_wait<0>();
  if (mistake != 2) __syncthreads();
  if (mistake != 3) out[2048 + t] = shared()[4 * (127 - t)];
  if (mistake == 1) simt::cp_async_wait<0>();
}
CASE(cp_async, 128, 2048, copy, 0)
CASE(cp_async_read_before_the_wait, 128, 2048, copy, 1)
CASE(cp_async_without_barrier, 128, 2048, copy, 2)

static void forgotten_copy(float* out) {
  simt::cp_async16(simt::smem_addr(shared() + 4 * threadIdx.x), out + 4 * threadIdx.x);
  simt::cp_async_commit();
}
CASE(cp_async_never_waited_for, 128, 2048, forgotten_copy)

static void conflicts(float* out, int row_bytes) {
  const int t = threadIdx.x;
  for (int i = t; i < 32 * row_bytes / 4; i += 32) shared()[i] = 0.f;
  __syncwarp();
  uint32_t r[4];
  simt::ldmatrix_x4(r, simt::smem_addr(simt::dyn_smem()) + uint32_t(t * row_bytes));
  out[t] = float(r[0]);
}
CASE(ldmatrix_without_bank_conflicts, 32, 32 * 144, conflicts, 144)
CASE(ldmatrix_with_bank_conflicts, 32, 32 * 128, conflicts, 128)

// Two tensors with gaps: rows of 8 floats, 16 apart.
static void touch_row(float* p, int column, bool write) {
  if (write)
    p[threadIdx.x * 16 + column] = 1.f;
  else
    shared()[threadIdx.x] = p[threadIdx.x * 16 + column];
}

static simt::Result strided(const simt::Config& config, int column, bool write, bool writable) {
  std::vector<float> memory(4 * 16);
  const int64_t size[2] = {4, 8}, stride[2] = {16, 1};
  simt::add_buffer("rows", memory.data(), 4, 2, size, stride, writable);
  const simt::Result result =
      simt::launch(config, dim3(1), dim3(3), 64, touch_row, memory.data(), column, write);
  simt::clear_buffers();
  return result;
}
static const Register strided_inside("strided_tensor_inside",
                                     [](const simt::Config& c) { return strided(c, 7, true, true); });
static const Register strided_gap("between_the_elements_of_a_tensor",
                                  [](const simt::Config& c) { return strided(c, 8, false, true); });
static const Register read_only("store_to_an_input",
                                [](const simt::Config& c) { return strided(c, 0, true, false); });

extern "C" __attribute__((visibility("default"))) int selftest_run(const char* name, int schedule,
                                                                   uint64_t seed, char* text, int capacity,
                                                                   uint64_t* conflicts) {
  simt::Config config;
  config.schedule = schedule;
  config.seed = seed;
  for (const Case& c : cases())
    if (!std::strcmp(c.name, name)) {
      const simt::Result result = c.run(config);
      std::snprintf(text, size_t(capacity), "%s", result.text.c_str());
      *conflicts = result.counters.bank_conflicts;
      return result.errors;
    }
  return -1;
}

extern "C" __attribute__((visibility("default"))) const char* selftest_name(int i) {
  return i < int(cases().size()) ? cases()[size_t(i)].name : nullptr;
}
