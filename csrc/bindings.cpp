// Tuples in, launch out; every kernel has one m.def here. The checks are those that memory safety needs:
// Python's, with the better messages, came first.
#include "bindings.h"

#include "common/device_info.h"
#include "rope/rope_rotate.h"

namespace echo {
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

void check_shape(const char* name, const TensorView& v, std::initializer_list<int64_t> shape) {
  bool fits = v.ndim == int(shape.size());
  int dim = 0;
  for (int64_t size : shape) {
    fits = fits && (size == kAny || size == v.size[dim]);
    ++dim;
  }
  ECHO_CHECK(fits, name, " must be ", tuple_text(shape.begin(), int(shape.size())), ", -1 for any size, got ",
             tuple_text(v.size, v.ndim));
  ECHO_CHECK(v.ndim == 0 || v.size[v.ndim - 1] == 1 || v.stride[v.ndim - 1] == 1, name,
             " must have a contiguous last dim, got strides ", tuple_text(v.stride, v.ndim));
}

void check_dtype(const char* name, const TensorView& v, DType dtype) {
  ECHO_CHECK(v.dtype == dtype, name, " must be ", name_of(dtype), ", got ", name_of(v.dtype));
}

namespace {
using Stream = std::pair<int, uintptr_t>;  // (device, handle) as built by echo_ext._native.stream_of()

#if defined(ECHO_EXT_WITH_CUDA) || defined(SIMT_HOST)
// A table of cos and sin that kernels read row by row.
void check_pairs(const char* name, const TensorView& v) {
  ECHO_CHECK(v.size[v.ndim - 2] == 1 || v.stride[v.ndim - 2] == 2, name,
             " must be dense in its last two dims, got strides ", tuple_text(v.stride, v.ndim));
}

void rope_rotate(const py::tuple& x_arg, const py::tuple& frame_arg, const py::tuple& grid_arg,
                 const py::tuple& out_arg, Stream stream) {
  Call call(stream);
  const TensorView x = call.in("x", x_arg), frame = call.in("frame_table", frame_arg),
                   grid = call.in("grid_table", grid_arg), out = call.out("out", out_arg);
  check_shape("x", x, {kAny, kAny, kAny, kAny});
  check_shape("out", out, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("out", out, x.dtype);
  check_shape("frame_table", frame, {kAny, kAny, kAny, 2});
  check_shape("grid_table", grid, {kAny, kAny, 2});
  check_dtype("frame_table", frame, DType::kF32);
  check_dtype("grid_table", grid, DType::kF32);
  ECHO_CHECK(frame.size[0] == 1 || frame.size[0] == x.size[0], "frame_table has ", frame.size[0],
             " rows for a batch of ", x.size[0]);
  ECHO_CHECK(frame.size[1] * grid.size[0] == x.size[1], "x has ", x.size[1], " tokens, the tables describe ",
             frame.size[1], " frames of ", grid.size[0]);
  ECHO_CHECK(2 * (frame.size[2] + grid.size[1]) == x.size[3], "x has d=", x.size[3], ", the tables describe ",
             frame.size[2], " + ", grid.size[1], " pairs");
  check_pairs("frame_table", frame);
  check_pairs("grid_table", grid);
  RopeRotateParams p;
  p.x = x.ptr;
  p.out = out.ptr;
  p.frame_table = static_cast<const float*>(frame.ptr);
  p.grid_table = static_cast<const float*>(grid.ptr);
  p.dtype = x.dtype;
  p.batch = x.size[0];
  p.tokens = x.size[1];
  p.heads = x.size[2];
  p.head_dim = x.size[3];
  p.frame_tokens = grid.size[0];
  p.frame_pairs = frame.size[2];
  p.x_batch = x.step(0);
  p.x_token = x.step(1);
  p.x_head = x.step(2);
  p.out_batch = out.step(0);
  p.out_token = out.step(1);
  p.out_head = out.step(2);
  p.table_batch = frame.step(0);
  p.table_frame = frame.step(1);
  p.table_token = grid.step(0);
  call.launch(rope_rotate_fwd, p);
}
#endif

py::tuple device_lines() {
#ifdef ECHO_EXT_WITH_CUDA
  return py::tuple(py::cast(device_info()));
#else
  return py::tuple();
#endif
}
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
#ifdef SIMT_HOST
  m.attr("emulated") = true;
#else
  m.attr("emulated") = false;
#endif
  m.def("device_info", &device_lines);
  m.def("describe", [](const py::tuple& x) { return describe(view("x", x)); }, py::arg("x"));
#if defined(ECHO_EXT_WITH_CUDA) || defined(SIMT_HOST)
  m.def("rope_rotate_fwd", &rope_rotate, py::arg("x"), py::arg("frame_table"), py::arg("grid_table"),
        py::arg("out"), py::arg("stream"));
#endif
}
