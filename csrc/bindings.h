// How a binding turns Python's arguments into views. With bindings*.cpp all of C++ that knows Python.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>
#include <utility>

#include "common/check.h"
#include "common/tensor_view.h"
#include "simt/stream.h"
#if defined(SIMT_HOST)
#include "simt/host/runtime.h"
#endif

namespace py = pybind11;

namespace echo {
// (data_ptr, dtype code, shape, strides) as built by echo_ext._native.view().
TensorView view(const char* name, const py::tuple& t);

inline constexpr int64_t kAny = -1;

// Raises ValueError unless the view has this shape, kAny standing for any size, and a dense last dim.
void check_shape(const char* name, const TensorView& v, std::initializer_list<int64_t> shape);
void check_dtype(const char* name, const TensorView& v, DType dtype);
void check_contiguous(const char* name, const TensorView& v);
// A table of cos and sin that kernels read row by row.
void check_pairs(const char* name, const TensorView& v);
// Tables that rotate the tokens of x, (B, T, H, d).
void check_tables(const char* x_name, const TensorView& x, const char* name, const TensorView& frame,
                  const TensorView& grid);
// What kernels read 16 bytes at a time.
void check_vectors(const char* name, const TensorView& v);
void check_batch(const char* name, const TensorView& v, int64_t batch);

template <size_t N>
void set_steps(int64_t (&to)[N], const TensorView& v) {
  for (int i = 0; i < int(N); ++i) to[i] = v.step(i);
}

using Stream = std::pair<int, uintptr_t>;  // (device, handle) as built by echo_ext._native.stream_of()

// One call of a kernel: names the tensors it may touch, then launches without the interpreter's lock.
class Call {
 public:
  explicit Call(Stream stream) : stream_{stream.first, reinterpret_cast<void*>(stream.second)} {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // What the kernel reads, and what it writes.
  TensorView in(const char* name, const py::tuple& t) { return add(name, t, false); }
  TensorView out(const char* name, const py::tuple& t) { return add(name, t, true); }
  std::optional<TensorView> in(const char* name, const std::optional<py::tuple>& t) {
    return t ? std::optional<TensorView>(add(name, *t, false)) : std::nullopt;
  }
  std::optional<TensorView> out(const char* name, const std::optional<py::tuple>& t) {
    return t ? std::optional<TensorView>(add(name, *t, true)) : std::nullopt;
  }

  template <class Params>
  void launch(void (*fwd)(const Params&, simt::Stream), const Params& params) {
    const py::gil_scoped_release release;
    fwd(params, stream_);
  }

#if defined(SIMT_HOST)
  ~Call() { simt::clear_buffers(); }
#endif

 private:
  TensorView add(const char* name, const py::tuple& t, [[maybe_unused]] bool writable) {
    const TensorView v = view(name, t);
#if defined(SIMT_HOST)
    simt::add_buffer(name, v.ptr, item_bytes(v.dtype), v.ndim, v.size, v.stride, writable);
#endif
    return v;
  }

  simt::Stream stream_;
};

void define_token_ops(py::module_& m);
void define_cpu_ops(py::module_& m);
}  // namespace echo
