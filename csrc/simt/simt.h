// What a kernel includes. The same source compiles with nvcc (sm_80 and later) and with g++ -DSIMT_HOST,
// where every CUDA thread of a block is a fiber. Kernels use dynamic shared memory only, no PTX of their own,
// __syncwarp where lanes exchange data, and never wait for another block.
#pragma once
#if defined(SIMT_HOST)
#include "simt/host/intrinsics.h"
#else
#include "simt/device.h"
#endif
#include "simt/mutant.h"
#include "simt/vector.h"
