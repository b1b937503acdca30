"""Runs the kernels of conformance*.cu: on the emulator, or compiled by nvcc on a GPU.

``python tests/gpu/runner.py`` on a machine with a GPU records what that GPU does into ``tests/data/intrinsics/``, for
``test_conformance.py`` to hold the emulator against.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests" / "host")]

import emulated as emulation  # noqa: E402 - a script has no pytest to set the path
from intrinsics import CASES, Case, Words, make  # noqa: E402

RECORDINGS = ROOT / "tests" / "data" / "intrinsics"
SOURCES = {"conformance": ["80", "89", "90"], "conformance_sm90": ["90a"]}


class Runner:
    """A library of the kernels, of the emulator or of a GPU."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        self._lib.conformance_name.restype = ctypes.c_char_p
        self._lib.conformance_run.argtypes = [
            *(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
            *(ctypes.c_char_p, ctypes.c_int),
        ]

    def names(self) -> list[str]:
        found: list[bytes] = []
        while (name := self._lib.conformance_name(len(found))) is not None:
            found.append(name)
        return [name.decode() for name in found]

    def run(self, name: str, given: Case) -> Words:
        out = np.zeros(len(given.expected), np.uint32) if given.found is None else given.found.copy()
        aligned = np.empty(len(given.words) + 64, np.uint32)
        start = -aligned.ctypes.data % 256 // 4
        words = aligned[start : start + len(given.words)]
        words[:] = given.words
        error = ctypes.create_string_buffer(4096)
        # numpy aligns to 16 bytes at least, which is what vectors and TMA need of the output.
        failed = self._lib.conformance_run(
            name.encode(), words.ctypes.data, len(words), out.ctypes.data, len(out), error, len(error)
        )
        if failed:
            raise RuntimeError(error.value.decode())
        return out


@functools.cache
def on_emulator() -> Runner:
    sources = [(HERE / f"{name}.cu", ["-xc++", *emulation.CHECKED, f"-I{HERE}"]) for name in SOURCES]
    return Runner(emulation.link(emulation.runtime("check") + sources, [], "conformance.so"))


@functools.cache
def on_gpu() -> Runner:
    return Runner(build_for_gpu())


def build_for_gpu() -> Path:
    """Compile the kernels with nvcc, once for each state of the sources; needs no GPU."""
    folder = ROOT / "build" / "conformance"
    texts = [path.read_text() for path in sorted([*HERE.glob("conformance*"), *(ROOT / "csrc").glob("*/*.h")])]
    library = folder / f"{zlib.crc32(''.join(texts).encode()):08x}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    common = [
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-I{ROOT / 'csrc'}",
        f"-I{HERE}",
        "-Xcompiler",
        "-fPIC",
        "-Werror",
        "all-warnings",
    ]
    objects = []
    for name, archs in SOURCES.items():
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        objects.append(str(folder / f"{name}.o"))
        nvcc(*common, *targets, "-c", str(HERE / f"{name}.cu"), "-o", objects[-1])
    partial = library.with_suffix(".tmp")
    nvcc("nvcc", "-shared", "-cudart=static", *objects, "-o", str(partial))
    return partial.rename(library)


def nvcc(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}{done.stdout}")


def why_not_nvcc() -> str | None:
    return None if shutil.which("nvcc") else "nvcc is not installed"


def runs_here(name: str) -> bool:
    """Whether the GPU of this machine has the intrinsic."""
    import torch

    sm90 = (HERE / "conformance_sm90.cu").read_text()
    return torch.cuda.get_device_capability() == (9, 0) or f"({name}," not in sm90


def record() -> Path:
    """Write what this machine's GPU does with every case."""
    import torch
    from safetensors.numpy import save_file

    device = torch.cuda.get_device_name()
    out = {name: on_gpu().run(name, make(name)) for name in CASES if runs_here(name)}
    RECORDINGS.mkdir(parents=True, exist_ok=True)
    path = RECORDINGS / f"{re.sub(r'[^a-z0-9]+', '-', device.lower())}.safetensors"
    save_file(out, path, {"device": device, "cuda": str(torch.version.cuda)})
    return path


if __name__ == "__main__":
    sys.stdout.write(f"{record()}\n")
