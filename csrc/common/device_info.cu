#include <cuda_runtime.h>

#include "common/check.h"
#include "common/device_info.h"

namespace echo {
namespace {
// Never launched: the runtime finds an image of it for the current device exactly if it finds one of every
// kernel.
__global__ void probe_kernel() {}
}  // namespace

std::string driver_error() {
  int devices = 0;
  cudaError_t err = cudaGetDeviceCount(&devices);
  if (err == cudaSuccess) {
    cudaFuncAttributes attributes;
    err = cudaFuncGetAttributes(&attributes, probe_kernel);
  }
  if (err == cudaSuccess) return "";
  (void)cudaGetLastError();  // the caller got the reason; the next launch must not get it again
  return cudaGetErrorString(err);
}

std::vector<std::string> device_info() {
  int devices = 0;
  ECHO_CUDA_CHECK(cudaGetDeviceCount(&devices));
  std::vector<std::string> lines;
  for (int i = 0; i < devices; ++i) {
    cudaDeviceProp prop;
    ECHO_CUDA_CHECK(cudaGetDeviceProperties(&prop, i));
    lines.push_back(
        concat(prop.name, ", sm_", prop.major, prop.minor, ", ", prop.totalGlobalMem >> 30, " GiB"));
  }
  return lines;
}
}  // namespace echo
