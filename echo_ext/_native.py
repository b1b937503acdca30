"""Finds the compiled module and turns tensors into what it takes. Nothing else imports ``_C``."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_C: ModuleType | None
_NOT_BUILT = "echo_ext._C was taken away"  # by a test
try:
    from echo_ext import _C
except ImportError as error:  # a source tree that was never built
    _C = None
    _NOT_BUILT = f"echo_ext._C is not built ({error}); run: pip install -e . --no-build-isolation"

TensorTuple = tuple[int, int, tuple[int, ...], tuple[int, ...]]
Stream = tuple[int, int]

DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # what kernels compute in
_VIEW_CODE = {**DTYPE_CODE, torch.int64: 3}


def why_no_kernels() -> str:
    """Return "" if CUDA kernels run here, else the reason. The first call asks the driver; import never does."""
    return _probe()


# What torch.compiler.assume_constant_result sets, without the two seconds that importing the compiler takes.
why_no_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def emulated() -> bool:
    """Whether the module runs its kernels on the CPU, as the one that the tests put in place of ``_C`` does."""
    return _C is not None and _C.emulated


emulated._dynamo_marked_constant = True  # type: ignore[attr-defined]


def capability(device: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few where kernels are emulated."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _probe() -> str:
    if _C is None:
        return _NOT_BUILT
    if _C.emulated:
        return ""
    if _C.cuda_version is None:
        return "echo_ext was built without nvcc"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    return _C.driver_error()  # such as a driver older than the toolkit, or a chip no kernel was built for


def why_no_cpu_kernels(dtype: torch.dtype) -> str:
    """Return "" if CPU kernels run here in ``dtype``, else the reason."""
    if _C is None:
        return _NOT_BUILT
    if not hasattr(_C, "cpu_isa"):
        return "this build has no CPU kernels"
    if dtype not in DTYPE_CODE or _C.cpu_isa(DTYPE_CODE[dtype]) == "none":
        return f"no CPU kernel is built for {dtype} and this CPU"
    return ""


why_no_cpu_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cpu_has_amx() -> bool:
    """Whether the CPU has AMX in bfloat16, which PyTorch's attention uses and no kernel here does."""
    return _C is not None and getattr(_C, "cpu_has_amx_bf16", False)


cpu_has_amx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def build_info() -> dict[str, Any]:
    """Say what was built and what this machine can run; safe to call anywhere.

    Returns:
        ``cuda`` toolkit version or None, ``archs`` the kernels were built for, ``devices`` one line a CUDA device,
        ``attention`` which attention each would run and why, ``why_no_kernels`` the reason no CUDA kernel runs, ""
        where they do; ``cpu`` by dtype the instruction set that CPU kernels run with, or "PyTorch" and the reason.
    """
    from echo_ext._attention import on_device  # it imports this module

    cuda, archs = (_C.cuda_version, _C.cuda_archs) if _C else (None, "")
    reason = why_no_kernels()
    devices = _C.device_info() if _C and not reason else ()
    attention = tuple(on_device(i) for i in range(len(devices)))
    cpu = {}
    for dtype, code in DTYPE_CODE.items():
        why_not = why_no_cpu_kernels(dtype)
        cpu[str(dtype).removeprefix("torch.")] = f"PyTorch: {why_not}" if why_not else module().cpu_isa(code)
    return {
        "cuda": cuda,
        "archs": archs,
        "devices": devices,
        "attention": attention,
        "why_no_kernels": reason,
        "cpu": cpu,
    }


def module() -> ModuleType:
    """Return the compiled module.

    Raises:
        ImportError: it was never built; says how to build it.
    """
    if _C is None:
        raise ImportError(_NOT_BUILT)
    return _C


def view(x: Tensor) -> TensorTuple:
    """Return (data_ptr, dtype code, shape, strides): all a kernel needs to know of ``x``.

    Raises:
        ValueError: no kernel is built for ``x.dtype``.
    """
    if x.dtype not in _VIEW_CODE:
        raise ValueError(f"dtype {x.dtype} is not built; convert to one of {', '.join(map(str, DTYPE_CODE))}")
    return x.data_ptr(), _VIEW_CODE[x.dtype], tuple(x.shape), x.stride()


def stream_of(x: Tensor) -> Stream:
    """Return (device index, raw handle) of the stream current where ``x`` lies, so that graph capture sees launches."""
    if x.device.type == "cpu":
        return 0, 0  # the emulator has no streams
    stream = torch.cuda.current_stream(x.device)
    return stream.device_index, stream.cuda_stream
