"""The border between Python and C++: tuples cross it, mistakes return as ValueError, import asks the driver nothing."""

import pytest
import torch

from echo_ext import _native, build_info

FLOAT32 = _native.DTYPE_CODE[torch.float32]


@pytest.mark.parametrize("dtype", [*_native.DTYPE_CODE, torch.int64], ids=str)
def test_dtype_codes_mean_the_same_on_both_sides(dtype):
    text = _native.module().describe(_native.view(torch.zeros(2, 3, dtype=dtype)))
    assert text == f"{str(dtype).removeprefix('torch.')} (2, 3), strides (3, 1)"


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(()), "float32 (), strides ()"),
        (torch.zeros(7), "float32 (7,), strides (1,)"),
        (torch.zeros(0, 4), "float32 (0, 4), strides (4, 1)"),
        (torch.zeros(4, 6)[1:3, ::2], "float32 (2, 3), strides (6, 2)"),
        (torch.zeros(2, 3, 4, 5, 6).transpose(1, 3), "float32 (2, 5, 4, 3, 6), strides (360, 6, 30, 120, 1)"),
        (torch.zeros(1).expand(2**40), f"float32 ({2**40},), strides (0,)"),
    ],
    ids=["scalar", "vector", "empty", "slice", "transposed", "past-32-bits"],
)
def test_shape_and_strides_cross_the_border(x, text):
    assert _native.module().describe(_native.view(x)) == text


def test_view_of_a_slice_points_at_its_first_element():
    x = torch.zeros(4, 6)
    assert _native.view(x[1:, 2:])[0] == x.data_ptr() + 8 * x.element_size()


def test_view_rejects_a_dtype_that_is_not_built():
    with pytest.raises(ValueError, match=r"dtype torch.float64 is not built; convert to one of torch.float32"):
        _native.view(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((0, FLOAT32, (2,)), r"x must be \(data_ptr, dtype code, shape, strides\), got 3 items"),
        ((0, FLOAT32, (1,) * 6, (1,) * 6), "x must have at most 5 dims, got 6"),
        ((0, FLOAT32, (2, 3), (1,)), "x has 2 sizes but 1 strides"),
        ((0, FLOAT32, (2, -3), (1, 1)), "x has size -3 in dim 1"),
        ((0, 9, (2,), (1,)), "dtype code must be 0 to 3, got 9"),
    ],
    ids=["items", "dims", "strides", "negative", "dtype"],
)
def test_binding_rejects_what_python_missed(bad, message):
    with pytest.raises(ValueError, match=f"echo_ext: {message}"):
        _native.module().describe(bad)


def test_build_info_agrees_with_the_module():
    info = build_info()
    built = _native.module()
    assert (info["cuda"], info["archs"]) == (built.cuda_version, built.cuda_archs)
    assert (info["cuda"] is None) == (info["archs"] == "")
    assert info["why_no_kernels"] == _native.why_no_kernels()


def test_exactly_a_machine_without_kernels_has_a_reason():
    assert not _native.module().emulated
    runs = _native.module().cuda_version is not None and torch.cuda.is_available()
    reason = _native.why_no_kernels()
    assert (reason == "") == (runs and _native.module().driver_error() == "")
    assert len(build_info()["attention"]) == len(build_info()["devices"])
    assert len(build_info()["devices"]) == (torch.cuda.device_count() if reason == "" else 0)


def test_reason_is_a_constant_to_the_compiler():
    def add_one_without_kernels(x):
        return x + 1 if _native.why_no_kernels() else x

    compiled = torch.compile(add_one_without_kernels, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), add_one_without_kernels(torch.zeros(2)))


def test_a_device_without_kernels_has_no_streams():
    assert _native.stream_of(torch.zeros(1)) == (0, 0)


def test_emulated_module_stands_in_for_the_compiled_one(emulated):
    assert _native.module() is emulated.module
    cpu = dict.fromkeys(("float32", "float16", "bfloat16"), "PyTorch: this build has no CPU kernels")
    assert build_info() == {
        "cuda": None,
        "archs": "",
        "devices": (),
        "attention": (),
        "why_no_kernels": "",
        "cpu": cpu,
    }


@pytest.mark.gpu
def test_stream_of_is_the_stream_current_on_the_device():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert _native.stream_of(torch.zeros(1, device="cuda")) == (stream.device_index, stream.cuda_stream)


@pytest.mark.gpu
def test_device_lines_name_the_devices_torch_sees():
    for i, line in enumerate(build_info()["devices"]):
        major, minor = torch.cuda.get_device_capability(i)
        assert line.startswith(f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}, ")
