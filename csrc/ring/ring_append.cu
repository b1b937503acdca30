#include "common/row_launch.h"
#include "ring/ring_append.cuh"

namespace echo {
void ring_append_fwd(const RingAppendParams& p, simt::Stream stream) {
  const Rows rows = {"q", p.dtype, p.batch, p.tokens, p.heads * p.head_dim};
  launch_rows(rows, 2, stream, [](auto type) { return ring_append_fwd_kernel<decltype(type)>; }, p);
}
}  // namespace echo
