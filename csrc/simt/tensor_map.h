// Describes a tensor to TMA, on the host. nvcc: the driver's encoder, found at run time so that nothing links
// libcuda.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "common/check.h"
#include "simt/simt_sm90.h"

namespace simt {
struct TensorAxis {
  int64_t size;
  int64_t stride;  // in elements; 1 for the first axis
  int box;         // elements of one load or store
};

#if !defined(SIMT_HOST)
template <class T>
struct TensorMapType;
template <>
struct TensorMapType<float> {
  static constexpr CUtensorMapDataType value = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
};
template <>
struct TensorMapType<f16> {
  static constexpr CUtensorMapDataType value = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
};
template <>
struct TensorMapType<bf16> {
  static constexpr CUtensorMapDataType value = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
};
#endif

// The axes innermost first, 2 to 5. swizzle: bytes of a line in shared memory, which the first box fills; 0
// for none.
template <class T>
TensorMap tensor_map(const void* base, std::initializer_list<TensorAxis> axes, int swizzle) {
  const int rank = int(axes.size());
  const TensorAxis* axis = axes.begin();
  ECHO_CHECK(rank >= 2 && rank <= 5, "a tensor map has 2 to 5 axes, got ", rank);
  ECHO_CHECK(uintptr_t(base) % 16 == 0 && axis[0].stride == 1,
             "TMA needs 16-byte aligned tensors, dense in axis 0");
  ECHO_CHECK(swizzle == 0 || swizzle == 32 || swizzle == 64 || swizzle == 128, "no such swizzle: ", swizzle);
  const int64_t line = axis[0].box * int64_t(sizeof(T));
  ECHO_CHECK(swizzle ? line == swizzle : line % 16 == 0, "a box has lines of ", line,
             " bytes for a swizzle of ", swizzle);
  for (int i = 0; i < rank; ++i) {
    ECHO_CHECK(axis[i].size > 0 && axis[i].size <= UINT32_MAX && axis[i].box > 0 && axis[i].box <= 256,
               "axis ", i, " has size ", axis[i].size, " and box ", axis[i].box);
    ECHO_CHECK(i == 0 || axis[i].stride * int64_t(sizeof(T)) % 16 == 0, "axis ", i, " has a stride of ",
               axis[i].stride, ", not a multiple of 16 bytes");
  }
#if defined(SIMT_HOST)
  TensorMap map = {};
  map.base = static_cast<const char*>(base);
  map.rank = rank;
  map.item_bytes = int(sizeof(T));
  map.swizzle = swizzle;
  for (int i = 0; i < 5; ++i) map.box[i] = 1;
  for (int i = 0; i < rank; ++i) {
    map.size[i] = axis[i].size;
    map.stride[i] = axis[i].stride * int64_t(sizeof(T));
    map.box[i] = axis[i].box;
  }
  return map;
#else
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    ECHO_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                     cudaEnableDefault, &status));
#else
    ECHO_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status));
#endif
    if (status != cudaDriverEntryPointSuccess) throw std::runtime_error("this driver knows no tensor maps");
    return reinterpret_cast<Encode>(found);
  }();
  cuuint64_t sizes[5] = {}, strides[4] = {};
  cuuint32_t box[5] = {}, steps[5] = {};
  for (int i = 0; i < rank; ++i) {
    sizes[i] = cuuint64_t(axis[i].size);
    box[i] = cuuint32_t(axis[i].box);
    steps[i] = 1;
    // An axis of size 1 may have any stride, which the encoder would still judge.
    if (i > 0) strides[i - 1] = cuuint64_t(axis[i].size == 1 ? 16 : axis[i].stride * int64_t(sizeof(T)));
  }
  TensorMap map;
  const CUresult failed = encode(&map, TensorMapType<T>::value, cuuint32_t(rank), const_cast<void*>(base),
                                 sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                 : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                 : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                 : CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (failed)
    throw std::runtime_error(echo::concat("cuTensorMapEncodeTiled failed with error ", int(failed)));
  return map;
#endif
}
}  // namespace simt
