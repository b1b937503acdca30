#include "common/row_launch.h"
#include "norm/modulate.cuh"

namespace echo {
void modulate_fwd(const ModulateParams& p, simt::Stream stream) {
  const Rows rows = {"x", p.dtype, p.batch, p.tokens, p.width};
  launch_rows(rows, 3, stream, [](auto type) { return modulate_fwd_kernel<decltype(type)>; }, p);
}
}  // namespace echo
