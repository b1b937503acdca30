// Tuples in, launch out; every kernel has one m.def here. The checks are those that memory safety needs:
// Python's, with the better messages, came first.
#include "bindings.h"

#include "attention/stream_attention.h"
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

void check_contiguous(const char* name, const TensorView& v) {
  int64_t step = 1;
  bool dense = true, empty = false;
  for (int i = v.ndim - 1; i >= 0; --i) {
    dense = dense && (v.size[i] == 1 || v.stride[i] == step);
    empty = empty || v.size[i] == 0;
    step *= v.size[i];
  }
  ECHO_CHECK(dense || empty, name, " must be contiguous, got strides ", tuple_text(v.stride, v.ndim));
}

void check_pairs(const char* name, const TensorView& v) {
  ECHO_CHECK(v.size[v.ndim - 2] == 1 || v.stride[v.ndim - 2] == 2, name,
             " must be dense in its last two dims, got strides ", tuple_text(v.stride, v.ndim));
}

void check_vectors(const char* name, const TensorView& v) {
  const int64_t width = 16 / item_bytes(v.dtype);
  bool fits = uintptr_t(v.ptr) % 16 == 0 && v.size[v.ndim - 1] % width == 0;
  for (int i = 0; i < v.ndim - 1; ++i) fits = fits && v.step(i) % width == 0;
  ECHO_CHECK(fits, name, " must have rows that fill and start at multiples of 16 bytes, got ", describe(v));
}

void check_batch(const char* name, const TensorView& v, int64_t batch) {
  ECHO_CHECK(v.size[0] == 1 || v.size[0] == batch, name, " has ", v.size[0], " rows for a batch of ", batch);
}

void check_tables(const char* x_name, const TensorView& x, const char* name, const TensorView& frame,
                  const TensorView& grid) {
  check_shape(name, frame, {kAny, kAny, kAny, 2});
  check_shape("grid_table", grid, {kAny, kAny, 2});
  check_dtype(name, frame, DType::kF32);
  check_dtype("grid_table", grid, DType::kF32);
  check_batch(name, frame, x.size[0]);
  ECHO_CHECK(frame.size[1] * grid.size[0] == x.size[1], x_name, " has ", x.size[1],
             " tokens, the tables describe ", frame.size[1], " frames of ", grid.size[0]);
  ECHO_CHECK(2 * (frame.size[2] + grid.size[1]) == x.size[3], x_name, " has d=", x.size[3],
             ", the tables describe ", frame.size[2], " + ", grid.size[1], " pairs");
  check_pairs(name, frame);
  check_pairs("grid_table", grid);
}

namespace {
#if defined(ECHO_EXT_WITH_CUDA) || defined(SIMT_HOST)
void rope_rotate(const py::tuple& x_arg, const py::tuple& frame_arg, const py::tuple& grid_arg,
                 const py::tuple& out_arg, Stream stream) {
  Call call(stream);
  const TensorView x = call.in("x", x_arg), frame = call.in("frame_table", frame_arg),
                   grid = call.in("grid_table", grid_arg), out = call.out("out", out_arg);
  check_shape("x", x, {kAny, kAny, kAny, kAny});
  check_shape("out", out, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("out", out, x.dtype);
  check_tables("x", x, "frame_table", frame, grid);
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

// Rows of d contiguous elements that kernels read 16 bytes at a time.
void check_rows(const char* name, const TensorView& v) {
  const int bytes = item_bytes(v.dtype);
  bool aligned = uintptr_t(v.ptr) % 16 == 0;
  for (int i = 0; i + 1 < v.ndim; ++i) aligned = aligned && v.step(i) * bytes % 16 == 0;
  ECHO_CHECK(aligned, name, " must have rows aligned to 16 bytes, got address ", v.ptr, " and strides ",
             tuple_text(v.stride, v.ndim));
}

using attention::StreamAttentionParams;
using Planner = void (*)(StreamAttentionParams&, int32_t);
constexpr int64_t kMaxTokens = INT32_MAX - 1024;  // tokens are counted in 32 bits, with room for a tile

Planner attention_planner(bool sm90) {
#if defined(ECHO_EXT_WITH_SM90A) || defined(SIMT_HOST)
  if (sm90) return stream_attention_sm90_plan;
#endif
  ECHO_CHECK(!sm90, "this build has no kernels for sm_90a");
  return stream_attention_plan;
}

// What planning needs to know.
StreamAttentionParams attention_shape(DType dtype, const std::array<int64_t, 4>& q,
                                      const std::vector<int64_t>& tokens) {
  StreamAttentionParams p;
  ECHO_CHECK(!tokens.empty() && tokens.size() <= attention::kMaxSegments, "there must be 1 to ",
             attention::kMaxSegments, " runs of keys, got ", tokens.size());
  const auto fits = [](int64_t n) { return n >= 0 && n <= kMaxTokens; };
  ECHO_CHECK(fits(q[0]) && fits(q[1]) && fits(q[2]) && q[0] * q[2] * (q[1] / 64 + 1) <= kMaxTokens,
             "q has too many rows for one launch: ", tuple_text(q.data(), 4));
  p.dtype = dtype;
  p.batch = int32_t(q[0]);
  p.queries = int32_t(q[1]);
  p.heads = int32_t(q[2]);
  p.head_dim = int32_t(q[3]);
  for (int64_t n : tokens) {
    ECHO_CHECK(n > 0 && fits(n), "a run of keys must have 1 to ", kMaxTokens, " tokens, got ", n);
    p.segment[p.segments++].tokens = int32_t(n);
  }
  return p;
}

int64_t attention_workspace(int32_t dtype, const std::array<int64_t, 4>& q,
                            const std::vector<int64_t>& tokens, int32_t processors, bool sm90) {
  StreamAttentionParams p = attention_shape(static_cast<DType>(dtype), q, tokens);
  ECHO_CHECK(processors > 0, "processors must be positive, got ", processors);
  attention_planner(sm90)(p, processors);
  return workspace_floats(p, p.head_dim);
}

void stream_attention(bool sm90, const py::tuple& q_arg, const std::optional<py::tuple>& shift_arg,
                      const std::vector<std::pair<py::tuple, py::tuple>>& runs, int turned, float scale,
                      const py::tuple& out_arg, const std::optional<py::tuple>& lse_arg,
                      const std::optional<py::tuple>& workspace_arg, int32_t processors, Stream stream) {
  Call call(stream);
  const TensorView q = call.in("q", q_arg), out = call.out("out", out_arg);
  check_shape("q", q, {kAny, kAny, kAny, kAny});
  check_shape("out", out, {q.size[0], q.size[1], q.size[2], q.size[3]});
  check_dtype("out", out, q.dtype);
  check_rows("q", q);
  check_contiguous("out", out);
  std::vector<TensorView> keys, values;
  std::vector<int64_t> tokens;
  for (const auto& [k, v] : runs) {
    keys.push_back(call.in("k", k));
    values.push_back(call.in("v", v));
    check_shape("k", keys.back(), {q.size[0], kAny, q.size[2], q.size[3]});
    check_shape("v", values.back(), {q.size[0], keys.back().size[1], q.size[2], q.size[3]});
    tokens.push_back(keys.back().size[1]);
    for (const TensorView& x : {keys.back(), values.back()}) {
      check_dtype("k and v", x, q.dtype);
      check_rows("k and v", x);
    }
  }
  StreamAttentionParams p = attention_shape(q.dtype, {q.size[0], q.size[1], q.size[2], q.size[3]}, tokens);
  ECHO_CHECK(scale > 0, "scale must be above 0, got ", scale);
  ECHO_CHECK(turned >= 0 && turned <= p.segments, "turned must be 0 to ", p.segments, ", got ", turned);
  ECHO_CHECK(processors > 0, "processors must be positive, got ", processors);
  p.q = q.ptr;
  set_steps(p.q_stride, q);
  for (int i = 0; i < p.segments; ++i) {
    p.segment[i].k = keys[i].ptr;
    p.segment[i].v = values[i].ptr;
    set_steps(p.segment[i].k_stride, keys[i]);
    set_steps(p.segment[i].v_stride, values[i]);
  }
  p.scale_log2 = float(scale * 1.4426950408889634);
  if (const auto shift = call.in("shift", shift_arg)) {
    const int64_t pairs = q.size[3] / 2 - 2 * (q.size[3] / 2 / 3);
    check_shape("shift", *shift, {kAny, pairs, 2});
    check_dtype("shift", *shift, DType::kF32);
    check_pairs("shift", *shift);
    ECHO_CHECK(shift->size[0] == 1 || shift->size[0] == q.size[0], "shift has ", shift->size[0],
               " rows for a batch of ", q.size[0]);
    p.turned = turned;
    p.shift = static_cast<const float*>(shift->ptr);
    p.shift_stride = shift->step(0);
  }
  p.out = out.ptr;
  if (const auto lse = call.out("lse", lse_arg)) {
    check_shape("lse", *lse, {q.size[0], q.size[2], q.size[1]});
    check_dtype("lse", *lse, DType::kF32);
    check_contiguous("lse", *lse);
    p.lse = static_cast<float*>(lse->ptr);
  }
  attention_planner(sm90)(p, processors);
  if (const int64_t floats = workspace_floats(p, p.head_dim)) {
    ECHO_CHECK(workspace_arg, "these shapes need a workspace of ", floats, " floats");
    const TensorView workspace = call.out("workspace", *workspace_arg);
    check_dtype("workspace", workspace, DType::kF32);
    check_shape("workspace", workspace, {floats});
    set_workspace(p, p.head_dim, static_cast<float*>(workspace.ptr));
  }
#if defined(ECHO_EXT_WITH_SM90A) || defined(SIMT_HOST)
  if (sm90) return call.launch(stream_attention_sm90_fwd, p);
#endif
  call.launch(stream_attention_fwd, p);
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
#if defined(ECHO_EXT_WITH_SM90A) || defined(SIMT_HOST)
  m.attr("with_sm90a") = true;
#else
  m.attr("with_sm90a") = false;
#endif
  m.def("device_info", &device_lines);
#ifdef ECHO_EXT_CPU_KERNELS
  define_cpu_ops(m);
#endif
  m.def("describe", [](const py::tuple& x) { return describe(view("x", x)); }, py::arg("x"));
#if defined(ECHO_EXT_WITH_CUDA) || defined(SIMT_HOST)
  m.def("rope_rotate_fwd", &rope_rotate, py::arg("x"), py::arg("frame_table"), py::arg("grid_table"),
        py::arg("out"), py::arg("stream"));
  m.def("stream_attention_fwd", &stream_attention, py::arg("sm90"), py::arg("q"), py::arg("shift"),
        py::arg("runs"), py::arg("turned"), py::arg("scale"), py::arg("out"), py::arg("lse"),
        py::arg("workspace"), py::arg("processors"), py::arg("stream"));
  m.def("stream_attention_workspace", &attention_workspace, py::arg("dtype"), py::arg("q"), py::arg("tokens"),
        py::arg("processors"), py::arg("sm90"));
  define_token_ops(m);
#endif
}
