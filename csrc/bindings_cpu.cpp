// The kernels for CPUs; bindings.cpp holds those for GPUs. Nothing where they are left out, as in emulation.
#ifdef ECHO_EXT_CPU_KERNELS
#include "attention/cpu/stream_attention_cpu.h"
#include "bindings.h"
#include "norm/cpu/norm_cpu.h"
#include "ring/cpu/ring_append_cpu.h"

namespace echo {
namespace {
using OptionalTuple = std::optional<py::tuple>;
using OptionalPair = std::optional<std::pair<py::tuple, py::tuple>>;

// A (B, tokens, H, d) tensor that goes with `q`.
TensorView heads_view(const char* name, const py::tuple& t, const TensorView& q, int64_t tokens) {
  const TensorView v = view(name, t);
  ECHO_CHECK(v.dtype == q.dtype && v.ndim == 4 && v.size[0] == q.size[0] && v.size[1] == tokens &&
                 v.size[2] == q.size[2] && v.size[3] == q.size[3] && v.stride[3] == 1,
             name, " is ", describe(v), ", which doesn't go with ", describe(q), " and ", tokens, " tokens");
  return v;
}

TensorView query_view(const py::tuple& t) {
  const TensorView q = view("q", t);
  ECHO_CHECK(q.ndim == 4 && q.stride[3] == 1 && (q.dtype == DType::kF32 || q.dtype == DType::kBF16),
             "q must be float32 or bfloat16 of 4 dims, the last one contiguous, got ", describe(q));
  ECHO_CHECK(q.size[3] > 0 && q.size[3] % kCpuHeadDimStep == 0 && q.size[3] <= kCpuMaxHeadDim,
             "head dim must be a multiple of ", kCpuHeadDimStep, " up to ", kCpuMaxHeadDim, ", got ",
             q.size[3]);
  return q;
}

// A dense tensor of the given shape, kAny for any size.
TensorView dense_view(const char* name, const py::tuple& t, DType dtype,
                      std::initializer_list<int64_t> shape) {
  const TensorView v = view(name, t);
  check_dtype(name, v, dtype);
  check_shape(name, v, shape);
  check_contiguous(name, v);
  return v;
}

HeadRows rows_of(const TensorView& v) { return {v.ptr, v.stride[0], v.stride[1], v.stride[2]}; }

AttentionTier tier(const char* name, const OptionalPair& pair, const TensorView& q) {
  AttentionTier t;
  if (!pair) return t;
  const TensorView v = view(name, pair->second);
  t.tokens = v.ndim == 4 ? v.size[1] : 0;
  t.k = rows_of(heads_view(name, pair->first, q, t.tokens));
  t.v = rows_of(heads_view(name, pair->second, q, t.tokens));
  return t;
}

void attend_on_cpu(const py::tuple& q_view, const OptionalTuple& shift_view, const OptionalPair& sink,
                   const OptionalPair& memory, const OptionalPair& ring, const py::tuple& out_view,
                   const OptionalTuple& lse_view, double scale, int64_t last_count, int threads,
                   const std::string& isa) {
  const TensorView q = query_view(q_view);
  StreamAttentionCpuParams p;
  p.q = rows_of(q);
  p.out = rows_of(heads_view("out", out_view, q, q.size[1]));
  p.dtype = q.dtype;
  p.batch = q.size[0];
  p.tokens = q.size[1];
  p.heads = q.size[2];
  p.head_dim = q.size[3];
  ECHO_CHECK(scale > 0, "scale must be above 0, got ", scale);
  p.scale = float(scale);
  p.sink = tier("sink", sink, q);
  p.memory = tier("memory", memory, q);
  p.ring = tier("ring", ring, q);
  ECHO_CHECK(last_count == 1 || (last_count > 1 && p.ring.tokens > 0),
             "last_count must be 1, or more where the ring has a last key, got ", last_count);
  p.last_count = last_count;
  ECHO_CHECK(p.sink.tokens + p.memory.tokens + p.ring.tokens > 0, "no tier holds a key");
  if (shift_view) {
    const TensorView shift = dense_view("shift", *shift_view, DType::kF32, {kAny, kAny, 2});
    check_batch("shift", shift, p.batch);
    ECHO_CHECK(2 * shift.size[1] <= p.head_dim, "shift has more than d / 2 pairs: ", describe(shift));
    p.shift = static_cast<const float*>(shift.ptr);
    p.shift_pairs = shift.size[1];
    p.shift_batch = shift.step(0);
  }
  if (lse_view) {
    p.lse = static_cast<float*>(dense_view("lse", *lse_view, DType::kF32, {p.batch, p.heads, p.tokens}).ptr);
  }
  const Isa limit = isa_named(isa);
  py::gil_scoped_release release;
  stream_attention_cpu(p, limit, threads);
}

void append_on_cpu(const py::tuple& q_view, const py::tuple& k_view, const py::tuple& v_view,
                   const OptionalTuple& q_weight, const OptionalTuple& k_weight, const py::tuple& frame_table,
                   const OptionalTuple& key_frame_table, const py::tuple& grid_table,
                   const py::tuple& slots_view, const py::tuple& ring_k, const py::tuple& ring_v,
                   const OptionalTuple& ring_raw, double eps, const py::tuple& out_view, int threads,
                   const std::string& isa) {
  const TensorView q = query_view(q_view);
  const int64_t batch = q.size[0], tokens = q.size[1], width = q.size[2] * q.size[3];
  const TensorView grid = dense_view("grid_table", grid_table, DType::kF32, {kAny, kAny, 2});
  ECHO_CHECK(grid.size[0] > 0 && tokens % grid.size[0] == 0, "q has ", tokens,
             " tokens, no whole number of frames of ", grid.size[0]);
  const int64_t frames = tokens / grid.size[0], frame_pairs = q.size[3] / 2 - grid.size[1];
  ECHO_CHECK(frame_pairs >= 0, "grid_table has more than d / 2 pairs: ", describe(grid));
  const auto table = [&](const char* name, const py::tuple& t, int64_t& step) {
    const TensorView v = dense_view(name, t, DType::kF32, {kAny, frames, frame_pairs, 2});
    check_batch(name, v, batch);
    step = v.step(0);
    return static_cast<const float*>(v.ptr);
  };
  const TensorView ring = view("ring_k", ring_k);
  ECHO_CHECK(ring.ndim == 4 && ring.size[1] % grid.size[0] == 0, "ring_k is ", describe(ring),
             ", its frames have ", grid.size[0], " tokens");
  const int64_t slot_count = ring.size[1] / grid.size[0];
  const TensorView slots = dense_view("slots", slots_view, DType::kI64, {kAny, frames});
  check_batch("slots", slots, batch);
  RingAppendCpuParams p;
  p.q = rows_of(q);
  p.k = rows_of(heads_view("k", k_view, q, tokens));
  p.v = rows_of(heads_view("v", v_view, q, tokens));
  p.out = rows_of(heads_view("out", out_view, q, tokens));
  p.ring_k = rows_of(heads_view("ring_k", ring_k, q, ring.size[1]));
  p.ring_v = rows_of(heads_view("ring_v", ring_v, q, ring.size[1]));
  if (ring_raw) p.ring_raw = rows_of(heads_view("ring_raw", *ring_raw, q, ring.size[1]));
  if (q_weight) p.q_weight = dense_view("q_weight", *q_weight, q.dtype, {width}).ptr;
  if (k_weight) p.k_weight = dense_view("k_weight", *k_weight, q.dtype, {width}).ptr;
  p.grid_table = static_cast<const float*>(grid.ptr);
  p.frame_table = p.key_frame_table = table("frame_table", frame_table, p.table_batch);
  p.key_table_batch = p.table_batch;
  if (key_frame_table) p.key_frame_table = table("key_frame_table", *key_frame_table, p.key_table_batch);
  p.slots = static_cast<const int64_t*>(slots.ptr);
  p.slots_batch = slots.step(0);
  for (int64_t i = 0; i < slots.size[0] * frames; ++i) {
    ECHO_CHECK(p.slots[i] >= 0 && p.slots[i] < slot_count, "slot ", p.slots[i], " is outside a ring of ",
               slot_count, " slots");
  }
  p.dtype = q.dtype;
  p.batch = batch;
  p.frames = frames;
  p.frame_tokens = grid.size[0];
  p.heads = q.size[2];
  p.head_dim = q.size[3];
  p.frame_pairs = frame_pairs;
  p.eps = float(eps);
  const Isa limit = isa_named(isa);
  py::gil_scoped_release release;
  ring_append_cpu(p, limit, threads);
}

void norm_on_cpu(const py::tuple& x_view, const OptionalTuple& y_view, const OptionalTuple& gate,
                 const OptionalTuple& shift, const OptionalTuple& scale, const OptionalTuple& sum,
                 const OptionalTuple& out, double eps, bool centred, int threads, const std::string& isa) {
  const TensorView x = view("x", x_view);
  ECHO_CHECK(x.ndim == 3 && x.stride[2] == 1 && (x.dtype == DType::kF32 || x.dtype == DType::kBF16),
             "x must be float32 or bfloat16 of 3 dims, the last one contiguous, got ", describe(x));
  NormCpuParams p;
  p.x = x.ptr;
  p.dtype = x.dtype;
  p.batch = x.size[0];
  p.tokens = x.size[1];
  p.width = x.size[2];
  p.x_batch = x.stride[0];
  p.x_token = x.stride[1];
  ECHO_CHECK(p.width > 0 && p.width % kCpuNormStep == 0 && p.width <= kCpuMaxNormWidth,
             "the last dim of x must be a multiple of ", kCpuNormStep, " up to ", kCpuMaxNormWidth, ", got ",
             p.width);
  if (y_view) {
    const TensorView y = view("y", *y_view);
    ECHO_CHECK(y.dtype == x.dtype && y.ndim == 3 && y.size[0] == p.batch && y.size[1] == p.tokens &&
                   y.size[2] == p.width && y.stride[2] == 1,
               "y is ", describe(y), ", which doesn't go with x ", describe(x));
    p.y = y.ptr;
    p.y_batch = y.stride[0];
    p.y_token = y.stride[1];
  }
  p.frames = 1;
  const auto vectors = [&](const char* name, const OptionalTuple& t, int64_t& batch_step,
                           int64_t& frame_step) {
    if (!t) return static_cast<const void*>(nullptr);
    const TensorView v = view(name, *t);
    ECHO_CHECK(v.dtype == x.dtype && v.ndim == 3 && (v.size[0] == 1 || v.size[0] == p.batch) &&
                   v.size[1] > 0 && p.tokens % v.size[1] == 0 && v.size[2] == p.width && v.stride[2] == 1,
               name, " is ", describe(v), ", which doesn't go with x ", describe(x));
    ECHO_CHECK(v.size[1] == 1 || p.frames == 1 || p.frames == v.size[1], name, " has ", v.size[1],
               " frames, another vector ", p.frames);
    if (v.size[1] > 1) p.frames = v.size[1];
    batch_step = v.step(0);
    frame_step = v.step(1);
    return static_cast<const void*>(v.ptr);
  };
  p.gate = vectors("gate", gate, p.gate_batch, p.gate_frame);
  p.shift = vectors("shift", shift, p.shift_batch, p.shift_frame);
  p.scale = vectors("scale", scale, p.scale_batch, p.scale_frame);
  if (sum) p.sum = dense_view("sum", *sum, x.dtype, {p.batch, p.tokens, p.width}).ptr;
  if (out) p.out = dense_view("out", *out, x.dtype, {p.batch, p.tokens, p.width}).ptr;
  p.eps = float(eps);
  p.centred = centred;
  const Isa limit = isa_named(isa);
  py::gil_scoped_release release;
  norm_cpu(p, limit, threads);
}
}  // namespace

void define_cpu_ops(py::module_& m) {
  m.def("stream_attention_cpu", &attend_on_cpu, py::arg("q"), py::arg("shift"), py::arg("sink"),
        py::arg("memory"), py::arg("ring"), py::arg("out"), py::arg("lse"), py::arg("scale"),
        py::arg("last_count"), py::arg("threads"), py::arg("isa") = "");
  m.def("ring_append_cpu", &append_on_cpu, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_weight"),
        py::arg("k_weight"), py::arg("frame_table"), py::arg("key_frame_table"), py::arg("grid_table"),
        py::arg("slots"), py::arg("ring_k"), py::arg("ring_v"), py::arg("ring_raw"), py::arg("eps"),
        py::arg("out"), py::arg("threads"), py::arg("isa") = "");
  m.def("norm_cpu", &norm_on_cpu, py::arg("x"), py::arg("y"), py::arg("gate"), py::arg("shift"),
        py::arg("scale"), py::arg("sum"), py::arg("out"), py::arg("eps"), py::arg("centred"),
        py::arg("threads"), py::arg("isa") = "");
  m.attr("cpu_has_amx_bf16") = has_amx_bf16();
  m.def(
      "cpu_isa", [](int32_t dtype) { return name_of(stream_attention_cpu_isa(DType(dtype), best_isa())); },
      py::arg("dtype"));
}
}  // namespace echo
#endif
