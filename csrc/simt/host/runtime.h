// The emulator: runs a kernel on the CPU, one fiber a CUDA thread, one block after another, and reports what
// a GPU would get wrong. Built without sanitizers. Kernels reach it through intrinsics.h, tests through
// launch and control.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "simt/types.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace simt {
enum Schedule { kForward, kReverse, kRandom };

struct Config {
  int schedule = kForward;  // which warp and lane run first; random switches at every collective
  uint64_t seed = 1;
  bool race = true;  // order of shared memory accesses, uninitialised reads, colliding global stores
  int max_reports = 8;
};

struct Counters {
  uint64_t launches = 0, switches = 0, collectives = 0, bank_conflicts = 0, mutant_hits = 0;
};

struct Result {
  int errors = 0;
  std::string text;
  Counters counters;
};

namespace rt {
// What launch_kernel runs with, and what it has seen; set by control.cpp.
struct Emulator {
  Config config;
  uint64_t mutant = 0;
  Counters total;
};
Emulator& emulator();
bool planted(uint64_t mutant);

enum ShuffleKind { kIdx, kUp, kDown, kXor };
enum MmaKind { kMmaBf16, kMmaF16, kMmaTf32 };

dim3 tid();
dim3 bid();
dim3 bdim();
dim3 gdim();
unsigned char* smem();
uint32_t smem_offset(const void* p);
void barrier(int id, int threads, bool wait);  // threads < 0: all that live, as __syncthreads
void syncwarp(uint32_t mask);
uint64_t shuffle(int kind, uint32_t mask, uint64_t bits, int lane, int width);
uint32_t ballot(uint32_t mask, bool pred);
void ldmatrix(uint32_t* r, int matrices, bool trans, uint32_t addr);
void mma(int kind, float* d, const uint32_t* a, const uint32_t* b);
void cp_async(uint32_t dst, const void* src, int bytes, int source_bytes);
void cp_commit();
void cp_wait(int keep);
void load_vector(void* out, const void* p, int bytes);
void store_vector(void* p, const void* in, int bytes);
float atomic_add(float* p, float v);
int atomic_add(int* p, int v);
unsigned atomic_add(unsigned* p, unsigned v);

Result launch(const Config&, dim3 grid, dim3 block, size_t smem, void (*run)(void*), void* params,
              size_t param_bytes);
}  // namespace rt

// Global memory a kernel may touch, in this thread's launches: the elements of a strided tensor, no byte
// between them.
void add_buffer(const char* name, const void* p, int item_bytes, int ndim, const int64_t* size,
                const int64_t* stride, bool writable);
void clear_buffers();

// The same with memory of its own: full of NaN, its end against an unmapped page.
void* guarded_alloc(const char* name, size_t bytes, bool writable);
void guarded_free(void* p);

template <class Kernel, class... Params>
Result launch(const Config& config, dim3 grid, dim3 block, size_t smem, Kernel kernel, Params... params) {
  auto body = [=] { kernel(params...); };
  return rt::launch(
      config, grid, block, smem, [](void* p) { (*static_cast<decltype(body)*>(p))(); }, &body, sizeof body);
}
}  // namespace simt
