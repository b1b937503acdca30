#include "common/cpu/avx2.h"
#include "ring/cpu/append.h"

namespace echo {
void append_avx2_f32(const RingAppendCpuParams& params, int64_t begin, int64_t end) {
  Append<Avx2, float>{params}.run(begin, end);
}

void append_avx2_bf16(const RingAppendCpuParams& params, int64_t begin, int64_t end) {
  Append<Avx2, uint16_t>{params}.run(begin, end);
}
}  // namespace echo
