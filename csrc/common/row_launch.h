// Launches a kernel that gives each token a block: csrc/common/block_row.cuh.
#pragma once
#include "common/block_row.cuh"
#include "common/check.h"
#include "common/tensor_view.h"
#include "simt/launch.h"

namespace echo {
struct Rows {
  const char* name;  // of the tensor, for errors
  DType dtype;
  int64_t batch, tokens, width;
};

template <class T, class Params>
void launch_rows_of(const Rows& rows, int sums, simt::Stream stream, void (*kernel)(Params),
                    const Params& p) {
  if (!rows.batch || !rows.tokens || !rows.width) return;
  const int64_t threads = row_threads(rows.width / simt::kPer16Bytes<T>);
  ECHO_CHECK(threads <= kRowThreads, rows.name, " is too wide: ", rows.width);
  ECHO_CHECK(rows.tokens <= INT32_MAX, rows.name, " has too many tokens for one launch: ", rows.tokens);
  ECHO_CHECK(rows.batch <= UINT16_MAX, rows.name, " has a batch of ", rows.batch, ", at most ", UINT16_MAX,
             " are built");
  simt::launch_kernel(kernel, dim3(unsigned(rows.tokens), unsigned(rows.batch)), dim3(unsigned(threads)),
                      sums * kSumFloats * sizeof(float), stream, p);
}

// kernel_of(T{}) is the kernel for storage type T, which sums `sums` values in shared memory.
template <class KernelOf, class Params>
void launch_rows(const Rows& rows, int sums, simt::Stream stream, const KernelOf& kernel_of,
                 const Params& p) {
  switch (rows.dtype) {
    case DType::kF32:
      return launch_rows_of<float>(rows, sums, stream, kernel_of(float{}), p);
    case DType::kF16:
      return launch_rows_of<simt::f16>(rows, sums, stream, kernel_of(simt::f16{}), p);
    case DType::kBF16:
      return launch_rows_of<simt::bf16>(rows, sums, stream, kernel_of(simt::bf16{}), p);
    default:
      ECHO_CHECK(false, rows.name, " must be float32, float16 or bfloat16, got ", name_of(rows.dtype));
  }
}
}  // namespace echo
