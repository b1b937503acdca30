"""The compiled module with every kernel run on the CPU: built with g++, cached by its sources, in three variants.

``fast`` runs kernels at full speed, ``check`` sees each of their loads and stores (bounds, races, uninitialised reads),
``asan`` is for a process that preloads AddressSanitizer.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import pybind11

Variant = Literal["fast", "check", "asan"]
Schedule = Literal["forward", "reverse", "random"]
Unit = tuple[Path, list[str]]  # a source and its flags

CSRC = Path(__file__).parents[2] / "csrc"
_JOBS = 2
_COMMON = ["-std=c++17", "-DSIMT_HOST", f"-I{CSRC}", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
_SANITIZERS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
# A kernel's loads and stores call the __tsan_* functions of csrc/simt/host, which is linked in place of libtsan.
CHECKED = ["-O1", "-g1", "-fsanitize=thread", "-fno-threadsafe-statics"]
_KERNELS = {"fast": ["-O2"], "check": CHECKED, "asan": _SANITIZERS}
_RUNTIME = {"fast": ["-O3"], "check": ["-O3"], "asan": _SANITIZERS}
_LINK = {"fast": [], "check": [], "asan": ["-fsanitize=address,undefined"]}


class Counters(NamedTuple):
    """What ran since the last reset."""

    launches: int
    switches: int
    collectives: int
    bank_conflicts: int
    mutant_hits: int


def why_not() -> str | None:
    """Why kernels can't be emulated here, or None."""
    if shutil.which("g++") is None:
        return "the emulator is compiled with g++, which is not installed"
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return f"the emulator runs on x86-64 Linux, this is {platform.machine()} {sys.platform}"
    return None


class Emulator:
    """One variant of the emulated module, and what its next launches do."""

    def __init__(self, variant: Variant, library: Path) -> None:
        self.variant = variant
        self.module = _load(library, f"echo_ext_emulated_{variant}._C")
        self._lib = ctypes.CDLL(str(library))
        self._lib.simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        self._lib.simt_plant.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self.configure()

    def configure(self, schedule: Schedule = "random", seed: int = 1, race: bool = True) -> None:
        """Choose which fiber runs first, and whether accesses are checked (in the check variant)."""
        order = ("forward", "reverse", "random").index(schedule)
        self._lib.simt_configure(order, seed, race and self.variant == "check")

    @contextlib.contextmanager
    def planted(self, source: str, mutant: int) -> Iterator[None]:
        """Plant ``SIMT_SKIP``, ``SIMT_OFF`` or ``SIMT_BUG`` number ``mutant`` of the file named ``source``."""
        self.counters(reset=True)
        self._lib.simt_plant(source.encode(), mutant)
        try:
            yield
        finally:
            self._lib.simt_plant(None, 0)

    def counters(self, *, reset: bool = False) -> Counters:
        values = (ctypes.c_uint64 * len(Counters._fields))()
        self._lib.simt_counters(ctypes.byref(values), int(reset))
        return Counters(*values)


@functools.cache
def emulator(variant: Variant) -> Emulator:
    """Build what changed and load the module; once a process."""
    return Emulator(variant, build(variant))


def build(variant: Variant) -> Path:
    """Compile the bindings, every ``csrc/*/*.cu`` and the emulator; returns the shared library."""
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    units = runtime(variant)
    units += [(source, ["-O0", *include]) for source in sorted(CSRC.glob("bindings*.cpp"))]
    units.append((CSRC / "common/tensor_view.cpp", ["-O1"]))
    for source in sorted(CSRC.glob("*/*.cu")):
        if source.name != "device_info.cu":
            units.append((source, ["-xc++", *_KERNELS[variant]]))
    return link(units, _LINK[variant], "_C.so")


def runtime(variant: Variant) -> list[Unit]:
    """The emulator's own sources."""
    return [(source, _RUNTIME[variant]) for source in sorted(CSRC.glob("simt/host/*.cpp"))]


def link(units: list[Unit], flags: list[str], name: str) -> Path:
    """Compile each source whose text, headers or flags are new, and link them into ``name``.

    The emulator comes before the kernels: of a template that both instantiate the linker keeps the first, and the
    emulator must not run one whose loads and stores call it back. All are C++17, for which libstdc++ holds the strings.
    """
    folder = _cache()
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(_JOBS) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that test in parallel build once
        objects = list(pool.map(lambda unit: _object(folder, *unit), units))
        _forget_old(folder)
        target = folder / _digest(*map(str, objects), *flags) / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            _run(["g++", "-shared", *flags, *map(str, objects), "-ldl", "-o"], target)
    return target


def _object(folder: Path, source: Path, flags: list[str]) -> Path:
    command = ["g++", *_COMMON, *flags]
    target = folder / f"{source.stem}-{_digest(*command, _text_with_includes(source))}.o"
    if not target.exists():
        _run([*command, "-c", str(source), "-o"], target)
    target.touch()
    return target


def _run(command: list[str], target: Path) -> None:
    """Run a compiler that writes ``target``, which appears whole or not at all."""
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    done = subprocess.run([*command, str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    partial.replace(target)


def _text_with_includes(source: Path) -> str:
    """The text of a source and of every header of csrc/ it includes, each once."""
    seen: dict[Path, str] = {}

    def read(path: Path) -> None:
        if path in seen or not path.is_file():
            return
        seen[path] = path.read_text()
        for name in re.findall(r'^#\s*include "([^"]+)"', seen[path], re.MULTILINE):
            read(CSRC / name if (CSRC / name).is_file() else path.parent / name)

    read(source)
    return "".join(f"{path.name}\n{text}" for path, text in seen.items())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join((*parts, _compiler())).encode()).hexdigest()[:20]


@functools.cache
def _compiler() -> str:
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    return f"{version}{sys.version}{pybind11.__version__}"


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"echo-ext-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to someone else; set TMPDIR")
    return folder


def _forget_old(folder: Path) -> None:
    """Delete objects that no build has used for a month."""
    for path in folder.glob("*.o"):
        if time.time() - path.stat().st_mtime > 30 * 86400:
            path.unlink()


def _load(library: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
