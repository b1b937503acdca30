"""Every barrier, wait, fence and bound of a kernel has a planted fault, and the kernel's tests notice each of them.

``mutant_cases/<kernel>.py`` holds ``run()``, which launches the kernel of ``csrc/*/<kernel>.cuh`` and raises
AssertionError where the result is wrong; the emulator raises RuntimeError itself.
"""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted(path for path in ROOT.glob("csrc/*/*.cuh") if path.parent.name != "simt")

SYNCHRONISES = re.compile(
    r"\b(__sync\w+|bar_sync|bar_arrive|cp_async_commit|cp_async_wait|mbar_(?!init\b)\w+|\w*fence\w*"
    r"|wgmma_(?:commit|wait)|tma_store_(?:commit|wait\w*)|__threadfence\w*)\s*(?:<[^<>;]*>)?\s*\("
)
COMPARES = re.compile(r"(?<=\s)(<|>|<=|>=)(?=\s)")
CONSTANT = re.compile(r"k[A-Z]\w*|sizeof|int|unsigned|int64_t|uint32_t|size_t|[A-Z]\w*")


def mutants_of(path: Path) -> list[int]:
    return [int(n) for n in re.findall(r"\bSIMT_(?:SKIP|OFF|BUG)\(\s*(\d+)", code_of(path.read_text()))]


def code_of(text: str) -> str:
    """Source without comments and directives, each line where it was; ``// no mutant: why`` empties its line."""
    text = re.sub(r"^.*// no mutant: \w.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"//.*|^\s*#.*", "", text, flags=re.MULTILINE)
    return re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)


def operand(code: str, at: int, step: int) -> str:
    """What stands on one side of a comparison: up to the end of its parentheses or an operator that binds less."""
    opening, closing = ("({[", ")}]")[::step]
    depth, i = 0, at
    while 0 <= i < len(code):
        depth += (code[i] in opening) - (code[i] in closing)
        if depth < 0 or (depth == 0 and (code[i] in ";,?{}" or code[i : i + 2] in ("&&", "||", "= ", ": "))):
            break
        i += step
    side = code[i + 1 : at + 1] if step < 0 else code[at:i]
    return side.split("return ")[-1]


def is_constant(expression: str) -> bool:
    return all(CONSTANT.fullmatch(name) for name in re.findall(r"[A-Za-z_]\w*", expression))


def unguarded(text: str) -> list[str]:
    """``line: source`` of each synchronisation and each runtime bound that stands in no mutant."""
    code = code_of(text)
    found = [m.start() for m in SYNCHRONISES.finditer(code) if not may_be_skipped(code, m.start())]
    found += [m.start() for m in COMPARES.finditer(code) if not may_be_off(code, *m.span())]
    lines = text.splitlines()
    return [f"{n}: {lines[n - 1].strip()}" for n in sorted({code.count("\n", 0, i) + 1 for i in found})]


def may_be_skipped(code: str, at: int) -> bool:
    return re.search(r"\bSIMT_(SKIP\(\s*\d+,|BUG\()", statement(code, at)[0]) is not None


def may_be_off(code: str, first: int, last: int) -> bool:
    """Whether a comparison has a mutant, or a side known to the compiler and so none to be wrong at run time."""
    sides = operand(code, first - 1, -1), operand(code, last, 1)
    if any("SIMT_OFF(" in side or is_constant(side) for side in sides):
        return True
    return "SIMT_BUG(" in "".join(statement(code, first))


def statement(code: str, at: int) -> tuple[str, str]:
    """What of its statement stands before and after a position."""
    first = max(code.rfind(c, 0, at) for c in ";{}") + 1
    last = min((i for i in (code.find(c, at) for c in ";{}") if i >= 0), default=len(code))
    return code[first:at], code[at:last]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_every_synchronisation_and_bound_has_a_mutant(kernel):
    assert unguarded(kernel.read_text()) == []
    assert sorted(mutants_of(kernel)) == list(range(1, len(mutants_of(kernel)) + 1))


@pytest.mark.parametrize(
    ("source", "offends"),
    [
        ("SIMT_SKIP(1, __syncthreads());", False),
        ("__syncthreads();", True),
        ("simt::cp_async_wait<0>();", True),
        ("SIMT_SKIP(2, simt::cp_async_wait<1>());", False),
        ("if (!SIMT_BUG(3)) simt::bar_arrive(1, 128);", False),
        ("if (row < p.rows) return;", True),
        ("if (row < SIMT_OFF(1, p.rows)) return;", False),
        ("if (i == 0 && SIMT_OFF(1, p.rows) > row) return;", False),
        ("const bool in = row < SIMT_OFF(1, p.rows) && column < p.columns;", True),
        ("for (int i = 0; i < kRows; ++i) f<kRows>(i);", False),
        ("for (int i = tid; i < p.rows; i += 32) f(i);", True),
        ("for (int i = 0; i < Tile::kRows * 2; ++i) f(i);", False),
        ("m = x > m ? x : m;  // no mutant: a maximum", False),
        ("// row < p.rows", False),
        ("x = a[i] + (row < p.rows ? f(1, 2) : 0);", True),
        ("x = f(row, 3) < SIMT_OFF(2, p.rows - f(1, 2)) ? 1 : 0;", False),
    ],
)
def test_the_scanner_finds_what_has_no_mutant(source, offends):
    assert bool(unguarded(source)) == offends


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
def test_the_case_passes_without_a_mutant(kernel, schedule, emulated):
    emulated.configure(schedule)
    importlib.import_module(f"mutant_cases.{kernel.stem}").run()
    assert emulated.counters().launches > 0


@pytest.mark.parametrize(
    ("kernel", "mutant"),
    [
        pytest.param(kernel, mutant, id=f"{kernel.stem}-{mutant}")
        for kernel in KERNELS
        for mutant in sorted(set(mutants_of(kernel)))
    ],
)
def test_mutant_is_noticed(kernel, mutant, emulated):
    case = importlib.import_module(f"mutant_cases.{kernel.stem}")
    with emulated.planted(kernel.name, mutant):
        for schedule in ("random", "forward", "reverse"):
            emulated.configure(schedule)
            try:
                case.run()
            except (AssertionError, RuntimeError):
                assert emulated.counters().mutant_hits > 0
                return
    assert emulated.counters().mutant_hits > 0, "the case never reaches it"
    pytest.fail("nothing notices")
