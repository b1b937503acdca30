// Bindings of the kernels that work token by token: ring_append, modulate and its kin, and those of the
// memory's write.
#if defined(ECHO_EXT_WITH_CUDA) || defined(SIMT_HOST)
#include "bindings.h"
#include "memory/gate_blend.h"
#include "memory/memory_query.h"
#include "norm/modulate.h"
#include "ring/ring_append.h"

namespace echo {
namespace {
using Optional = std::optional<py::tuple>;

void ring_append(const py::tuple& q_arg, const py::tuple& k_arg, const py::tuple& v_arg,
                 const Optional& q_weight_arg, const Optional& k_weight_arg, const py::tuple& frame_arg,
                 const Optional& key_frame_arg, const py::tuple& grid_arg, const py::tuple& slots_arg,
                 const py::tuple& ring_k_arg, const py::tuple& ring_v_arg, const Optional& ring_raw_arg,
                 float eps, const py::tuple& out_arg, Stream stream) {
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
  check_tables("q", q, "frame_table", frame, grid);
  if (key_frame) check_tables("q", q, "key_frame_table", *key_frame, grid);
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
void modulate(const py::tuple& x_arg, const Optional& y_arg, const Optional& gate_arg,
              const Optional& shift_arg, const Optional& scale_arg, float eps, const Optional& sum_arg,
              const Optional& out_arg, Stream stream) {
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

void memory_query(const py::tuple& q_arg, const Optional& weight_arg, const Optional& frame_arg,
                  const Optional& grid_arg, float eps, const py::tuple& out_arg, Stream stream) {
  Call call(stream);
  const TensorView q = call.in("q", q_arg), out = call.out("out", out_arg);
  const auto weight = call.in("norm_weight", weight_arg), frame = call.in("frame_table", frame_arg),
             grid = call.in("grid_table", grid_arg);
  check_shape("q", q, {kAny, kAny, kAny, kAny});
  check_shape("out", out, {q.size[0], q.size[1], q.size[2], q.size[3]});
  check_dtype("out", out, q.dtype);
  check_vectors("q", q);
  check_contiguous("out", out);
  check_vectors("out", out);
  MemoryQueryParams p;
  p.q = q.ptr;
  p.out = out.ptr;
  p.dtype = q.dtype;
  p.eps = eps;
  p.batch = q.size[0];
  p.tokens = q.size[1];
  p.heads = q.size[2];
  p.head_dim = q.size[3];
  set_steps(p.q_stride, q);
  if (weight) {
    check_shape("norm_weight", *weight, {p.heads * p.head_dim});
    check_dtype("norm_weight", *weight, q.dtype);
    check_vectors("norm_weight", *weight);
    p.weight = weight->ptr;
  }
  ECHO_CHECK(frame.has_value() == grid.has_value(), "frame_table and grid_table go together");
  if (frame) {
    check_tables("q", q, "frame_table", *frame, *grid);
    p.frame_table = static_cast<const float*>(frame->ptr);
    p.grid_table = static_cast<const float*>(grid->ptr);
    p.frame_tokens = grid->size[0];
    p.frame_pairs = frame->size[2];
    set_steps(p.table_stride, *frame);
    p.grid_stride = grid->step(0);
  }
  call.launch(memory_query_fwd, p);
}

void gate_blend(const py::tuple& state_arg, const py::tuple& proposal_arg, const py::tuple& weight_arg,
                const py::tuple& bias_arg, const py::tuple& out_arg, Stream stream) {
  Call call(stream);
  const TensorView state = call.in("state", state_arg), proposal = call.in("proposal", proposal_arg),
                   weight = call.in("weight", weight_arg), bias = call.in("bias", bias_arg),
                   out = call.out("out", out_arg);
  check_shape("state", state, {kAny, kAny, kAny});
  const int64_t batch = state.size[0], tokens = state.size[1], width = state.size[2];
  check_shape("proposal", proposal, {batch, tokens, width});
  check_shape("out", out, {batch, tokens, width});
  check_shape("weight", weight, {width, 2 * width});
  check_shape("bias", bias, {width});
  check_dtype("proposal", proposal, state.dtype);
  check_dtype("out", out, state.dtype);
  check_dtype("bias", bias, weight.dtype);
  check_contiguous("out", out);
  for (auto [name, v] : {std::pair{"state", &state},
                         {"proposal", &proposal},
                         {"weight", &weight},
                         {"bias", &bias},
                         {"out", &out}})
    check_vectors(name, *v);
  GateBlendParams p;
  p.state = state.ptr;
  p.proposal = proposal.ptr;
  p.weight = weight.ptr;
  p.bias = bias.ptr;
  p.out = out.ptr;
  p.dtype = state.dtype;
  p.weight_dtype = weight.dtype;
  p.batch = batch;
  p.tokens = tokens;
  p.width = width;
  set_steps(p.state_stride, state);
  set_steps(p.proposal_stride, proposal);
  p.weight_stride = weight.step(0);
  call.launch(gate_blend_fwd, p);
}
}  // namespace

void define_token_ops(py::module_& m) {
  m.def("ring_append_fwd", &ring_append, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_weight"),
        py::arg("k_weight"), py::arg("frame_table"), py::arg("key_frame_table"), py::arg("grid_table"),
        py::arg("slots"), py::arg("ring_k"), py::arg("ring_v"), py::arg("ring_raw"), py::arg("eps"),
        py::arg("out"), py::arg("stream"));
  for (const char* name : {"modulate_fwd", "gated_add_fwd", "gated_modulate_fwd"})
    m.def(name, &modulate, py::arg("x"), py::arg("y") = py::none(), py::arg("gate") = py::none(),
          py::arg("shift") = py::none(), py::arg("scale") = py::none(), py::arg("eps") = 0.f,
          py::arg("sum") = py::none(), py::arg("out") = py::none(), py::arg("stream"));
  m.def("memory_query_fwd", &memory_query, py::arg("q"), py::arg("norm_weight"), py::arg("frame_table"),
        py::arg("grid_table"), py::arg("eps"), py::arg("out"), py::arg("stream"));
  m.def("gate_blend_fwd", &gate_blend, py::arg("state"), py::arg("proposal"), py::arg("weight"),
        py::arg("bias"), py::arg("out"), py::arg("stream"));
}
}  // namespace echo
#endif
