#include "common/cpu/avx512.h"
#include "ring/cpu/append.h"

namespace echo {
void append_avx512_f32(const RingAppendCpuParams& params, int64_t begin, int64_t end) {
  Append<Avx512, float>{params}.run(begin, end);
}

void append_avx512_bf16(const RingAppendCpuParams& params, int64_t begin, int64_t end) {
  Append<Avx512, uint16_t>{params}.run(begin, end);
}
}  // namespace echo
