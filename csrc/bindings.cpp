// Tuples in, launch out; every kernel has one m.def here. The checks are those that memory safety needs:
// Python's, with the better messages, came first.
#include "bindings.h"

#include "common/device_info.h"
#include "norm/modulate.h"
#include "ring/ring_append.h"
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
  ECHO_CHECK(dense || empty, name, " must be contiguous, got ", describe(v));
}

namespace {
using Stream = std::pair<int, uintptr_t>;  // (device, handle) as built by echo_ext._native.stream_of()

#if defined(ECHO_EXT_WITH_CUDA) || defined(SIMT_HOST)
// A table of cos and sin that kernels read row by row.
void check_pairs(const char* name, const TensorView& v) {
  ECHO_CHECK(v.size[v.ndim - 2] == 1 || v.stride[v.ndim - 2] == 2, name,
             " must be dense in its last two dims, got strides ", tuple_text(v.stride, v.ndim));
}

// What kernels read 16 bytes at a time.
void check_vectors(const char* name, const TensorView& v) {
  const int64_t width = 16 / item_bytes(v.dtype);
  bool fits = uintptr_t(v.ptr) % 16 == 0 && v.size[v.ndim - 1] % width == 0;
  for (int i = 0; i < v.ndim - 1; ++i) fits = fits && v.step(i) % width == 0;
  ECHO_CHECK(fits, name, " must have rows that fill and start at multiples of 16 bytes, got ", describe(v));
}

void check_batch(const char* name, const TensorView& v, int64_t batch) {
  ECHO_CHECK(v.size[0] == 1 || v.size[0] == batch, name, " has ", v.size[0], " rows for a batch of ", batch);
}

template <size_t N>
void set_steps(int64_t (&to)[N], const TensorView& v) {
  for (int i = 0; i < int(N); ++i) to[i] = v.step(i);
}

// Tables that rotate the tokens of x, (B, T, H, d).
void check_tables(const TensorView& x, const char* name, const TensorView& frame, const TensorView& grid) {
  check_shape(name, frame, {kAny, kAny, kAny, 2});
  check_shape("grid_table", grid, {kAny, kAny, 2});
  check_dtype(name, frame, DType::kF32);
  check_dtype("grid_table", grid, DType::kF32);
  check_batch(name, frame, x.size[0]);
  ECHO_CHECK(frame.size[1] * grid.size[0] == x.size[1], "x has ", x.size[1], " tokens, the tables describe ",
             frame.size[1], " frames of ", grid.size[0]);
  ECHO_CHECK(2 * (frame.size[2] + grid.size[1]) == x.size[3], "x has d=", x.size[3], ", the tables describe ",
             frame.size[2], " + ", grid.size[1], " pairs");
  check_pairs(name, frame);
  check_pairs("grid_table", grid);
}

void rope_rotate(const py::tuple& x_arg, const py::tuple& frame_arg, const py::tuple& grid_arg,
                 const py::tuple& out_arg, Stream stream) {
  Call call(stream);
  const TensorView x = call.in("x", x_arg), frame = call.in("frame_table", frame_arg),
                   grid = call.in("grid_table", grid_arg), out = call.out("out", out_arg);
  check_shape("x", x, {kAny, kAny, kAny, kAny});
  check_shape("out", out, {x.size[0], x.size[1], x.size[2], x.size[3]});
  check_dtype("out", out, x.dtype);
  check_tables(x, "frame_table", frame, grid);
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

void ring_append(const py::tuple& q_arg, const py::tuple& k_arg, const py::tuple& v_arg,
                 const std::optional<py::tuple>& q_weight_arg, const std::optional<py::tuple>& k_weight_arg,
                 const py::tuple& frame_arg, const std::optional<py::tuple>& key_frame_arg,
                 const py::tuple& grid_arg, const py::tuple& slots_arg, const py::tuple& ring_k_arg,
                 const py::tuple& ring_v_arg, const std::optional<py::tuple>& ring_raw_arg, float eps,
                 const py::tuple& out_arg, Stream stream) {
  Call call(stream);
  const TensorView q = call.in("q", q_arg), k = call.in("k", k_arg), v = call.in("v", v_arg),
                   frame = call.in("frame_table", frame_arg), grid = call.in("grid_table", grid_arg),
                   slots = call.in("slots", slots_arg), ring_k = call.out("ring_k", ring_k_arg),
                   ring_v = call.out("ring_v", ring_v_arg), out = call.out("out", out_arg);
  const auto q_weight = call.in("q_weight", q_weight_arg), k_weight = call.in("k_weight", k_weight_arg),
             key_frame = call.in("key_frame_table", key_frame_arg),
             ring_raw = call.out("ring_raw", ring_raw_arg);
  check_shape("q", q, {kAny, kAny, kAny, kAny});
  const int64_t batch = q.size[0], heads = q.size[2], head_dim = q.size[3];
  for (auto [name, x] : {std::pair{"k", &k}, {"v", &v}, {"out", &out}})
    check_shape(name, *x, {batch, q.size[1], heads, head_dim});
  check_shape("ring_k", ring_k, {batch, kAny, heads, head_dim});
  for (auto [name, x] : {std::pair{"ring_v", &ring_v}, {"ring_raw", ring_raw ? &*ring_raw : &ring_k}})
    check_shape(name, *x, {batch, ring_k.size[1], heads, head_dim});
  for (auto [name, x] : {std::pair{"q", &q},
                         {"k", &k},
                         {"v", &v},
                         {"out", &out},
                         {"ring_k", &ring_k},
                         {"ring_v", &ring_v},
                         {"ring_raw", ring_raw ? &*ring_raw : &ring_k}}) {
    check_dtype(name, *x, q.dtype);
    check_vectors(name, *x);
  }
  check_contiguous("out", out);
  for (auto [name, w] : {std::pair{"q_weight", &q_weight}, {"k_weight", &k_weight}}) {
    if (!*w) continue;
    check_shape(name, **w, {heads * head_dim});
    check_dtype(name, **w, q.dtype);
    check_vectors(name, **w);
  }
  check_tables(q, "frame_table", frame, grid);
  if (key_frame) check_tables(q, "key_frame_table", *key_frame, grid);
  check_shape("slots", slots, {kAny, frame.size[1]});
  check_dtype("slots", slots, DType::kI64);
  check_batch("slots", slots, batch);
  ECHO_CHECK(grid.size[0] > 0 && ring_k.size[1] % grid.size[0] == 0, "a ring of ", ring_k.size[1],
             " tokens is no whole number of ", grid.size[0], "-token frames");
  RingAppendParams p;
  p.q = q.ptr;
  p.k = k.ptr;
  p.v = v.ptr;
  p.out = out.ptr;
  p.ring_k = ring_k.ptr;
  p.ring_v = ring_v.ptr;
  if (q_weight) p.q_weight = q_weight->ptr;
  if (k_weight) p.k_weight = k_weight->ptr;
  p.frame_table = p.key_frame_table = static_cast<const float*>(frame.ptr);
  p.grid_table = static_cast<const float*>(grid.ptr);
  p.slots = static_cast<const int64_t*>(slots.ptr);
  p.dtype = q.dtype;
  p.eps = eps;
  p.batch = batch;
  p.tokens = q.size[1];
  p.heads = heads;
  p.head_dim = head_dim;
  p.frame_tokens = grid.size[0];
  p.frame_pairs = frame.size[2];
  p.ring_slots = ring_k.size[1] / grid.size[0];
  set_steps(p.q_stride, q);
  set_steps(p.k_stride, k);
  set_steps(p.v_stride, v);
  set_steps(p.ring_k_stride, ring_k);
  set_steps(p.ring_v_stride, ring_v);
  set_steps(p.table_stride, frame);
  set_steps(p.key_table_stride, frame);
  p.grid_stride = grid.step(0);
  set_steps(p.slots_stride, slots);
  if (key_frame) {
    p.key_frame_table = static_cast<const float*>(key_frame->ptr);
    set_steps(p.key_table_stride, *key_frame);
  }
  if (ring_raw) {
    p.ring_raw = ring_raw->ptr;
    set_steps(p.ring_raw_stride, *ring_raw);
  }
  call.launch(ring_append_fwd, p);
}

// modulate, gated_add and gated_modulate: what is None is left out.
void modulate(const py::tuple& x_arg, const std::optional<py::tuple>& y_arg,
              const std::optional<py::tuple>& gate_arg, const std::optional<py::tuple>& shift_arg,
              const std::optional<py::tuple>& scale_arg, float eps, const std::optional<py::tuple>& sum_arg,
              const std::optional<py::tuple>& out_arg, Stream stream) {
  Call call(stream);
  const TensorView x = call.in("x", x_arg);
  const auto y = call.in("y", y_arg), gate = call.in("gate", gate_arg), shift = call.in("shift", shift_arg),
             scale = call.in("scale", scale_arg), sum = call.out("sum", sum_arg),
             out = call.out("out", out_arg);
  check_shape("x", x, {kAny, kAny, kAny});
  check_vectors("x", x);
  const int64_t batch = x.size[0], tokens = x.size[1], width = x.size[2];
  for (auto [name, v] : {std::pair{"y", &y}, {"sum", &sum}, {"out", &out}}) {
    if (!*v) continue;
    check_shape(name, **v, {batch, tokens, width});
    check_dtype(name, **v, x.dtype);
    check_vectors(name, **v);
    if (v != &y) check_contiguous(name, **v);
  }
  ECHO_CHECK(y.has_value() == sum.has_value() && (y || !gate), "y, gate and sum go together");
  ECHO_CHECK(shift.has_value() == out.has_value() && scale.has_value() == out.has_value(),
             "shift, scale and out go together");
  int64_t frames = 1;
  for (auto [name, v] : {std::pair{"gate", &gate}, {"shift", &shift}, {"scale", &scale}}) {
    if (!*v) continue;
    check_dtype(name, **v, x.dtype);
    check_vectors(name, **v);
    if (v != &gate && (*v)->ndim == 1) {
      check_shape(name, **v, {width});
      continue;
    }
    check_shape(name, **v, {kAny, kAny, 1, width});
    check_batch(name, **v, batch);
    ECHO_CHECK(frames == 1 || frames == (*v)->size[1], name, " has ", (*v)->size[1], " frames, not ", frames);
    frames = (*v)->size[1];
    ECHO_CHECK(frames > 0 && tokens % frames == 0, name, " has ", frames, " frames for ", tokens, " tokens");
  }
  ModulateParams p;
  p.x = x.ptr;
  p.dtype = x.dtype;
  p.eps = eps;
  p.batch = batch;
  p.tokens = tokens;
  p.width = width;
  p.frame_tokens = tokens / frames;
  set_steps(p.x_stride, x);
  if (y) {
    p.y = y->ptr;
    p.sum = sum->ptr;
    set_steps(p.y_stride, *y);
  }
  if (gate) {
    p.gate = gate->ptr;
    set_steps(p.gate_stride, *gate);
  }
  if (out) {
    p.shift = shift->ptr;
    p.scale = scale->ptr;
    p.out = out->ptr;
    if (shift->ndim > 1) set_steps(p.shift_stride, *shift);
    if (scale->ndim > 1) set_steps(p.scale_stride, *scale);
  }
  call.launch(modulate_fwd, p);
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
  m.def("ring_append_fwd", &ring_append, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_weight"),
        py::arg("k_weight"), py::arg("frame_table"), py::arg("key_frame_table"), py::arg("grid_table"),
        py::arg("slots"), py::arg("ring_k"), py::arg("ring_v"), py::arg("ring_raw"), py::arg("eps"),
        py::arg("out"), py::arg("stream"));
  for (const char* name : {"modulate_fwd", "gated_add_fwd", "gated_modulate_fwd"})
    m.def(name, &modulate, py::arg("x"), py::arg("y") = py::none(), py::arg("gate") = py::none(),
          py::arg("shift") = py::none(), py::arg("scale") = py::none(), py::arg("eps") = 0.f,
          py::arg("sum") = py::none(), py::arg("out") = py::none(), py::arg("stream"));
#endif
}
