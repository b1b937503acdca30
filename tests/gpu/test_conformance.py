"""Every intrinsic on the emulator, on the GPU and in numpy: moves to the bit, sums within 1e-5."""

import subprocess
import sys

import emulated as emulation
import numpy as np
import pytest
import runner
import torch
from intrinsics import CASES, make
from numerics import assert_same_bits, assert_sum_equal
from runner import RECORDINGS, SOURCES, on_emulator, on_gpu
from safetensors.numpy import load_file

emulates = pytest.mark.skipif(emulation.why_not() is not None, reason=str(emulation.why_not()))


def check(case, words, expected):
    if case.kind == "bits":
        assert_same_bits(torch.from_numpy(words.view(np.int32)), torch.from_numpy(expected.view(np.int32)))
    else:
        assert_sum_equal(*(torch.from_numpy(w.view(np.float32)) for w in (words, expected)))


@emulates
def test_every_kernel_has_a_statement():
    assert sorted(on_emulator().names()) == sorted(CASES)


@emulates
@pytest.mark.parametrize("name", CASES)
def test_emulator_does_what_is_stated(name):
    case = make(name)
    check(case, on_emulator().run(name, case), case.expected)


@emulates
@pytest.mark.parametrize("recording", sorted(RECORDINGS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_emulator_does_what_a_gpu_did(recording):
    for name, words in load_file(recording).items():
        case = make(name)
        check(case, on_emulator().run(name, case), words)


@pytest.mark.skipif(runner.why_not_nvcc() is not None, reason=str(runner.why_not_nvcc()))
def test_kernels_compile_for_the_gpu_without_a_warning():
    assert runner.build_for_gpu().exists()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_does_what_is_stated(name):
    if not runner.runs_here(name):
        pytest.skip(f"{name} exists in sm_90a alone, this is {torch.cuda.get_device_name()}")
    case = make(name)
    words = on_gpu().run(name, case)
    check(case, words, case.expected)
    check(case, words, on_emulator().run(name, case))


def test_statements_are_the_same_on_every_machine():
    code = "import intrinsics; print(*(f'{intrinsics.make(n).words.sum(dtype=int)}' for n in intrinsics.CASES))"
    sums = subprocess.run([sys.executable, "-c", code], cwd=runner.HERE, capture_output=True, text=True, check=True)
    assert sums.stdout.split() == [str(make(name).words.sum(dtype=int)) for name in CASES]
    assert set(SOURCES) == {path.stem for path in runner.HERE.glob("*.cu")}
