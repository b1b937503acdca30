#include "common/row_launch.h"
#include "memory/memory_query.cuh"

namespace echo {
void memory_query_fwd(const MemoryQueryParams& p, simt::Stream stream) {
  const Rows rows = {"q", p.dtype, p.batch, p.tokens, p.heads * p.head_dim};
  launch_rows(rows, 1, stream, [](auto type) { return memory_query_fwd_kernel<decltype(type)>; }, p);
}
}  // namespace echo
