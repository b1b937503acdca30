// The only file that knows Python. Tuples in, launch out; every kernel has one m.def here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
  m.def("describe", [](const py::tuple& x) { return describe(view("x", x)); }, py::arg("x"));
}
