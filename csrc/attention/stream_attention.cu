#include <type_traits>

#include "attention/attention_join.cuh"
#include "attention/stream_attention.cuh"
#include "common/check.h"

namespace echo {
namespace {
using attention::StreamAttentionParams;
using attention::Tile;

// Calls f with a value of the storage type and the head dim as a constant.
template <class T, class F>
void with_head_dim(const StreamAttentionParams& p, const F& f) {
  switch (p.head_dim) {
    case 16:
      return f(T{}, std::integral_constant<int, 16>{});
    case 64:
      return f(T{}, std::integral_constant<int, 64>{});
    case 128:
      return f(T{}, std::integral_constant<int, 128>{});
  }
  ECHO_CHECK(false, "head dim must be 16, 64 or 128, got ", p.head_dim);
}

template <class F>
void dispatch(const StreamAttentionParams& p, const F& f) {
  switch (p.dtype) {
    case DType::kF32:
      return with_head_dim<float>(p, f);
    case DType::kF16:
      return with_head_dim<simt::f16>(p, f);
    case DType::kBF16:
      return with_head_dim<simt::bf16>(p, f);
  }
  ECHO_CHECK(false, "dtype code must be 0, 1 or 2, got ", int(p.dtype));
}
}  // namespace

void stream_attention_plan(StreamAttentionParams& p, int32_t processors) {
  dispatch(p, [&](auto type, auto d) {
    using C = Tile<decltype(type), decltype(d)::value>;
    plan(p, C::kRows, C::kKeys, processors * C::kBlocks);
  });
}

void stream_attention_fwd(const StreamAttentionParams& p, simt::Stream stream) {
  dispatch(p, [&](auto type, auto d) {
    using T = decltype(type);
    constexpr int D = decltype(d)::value;
    using C = Tile<T, D>;
    simt::launch_kernel(attention::stream_attention_fwd_kernel<T, D>, dim3(p.schedule.blocks),
                        dim3(C::kThreads), C::kSmemBytes, stream, p);
  });
  stream_attention_join(p, stream);
}

void stream_attention_join(const StreamAttentionParams& p, simt::Stream stream) {
  dispatch(p,
           [&](auto type, auto d) { attention::launch_join<decltype(type), decltype(d)::value>(p, stream); });
}
}  // namespace echo
