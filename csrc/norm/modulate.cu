#include "common/check.h"
#include "norm/modulate.cuh"
#include "simt/launch.h"

namespace echo {
namespace {
template <class T>
void launch(const ModulateParams& p, simt::Stream stream) {
  if (!p.batch || !p.tokens || !p.width) return;
  const int64_t threads = row_threads(p.width / simt::kPer16Bytes<T>);
  ECHO_CHECK(threads <= kRowThreads, "x is too wide: ", p.width);
  ECHO_CHECK(p.tokens <= INT32_MAX, "x has too many tokens for one launch: ", p.tokens);
  ECHO_CHECK(p.batch <= UINT16_MAX, "x has a batch of ", p.batch, ", at most ", UINT16_MAX, " are built");
  simt::launch_kernel(modulate_fwd_kernel<T>, dim3(unsigned(p.tokens), unsigned(p.batch)),
                      dim3(unsigned(threads)), 3 * kSumFloats * sizeof(float), stream, p);
}
}  // namespace

void modulate_fwd(const ModulateParams& p, simt::Stream stream) {
  switch (p.dtype) {
    case DType::kF32:
      return launch<float>(p, stream);
    case DType::kF16:
      return launch<simt::f16>(p, stream);
    case DType::kBF16:
      return launch<simt::bf16>(p, stream);
  }
  ECHO_CHECK(false, "dtype code must be 0, 1 or 2, got ", int(p.dtype));
}
}  // namespace echo
