#include "common/check.h"
#include "ring/ring_append.cuh"
#include "simt/launch.h"

namespace echo {
namespace {
template <class T>
void launch(const RingAppendParams& p, simt::Stream stream) {
  const int64_t width = p.heads * p.head_dim, threads = row_threads(width / simt::kPer16Bytes<T>);
  if (!p.batch || !p.tokens || !width) return;
  ECHO_CHECK(threads <= kRowThreads, "q is too wide: ", p.heads, " heads of ", p.head_dim);
  ECHO_CHECK(p.tokens <= INT32_MAX, "q has too many tokens for one launch: ", p.tokens);
  ECHO_CHECK(p.batch <= UINT16_MAX, "q has a batch of ", p.batch, ", at most ", UINT16_MAX, " are built");
  simt::launch_kernel(ring_append_fwd_kernel<T>, dim3(unsigned(p.tokens), unsigned(p.batch)),
                      dim3(unsigned(threads)), 2 * kSumFloats * sizeof(float), stream, p);
}
}  // namespace

void ring_append_fwd(const RingAppendParams& p, simt::Stream stream) {
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
