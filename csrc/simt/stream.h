// Where a launch goes; known to files that know no CUDA.
#pragma once

namespace simt {
struct Stream {
  int device = 0;
  void* handle = nullptr;  // cudaStream_t
};
}  // namespace simt
