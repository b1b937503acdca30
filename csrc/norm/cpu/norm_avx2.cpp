#include "common/cpu/avx2.h"
#include "norm/cpu/norm.h"

namespace echo {
void norm_avx2_f32(const NormCpuParams& params, int64_t begin, int64_t end) {
  Norm<Avx2, float>{params}.run(begin, end);
}

void norm_avx2_bf16(const NormCpuParams& params, int64_t begin, int64_t end) {
  Norm<Avx2, uint16_t>{params}.run(begin, end);
}
}  // namespace echo
