#include "common/tensor_view.h"

#include "common/check.h"

namespace echo {
namespace {
std::string join(const int64_t* values, int count) {
  std::string out = "(";
  for (int i = 0; i < count; ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out + (count == 1 ? ",)" : ")");
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kF16:
      return "float16";
    case DType::kBF16:
      return "bfloat16";
  }
  ECHO_CHECK(false, "dtype code must be 0, 1 or 2, got ", int(dtype));
}
}  // namespace

std::string describe(const TensorView& view) {
  return concat(name_of(view.dtype), " ", join(view.size, view.ndim), ", strides ",
                join(view.stride, view.ndim));
}
}  // namespace echo
