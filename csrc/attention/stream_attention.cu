#include "attention/stream_attention.h"

#include "attention/attention_join.cuh"
#include "attention/stream_attention.cuh"
#include "common/check.h"
#include "simt/launch.h"

namespace echo {
namespace attention {
namespace {
// Calls f with a value of the storage type and the head dim as a constant.
template <class F>
void dispatch(const StreamAttentionParams& p, const F& f) {
  const auto with_dim = [&](auto type) {
    switch (p.head_dim) {
      case 16:
        return f(type, std::integral_constant<int, 16>{});
      case 64:
        return f(type, std::integral_constant<int, 64>{});
      case 128:
        return f(type, std::integral_constant<int, 128>{});
    }
    ECHO_CHECK(false, "head dim must be 16, 64 or 128, got ", p.head_dim);
  };
  switch (p.dtype) {
    case DType::kF32:
      return with_dim(float{});
    case DType::kF16:
      return with_dim(simt::f16{});
    case DType::kBF16:
      return with_dim(simt::bf16{});
  }
  ECHO_CHECK(false, "dtype code must be 0, 1 or 2, got ", int(p.dtype));
}
}  // namespace
}  // namespace attention

int64_t stream_attention_plan(attention::StreamAttentionParams& p, int32_t processors) {
  using namespace attention;
  int64_t floats = 0;
  dispatch(p, [&](auto type, auto d) {
    using C = Tile<decltype(type), decltype(d)::value>;
    plan(p, C::kRows, C::kKeys, processors * C::kBlocks);
    floats = p.schedule.slots() * int64_t(C::kRows) * (p.head_dim + 1);
  });
  return floats;
}

void stream_attention_fwd(attention::StreamAttentionParams& p, simt::Stream stream) {
  using namespace attention;
  dispatch(p, [&](auto type, auto d) {
    using T = decltype(type);
    constexpr int D = decltype(d)::value;
    using C = Tile<T, D>;
    p.partial_lse = p.partial_out + int64_t(p.schedule.slots()) * C::kRows * D;
    simt::launch_kernel(stream_attention_fwd_kernel<T, D>, dim3(p.schedule.blocks), dim3(C::kThreads),
                        C::kSmemBytes, stream, p);
    if (p.schedule.sharers)
      simt::launch_kernel(attention_join_kernel<T, D>, dim3(p.schedule.shared_tiles(), join_blocks(C::kRows, D)),
                          dim3(kJoinThreads), 0, stream, static_cast<const AttentionParams&>(p), C::kRows);
  });
}
}  // namespace echo
