"""Devices, threads, seeds and the NaN poison shared by every test."""

import random
import sys
import zlib

import emulated as emulation
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

import echo_ext
from echo_ext import _native

WHY_NO_KERNELS = echo_ext.build_info()["why_no_kernels"]

# Tests are small tensors: more threads only fight over the cores. OMP_NUM_THREADS can ask for fewer.
torch.set_num_threads(min(torch.get_num_threads(), 2))


# A busy machine is slow and not wrong.
hypothesis_settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("busy")


def pytest_addoption(parser):
    parser.addoption(
        "--emulated", default="check", choices=["fast", "check", "asan"], help="variant of the emulated kernels"
    )


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason=f"no kernels here: {WHY_NO_KERNELS}")
    for item in items:
        if item.get_closest_marker("gpu") and WHY_NO_KERNELS:
            item.add_marker(skip)


@pytest.fixture
def threads():
    """Set the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def emulated(request):
    """Run kernels on CPU tensors: the emulated module in place of ``_C``. Parametrise indirectly by another variant.

    The order in which threads run is random, and the same for the same test.
    """
    if reason := emulation.why_not():
        pytest.skip(reason)
    emulator = emulation.emulator(getattr(request, "param", request.config.getoption("--emulated")))
    emulator.configure(seed=zlib.crc32(request.node.nodeid.encode()))
    emulator.counters(reset=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "_C", emulator.module)
        _forget_machine()
        yield emulator
    _forget_machine()


def _forget_machine():
    """What was probed and compiled under the other module no longer holds."""
    _native._probe.cache_clear()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _seeded():
    """The same draws in every test, whatever ran before; fixtures of a wider scope seed themselves."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - seeds what a library may draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poisoned_empty():
    """Code that forgets to write an element must fail, not pass on lucky zeros."""

    def poisoned(plain):
        def fill(*args, **kwargs):
            x = plain(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() and not x.requires_grad else x

        return fill

    with torch.device("cpu"):
        torch.empty(0)  # device contexts know the constructors they first saw: the plain ones, or meta would allocate
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
