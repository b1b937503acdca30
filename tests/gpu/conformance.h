// One small kernel for each intrinsic, run by the GPU and by the emulator on the same words; intrinsics.py
// states in numpy what each should do.
#pragma once
#include <cstdio>
#include <cstring>
#include <vector>

#include "simt/launch.h"

struct Intrinsic {
  const char* name;
  void (*launch)(const uint32_t* in, uint32_t* out, simt::Stream stream);
};

inline std::vector<Intrinsic>& intrinsics() {
  static std::vector<Intrinsic> all;
  return all;
}

struct Register {
  Register(const char* name, void (*launch)(const uint32_t*, uint32_t*, simt::Stream)) {
    intrinsics().push_back({name, launch});
  }
};

// INTRINSIC(name, threads, shared bytes) { body on `in` and `out` }
#define INTRINSIC(name, threads, smem)                                                                      \
  SIMT_GLOBAL void SIMT_BOUNDS(threads, 1) name##_kernel(const uint32_t* in, uint32_t* out);                \
  static const Register register_##name(#name, [](const uint32_t* in, uint32_t* out, simt::Stream stream) { \
    simt::launch_kernel(name##_kernel, dim3(1), dim3(threads), smem, stream, in, out);                      \
  });                                                                                                       \
  SIMT_GLOBAL void name##_kernel([[maybe_unused]] const uint32_t* in, [[maybe_unused]] uint32_t* out)
