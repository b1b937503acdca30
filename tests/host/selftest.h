// A case of the emulator's self-test: a kernel whose reports the Python side knows.
#pragma once
#include <cstdio>
#include <cstring>
#include <vector>

#include "simt/host/runtime.h"

struct Case {
  const char* name;
  simt::Result (*run)(const simt::Config&);
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, simt::Result (*run)(const simt::Config&)) { cases().push_back({name, run}); }
};

// Adds a report where a kernel that had none left a difference from the truth.
inline void wrong(simt::Result& result, const float* out, int count = 4096) {
  for (int i = 0; i < count && !result.errors; ++i)
    if (!(out[i] == 0.f)) {
      result.errors = 1;
      result.text = "wrong by " + std::to_string(out[i]) + " at " + std::to_string(i);
    }
}

// CASE(name, threads, shared bytes, kernel, arguments...): the kernel takes `float* out` of 4096 floats
// first.
#define CASE(name, threads, smem, kernel, ...)                                                \
  static simt::Result run_##name(const simt::Config& config) {                                \
    float* out = static_cast<float*>(simt::guarded_alloc("out", 4096 * sizeof(float), true)); \
    const simt::Result result =                                                               \
        simt::launch(config, dim3(1), dim3(threads), smem, kernel, out, ##__VA_ARGS__);       \
    simt::guarded_free(out);                                                                  \
    return result;                                                                            \
  }                                                                                           \
  static const Register register_##name(#name, run_##name);
