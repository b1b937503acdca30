// One way to launch a kernel. nvcc: on the caller's device and stream. g++: in the emulator, as it is
// configured.
#pragma once
#include "common/check.h"
#include "simt/simt.h"
#include "simt/stream.h"

namespace simt {
#if defined(SIMT_HOST)
template <class... Params, class... Args>
void launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, Stream,
                   Args&&... args) {
  if (!grid.x || !grid.y || !grid.z) return;
  rt::Emulator& emulator = rt::emulator();
  const Result result = launch(emulator.config, grid, block, smem_bytes, kernel, Params(args)...);
  emulator.total.launches++;
  emulator.total.switches += result.counters.switches;
  emulator.total.collectives += result.counters.collectives;
  emulator.total.bank_conflicts += result.counters.bank_conflicts;
  if (result.errors) throw std::runtime_error(result.text);
}
#else
// Makes the stream's device current for a scope, and its primary context with it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    ECHO_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_) ECHO_CUDA_CHECK(cudaSetDevice(device));
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// An empty grid launches nothing.
template <class... Params, class... Args>
void launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, Stream stream,
                   Args&&... args) {
  if (!grid.x || !grid.y || !grid.z) return;
  const DeviceGuard guard(stream.device);
  if (smem_bytes > 48 * 1024)  // what a kernel may use without asking
    ECHO_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem_bytes)));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  ECHO_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}
#endif
}  // namespace simt
