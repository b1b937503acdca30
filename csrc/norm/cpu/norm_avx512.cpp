#include "common/cpu/avx512.h"
#include "norm/cpu/norm.h"

namespace echo {
void norm_avx512_f32(const NormCpuParams& params, int64_t begin, int64_t end) {
  Norm<Avx512, float>{params}.run(begin, end);
}

void norm_avx512_bf16(const NormCpuParams& params, int64_t begin, int64_t end) {
  Norm<Avx512, uint16_t>{params}.run(begin, end);
}
}  // namespace echo
