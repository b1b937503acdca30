#include "common/check.h"
#include "rope/rope_rotate.cuh"
#include "simt/launch.h"

namespace echo {
namespace {
template <class T, int kHeadDim, int kVec>
void launch(const RopeRotateParams& p, simt::Stream stream) {
  const int64_t groups = (p.heads + kRopeHeads - 1) / kRopeHeads;
  const int64_t items = p.tokens * groups * (p.head_dim / kVec);
  ECHO_CHECK(items < INT32_MAX - kRopeThreads, "x has too many tokens for one launch: ", p.tokens);
  ECHO_CHECK(p.batch <= UINT16_MAX, "x has a batch of ", p.batch, ", at most ", UINT16_MAX, " are built");
  const dim3 grid(unsigned((items + kRopeThreads - 1) / kRopeThreads), unsigned(p.batch));
  simt::launch_kernel(rope_rotate_fwd_kernel<T, kHeadDim, kVec>, grid, dim3(kRopeThreads), 0, stream, p);
}

template <class T>
void dispatch(const RopeRotateParams& p, simt::Stream stream) {
  constexpr int kVec = simt::kPer16Bytes<T>;
  bool aligned = p.head_dim % kVec == 0 && uintptr_t(p.x) % 16 == 0 && uintptr_t(p.out) % 16 == 0;
  for (int64_t stride : {p.x_batch, p.x_token, p.x_head, p.out_batch, p.out_token, p.out_head})
    aligned = aligned && stride % kVec == 0;
  if (!aligned) return launch<T, 0, 2>(p, stream);
  switch (p.head_dim) {
    case 16:
      return launch<T, 16, kVec>(p, stream);
    case 64:
      return launch<T, 64, kVec>(p, stream);
    case 128:
      return launch<T, 128, kVec>(p, stream);
    default:
      return launch<T, 0, kVec>(p, stream);
  }
}
}  // namespace

void rope_rotate_fwd(const RopeRotateParams& p, simt::Stream stream) {
  switch (p.dtype) {
    case DType::kF32:
      return dispatch<float>(p, stream);
    case DType::kF16:
      return dispatch<simt::f16>(p, stream);
    case DType::kBF16:
      return dispatch<simt::bf16>(p, stream);
  }
  ECHO_CHECK(false, "dtype code must be 0, 1 or 2, got ", int(p.dtype));
}
}  // namespace echo
