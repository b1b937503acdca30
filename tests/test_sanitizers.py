"""Kernels under AddressSanitizer and UBSan: overflows of local arrays, misaligned and undefined operations."""

import os
import subprocess
import sys
from pathlib import Path

import emulated as emulation
import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(emulation.why_not() is not None, reason=str(emulation.why_not()))


def sanitized(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with AddressSanitizer in front of everything it loads."""
    find = ["g++", "-print-file-name=libasan.so"]
    library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    paths = [str(HERE), str(HERE / "host"), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",  # of Python and torch, which are not instrumented
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def test_marked_tests_pass_under_sanitizers(tmp_path):
    files = [str(path) for path in sorted(HERE.rglob("test_*.py")) if "pytest.mark.sanitizers" in path.read_text()]
    files.remove(__file__)
    options = ["-q", "-m", "sanitizers", "--emulated=asan", "-p", "no:cacheprovider", f"--rootdir={HERE.parent}"]
    done = sanitized("-m", "pytest", *options, *files, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("mutant", [0, 4], ids=["intact", "planted"])
def test_sanitizer_sees_a_store_past_the_end(mutant, tmp_path):
    code = f"""
import torch, emulated
from echo_ext import _native
from echo_ext.rope import frame_table, grid_table, rope_rotate
emulator = emulated.emulator("asan")
_native._C = emulator.module
x = torch.randn(1, 1, 3, 6)
with emulator.planted("rope_rotate.cuh", {mutant}):
    rope_rotate(x, frame_table([1], 6), grid_table([1], [1], 6), backend="kernel")
print("finished")
"""
    done = sanitized("-c", code, cwd=tmp_path)
    if mutant:
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
        assert "rope_rotate.cuh" in done.stderr
    else:
        assert done.stdout == "finished\n", done.stderr[-4000:]
