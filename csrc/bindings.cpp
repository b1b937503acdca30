// The only file that knows Python. Tuples in, launch out; every kernel has one m.def here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#ifdef ECHO_EXT_CPU_KERNELS
#include "attention/cpu/stream_attention_cpu.h"
#endif
#include "common/check.h"
#include "common/device_info.h"
#include "common/tensor_view.h"

namespace py = pybind11;

namespace echo {
namespace {

// (data_ptr, dtype code, shape, strides) as built by echo_ext._native.view().
TensorView view(const char* name, const py::tuple& t) {
  ECHO_CHECK(t.size() == 4, name, " must be (data_ptr, dtype code, shape, strides), got ", t.size(),
             " items");
  const auto shape = t[2].cast<py::tuple>();
  const auto strides = t[3].cast<py::tuple>();
  ECHO_CHECK(shape.size() <= kMaxDims, name, " must have at most ", kMaxDims, " dims, got ", shape.size());
  ECHO_CHECK(shape.size() == strides.size(), name, " has ", shape.size(), " sizes but ", strides.size(),
             " strides");
  TensorView v;
  v.ptr = reinterpret_cast<void*>(t[0].cast<uintptr_t>());
  v.dtype = static_cast<DType>(t[1].cast<int32_t>());
  v.ndim = int32_t(shape.size());
  for (int i = 0; i < v.ndim; ++i) {
    v.size[i] = shape[i].cast<int64_t>();
    v.stride[i] = strides[i].cast<int64_t>();
    ECHO_CHECK(v.size[i] >= 0, name, " has size ", v.size[i], " in dim ", i);
  }
  return v;
}

py::tuple device_lines() {
#ifdef ECHO_EXT_WITH_CUDA
  return py::tuple(py::cast(device_info()));
#else
  return py::tuple();
#endif
}

#ifdef ECHO_EXT_CPU_KERNELS
TensorView row_view(const char* name, const py::tuple& t, const TensorView& like, int64_t tokens) {
  const TensorView v = view(name, t);
  ECHO_CHECK(v.dtype == like.dtype && v.ndim == 4 && v.size[0] == like.size[0] && v.size[1] == tokens &&
                 v.size[2] == like.size[2] && v.size[3] == like.size[3] && v.stride[3] == 1,
             name, " is ", describe(v), ", which doesn't go with ", describe(like), " and ", tokens,
             " tokens");
  return v;
}

AttentionTier tier(const char* name, const std::optional<std::pair<py::tuple, py::tuple>>& pair,
                   const TensorView& q) {
  AttentionTier t;
  if (!pair) return t;
  const TensorView k = view(name, pair->first);
  ECHO_CHECK(k.ndim == 4, name, " keys must have 4 dims, got ", k.ndim);
  t.tokens = k.size[1];
  row_view(name, pair->first, q, t.tokens);
  const TensorView v = row_view(name, pair->second, q, t.tokens);
  t.k = k.ptr;
  t.v = v.ptr;
  t.k_batch = k.stride[0];
  t.k_token = k.stride[1];
  t.k_head = k.stride[2];
  t.v_batch = v.stride[0];
  t.v_token = v.stride[1];
  t.v_head = v.stride[2];
  return t;
}

using OptionalPair = std::optional<std::pair<py::tuple, py::tuple>>;

void attend_on_cpu(const py::tuple& q_view, const std::optional<py::tuple>& shift_view,
                   const OptionalPair& sink, const OptionalPair& memory, const OptionalPair& ring,
                   const py::tuple& out_view, const std::optional<py::tuple>& lse_view, double scale,
                   int threads) {
  const TensorView q = view("q", q_view);
  ECHO_CHECK(q.ndim == 4 && q.stride[3] == 1, "q must have 4 dims, the last one contiguous, got ",
             describe(q));
  const TensorView out = row_view("out", out_view, q, q.size[1]);
  StreamAttentionCpuParams p;
  p.q = q.ptr;
  p.out = out.ptr;
  p.dtype = q.dtype;
  p.batch = q.size[0];
  p.tokens = q.size[1];
  p.heads = q.size[2];
  p.head_dim = q.size[3];
  ECHO_CHECK(
      p.head_dim >= kCpuHeadDimStep && p.head_dim % kCpuHeadDimStep == 0 && p.head_dim <= kCpuMaxHeadDim,
      "head dim must be a multiple of ", kCpuHeadDimStep, " up to ", kCpuMaxHeadDim, ", got ", p.head_dim);
  ECHO_CHECK(scale > 0, "scale must be above 0, got ", scale);
  p.scale = float(scale);
  p.q_batch = q.stride[0];
  p.q_token = q.stride[1];
  p.q_head = q.stride[2];
  p.out_batch = out.stride[0];
  p.out_token = out.stride[1];
  p.out_head = out.stride[2];
  p.sink = tier("sink", sink, q);
  p.memory = tier("memory", memory, q);
  p.ring = tier("ring", ring, q);
  ECHO_CHECK(p.sink.tokens + p.memory.tokens + p.ring.tokens > 0, "no tier holds a key");
  if (shift_view) {
    const TensorView shift = view("shift", *shift_view);
    ECHO_CHECK(shift.dtype == DType::kF32 && shift.ndim == 3 &&
                   (shift.size[0] == 1 || shift.size[0] == p.batch) && 2 * shift.size[1] <= p.head_dim &&
                   shift.size[2] == 2 && shift.stride[2] == 1 && shift.stride[1] == 2,
               "shift must be float32 (1 or ", p.batch, ", pairs, 2), dense but for the first dim, got ",
               describe(shift));
    p.shift = static_cast<const float*>(shift.ptr);
    p.shift_pairs = shift.size[1];
    p.shift_batch = shift.size[0] == 1 ? 0 : shift.stride[0];
  }
  if (lse_view) {
    const TensorView lse = view("lse", *lse_view);
    ECHO_CHECK(lse.dtype == DType::kF32 && lse.ndim == 3 && lse.size[0] == p.batch &&
                   lse.size[1] == p.heads && lse.size[2] == p.tokens && lse.stride[2] == 1 &&
                   lse.stride[1] == p.tokens && lse.stride[0] == p.heads * p.tokens,
               "lse must be dense float32 (", p.batch, ", ", p.heads, ", ", p.tokens, "), got ",
               describe(lse));
    p.lse = static_cast<float*>(lse.ptr);
  }
  py::gil_scoped_release release;
  stream_attention_cpu(p, threads);
}

std::pair<std::optional<std::string>, std::string> cpu_isa(int32_t dtype) {
  const char* why_not = nullptr;
  const char* isa = stream_attention_cpu_isa(static_cast<DType>(dtype), why_not);
  if (!isa) return {std::nullopt, why_not};
  return {isa, ""};
}
#endif

}  // namespace
}  // namespace echo

PYBIND11_MODULE(_C, m) {
  using namespace echo;
#ifdef ECHO_EXT_WITH_CUDA
  m.attr("cuda_version") = ECHO_EXT_CUDA_VERSION;
  m.attr("cuda_archs") = ECHO_EXT_CUDA_ARCHS;
  m.def("driver_error", &driver_error, py::call_guard<py::gil_scoped_release>());
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = "";
  m.def("driver_error", [] { return "built without nvcc"; });
#endif
  m.def("device_info", &device_lines);
#ifdef ECHO_EXT_CPU_KERNELS
  m.def("stream_attention_cpu", &attend_on_cpu, py::arg("q"), py::arg("shift"), py::arg("sink"),
        py::arg("memory"), py::arg("ring"), py::arg("out"), py::arg("lse"), py::arg("scale"),
        py::arg("threads"));
  m.def("stream_attention_cpu_isa", &cpu_isa, py::arg("dtype"));
#endif
  m.def("describe", [](const py::tuple& x) { return describe(view("x", x)); }, py::arg("x"));
}
