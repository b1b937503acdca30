"""The instruction sets that CPU kernels are built for, as test parameters: those this CPU lacks are skipped."""

import pytest
import torch

from echo_ext import _native

_ALL = ("avx2", "avx512", "avx512_bf16")
WHY_NONE = _native.why_no_cpu_kernels(torch.bfloat16)
_BEST = "" if WHY_NONE else _native.module().cpu_isa(_native.DTYPE_CODE[torch.bfloat16])


def _param(isa: str):
    runs = not WHY_NONE and _ALL.index(isa) <= _ALL.index(_BEST)
    reason = WHY_NONE or f"this CPU has {_BEST}, not {isa}"
    return pytest.param(isa, marks=pytest.mark.skipif(not runs, reason=reason))


INSTRUCTION_SETS = [_param(isa) for isa in _ALL]
needs_kernels = pytest.mark.skipif(bool(WHY_NONE), reason=WHY_NONE)
