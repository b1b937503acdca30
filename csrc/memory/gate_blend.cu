#include "common/check.h"
#include "memory/gate_blend.cuh"
#include "simt/launch.h"

namespace echo {
namespace {
template <class S, class W>
void launch(const GateBlendParams& p, simt::Stream stream) {
  using C = GateTile<S, W>;
  ECHO_CHECK(p.tokens <= INT32_MAX - C::kTokens, "state has too many tokens for one launch: ", p.tokens);
  ECHO_CHECK(p.width <= UINT16_MAX * int64_t(C::kChannels), "state is too wide: ", p.width);
  ECHO_CHECK(p.batch <= UINT16_MAX, "state has a batch of ", p.batch, ", at most ", UINT16_MAX, " are built");
  const dim3 grid(unsigned((p.tokens + C::kTokens - 1) / C::kTokens),
                  unsigned((p.width + C::kChannels - 1) / C::kChannels), unsigned(p.batch));
  simt::launch_kernel(gate_blend_fwd_kernel<S, W>, grid, dim3(C::kThreads), C::kSmemBytes, stream, p);
}
}  // namespace

void gate_blend_fwd(const GateBlendParams& p, simt::Stream stream) {
  const bool same = p.dtype == p.weight_dtype, wide = p.dtype == DType::kF32;
  if (same && p.dtype == DType::kF32) return launch<float, float>(p, stream);
  if (same && p.dtype == DType::kF16) return launch<simt::f16, simt::f16>(p, stream);
  if (same && p.dtype == DType::kBF16) return launch<simt::bf16, simt::bf16>(p, stream);
  if (wide && p.weight_dtype == DType::kF16) return launch<float, simt::f16>(p, stream);
  if (wide && p.weight_dtype == DType::kBF16) return launch<float, simt::bf16>(p, stream);
  ECHO_CHECK(false, "state is ", name_of(p.dtype), ", weight ", name_of(p.weight_dtype), ": not built");
}
}  // namespace echo
