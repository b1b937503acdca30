// A tensor as five plain facts. No torch headers: this file must compile without torch installed.
#pragma once
#include <cstdint>
#include <string>

namespace echo {
enum class DType : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2, kI64 = 3 };

inline constexpr int kMaxDims = 5;

struct TensorView {
  void* ptr = nullptr;
  DType dtype = DType::kF32;
  int32_t ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  // How far the next index of a dim lies: 0 for a dim of size 1, whose stride may be anything.
  int64_t step(int dim) const { return size[dim] == 1 ? 0 : stride[dim]; }
};

// "float32 (2, 3), strides (3, 1)": how error messages name a tensor. Throws on a dtype code that is not
// built.
std::string describe(const TensorView& view);

std::string name_of(DType dtype);
int item_bytes(DType dtype);

// "(2, 3)"
std::string tuple_text(const int64_t* values, int count);
}  // namespace echo
