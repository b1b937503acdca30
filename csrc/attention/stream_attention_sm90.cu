#include <type_traits>

#include "attention/stream_attention_sm90.cuh"
#include "common/check.h"
#include "simt/launch.h"
#include "simt/tensor_map.h"

namespace echo {
namespace {
using attention::HopperMaps;
using attention::HopperTile;
using attention::StreamAttentionParams;

// Calls f with a value of the storage type and the head dim as a constant.
template <class T, class F>
void with_head_dim(const StreamAttentionParams& p, const F& f) {
  switch (p.head_dim) {
    case 64:
      return f(T{}, std::integral_constant<int, 64>{});
    case 128:
      return f(T{}, std::integral_constant<int, 128>{});
  }
  ECHO_CHECK(false, "head dim must be 64 or 128 on Hopper, got ", p.head_dim);
}

template <class F>
void dispatch(const StreamAttentionParams& p, const F& f) {
  switch (p.dtype) {
    case DType::kF16:
      return with_head_dim<simt::f16>(p, f);
    case DType::kBF16:
      return with_head_dim<simt::bf16>(p, f);
    case DType::kF32:
      break;
  }
  ECHO_CHECK(false, "dtype must be float16 or bfloat16 on Hopper, got code ", int(p.dtype));
}

template <class T>
simt::TensorMap map_of(const void* base, const int64_t (&stride)[3], int64_t tokens, int box,
                       const StreamAttentionParams& p) {
  return simt::tensor_map<T>(
      base, {{p.head_dim, 1, 64}, {p.heads, stride[2], 1}, {tokens, stride[1], box}, {p.batch, stride[0], 1}},
      128);
}

template <class T, int D>
HopperMaps maps_of(const StreamAttentionParams& p) {
  HopperMaps maps = {};
  maps.q = map_of<T>(p.q, p.q_stride, p.queries, HopperTile<D>::kRows, p);
  for (int i = 0; i < p.segments; ++i) {
    const attention::Segment& s = p.segment[i];
    maps.k[i] = map_of<T>(s.k, s.k_stride, s.tokens, HopperTile<D>::kKeys, p);
    maps.v[i] = map_of<T>(s.v, s.v_stride, s.tokens, HopperTile<D>::kKeys, p);
  }
  return maps;
}
}  // namespace

void stream_attention_sm90_plan(StreamAttentionParams& p, int32_t processors) {
  dispatch(p, [&](auto, auto d) {
    using C = HopperTile<decltype(d)::value>;
    plan(p, C::kRows, C::kKeys, processors);
  });
}

void stream_attention_sm90_fwd(const StreamAttentionParams& p, simt::Stream stream) {
  dispatch(p, [&](auto type, auto d) {
    using T = decltype(type);
    constexpr int D = decltype(d)::value;
    using C = HopperTile<D>;
    simt::launch_kernel(attention::stream_attention_sm90_fwd_kernel<T, D>, dim3(p.schedule.blocks),
                        dim3(C::kThreads), C::kSmemBytes, stream, p, maps_of<T, D>(p));
  });
  stream_attention_join(p, stream);
}
}  // namespace echo
