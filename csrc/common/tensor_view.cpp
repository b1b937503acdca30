#include "common/tensor_view.h"

#include "common/check.h"

namespace echo {
std::string tuple_text(const int64_t* values, int count) {
  std::string out = "(";
  for (int i = 0; i < count; ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out + (count == 1 ? ",)" : ")");
}

std::string name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kF16:
      return "float16";
    case DType::kBF16:
      return "bfloat16";
    case DType::kI64:
      return "int64";
  }
  ECHO_CHECK(false, "dtype code must be 0 to 3, got ", int(dtype));
}

int item_bytes(DType dtype) { return dtype == DType::kI64 ? 8 : dtype == DType::kF32 ? 4 : 2; }

std::string describe(const TensorView& view) {
  return concat(name_of(view.dtype), " ", tuple_text(view.size, view.ndim), ", strides ",
                tuple_text(view.stride, view.ndim));
}
}  // namespace echo
