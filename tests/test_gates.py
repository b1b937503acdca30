"""What can be judged without a GPU: the module's machine code, what it links, where CUDA may be named."""

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from echo_ext import _native

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("sass_gate", ROOT / "tools" / "sass_gate.py")
sass_gate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sass_gate)

MODULE = Path(_native.module().__file__)
DISASSEMBLY = """
//--------------------- .text.kernel --------------------------
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0010*/              @!PT LDS RZ, [RZ] ;
        /*0020*/               @P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/              @!P1 LDL R2, [R1+0x4] ;
        /*0060*/                   EXIT ;
        /*0070*/                   NOP ;
"""


def test_instructions_are_counted_but_for_padding():
    assert sass_gate.count(DISASSEMBLY) == {"kernel": {"instructions": 6, "LDGSTS": 1, "HMMA": 2, "BAR": 1, "LDL": 1}}


BUDGET = {"registers": 100, "instructions": 1000, "HMMA": 32}


@pytest.mark.parametrize(
    ("counts", "problems"),
    [
        (BUDGET, []),
        ({**BUDGET, "registers": 103, "instructions": 970}, []),
        ({**BUDGET, "registers": 104}, ["104 registers, budget 100 +- 3%"]),
        ({**BUDGET, "instructions": 969}, ["969 instructions, budget 1000 +- 3%"]),
        ({**BUDGET, "HMMA": 33}, ["33 HMMA, budget 32"]),
        ({**BUDGET, "BAR": 1}, ["1 BAR, budget 0"]),
        ({**BUDGET, "STL": 2}, ["uses local memory: {'STL': 2}"]),
    ],
    ids=str,
)
def test_kernels_are_judged_by_their_budget(counts, problems):
    assert sass_gate.judge(counts, BUDGET) == problems


def test_kernels_without_budget_and_budgets_without_kernel_are_reported():
    code, budget = {"sm_80": {"new": BUDGET}}, {"sm_80": {"old": BUDGET}, "sm_90": {"old": BUDGET}}
    assert sass_gate.compare(code, budget) == [
        "sm_80 old: not in the module",
        "sm_80 new: has no budget",
        "if this is meant: python tools/sass_gate.py --write",
    ]


@functools.cache
def machine_code():
    return sass_gate.read(MODULE)


def test_machine_code_is_within_its_budget():
    if reason := sass_gate.why_not(MODULE):
        pytest.skip(reason)
    assert sass_gate.compare(machine_code(), sass_gate.load()["code"]) == []


def test_module_has_code_for_every_architecture_and_ptx_for_later_ones():
    if reason := sass_gate.why_not(MODULE):
        pytest.skip(reason)
    meant = _native.module().cuda_archs.split(",")
    built = {f"sm_{arch.removesuffix('-real')}" for arch in meant}
    if any(arch.startswith("sm_90") for arch in built) and list(ROOT.glob("csrc/*/*_sm90.cu")):
        built.add("sm_90a")
    assert set(machine_code()) == built
    assert sass_gate.ptx_of(MODULE) == {f"sm_{arch}" for arch in meant if not arch.endswith("-real")}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is missing: install binutils")
def test_module_links_no_cuda_and_no_torch():
    dynamic = subprocess.run(["readelf", "-d", str(MODULE)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic)
    assert needed
    assert [name for name in needed if re.search("cuda|cudart|nv|torch|c10", name)] == []


def test_cuda_is_named_by_the_seam_alone():
    """A kernel written on csrc/simt alone runs on the CPU too."""
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("csrc/*/*.cu*")
        if re.search(r"#\s*include\s*<cu|\b__(global|shared|device|launch_bounds)__|<<<", path.read_text())
    }
    assert found == {"csrc/common/device_info.cu"}
