#!/usr/bin/env python3
"""Compare the machine code of every kernel in the built module with ``sass_budget.json``; needs no GPU.

    python tools/sass_gate.py           # what differs; exit status 1 if anything does
    python tools/sass_gate.py --write   # make the module's code the budget

Exact: instructions of tensor cores, asynchronous copies and barriers. Within 3 %: registers and instructions. Never:
local memory, which is where spilled registers go. The disassemblers are the packages ``nvidia-cuda-nvdisasm`` and
``nvidia-cuda-cuobjdump``.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

BUDGET = Path(__file__).with_name("sass_budget.json")
EXACT = ("HMMA", "HGMMA", "LDSM", "STSM", "LDGSTS", "UTMALDG", "UTMASTG", "BAR", "WARPGROUP")
NEVER = ("LDL", "STL")
SLACK = 0.03

Kernel = dict[str, int]
Code = dict[str, dict[str, Kernel]]  # architecture -> kernel -> counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the module's code the budget")
    parser.add_argument("--module", type=Path, help="the compiled module; default: echo_ext._C")
    args = parser.parse_args()
    module = args.module or built_module()
    code = read(module)
    if args.write:
        if spills := [line for line in compare(code, code) if "local memory" in line]:
            print("\n".join(spills))
            return 1
        write(code, compiler_of(module))
        print(f"{BUDGET}: {sum(map(len, code.values()))} kernels")
        return 0
    wrong = compare(code, load()["code"])
    print("\n".join(wrong) or f"{sum(map(len, code.values()))} kernels are within their budget")
    return 1 if wrong else 0


def built_module() -> Path:
    """Where ``echo_ext._C`` lies, found without importing it."""
    package = importlib.util.find_spec("echo_ext")
    folders = map(Path, (package.submodule_search_locations or []) if package else [])
    found = [path for folder in folders for path in sorted(folder.glob("_C.*so"))]
    if not found:
        raise FileNotFoundError("echo_ext._C is not built; run: pip install -e . --no-build-isolation")
    return found[0]


def why_not(module: Path) -> str | None:
    """Why the machine code of a module can't be judged here, or None."""
    compiler, meant = compiler_of(module), load()["nvcc"]
    if compiler != meant:
        return f"the budget is of nvcc {meant}, the module of {compiler or 'a compiler without CUDA'}"
    missing = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return f"{missing[0]} is missing: pip install nvidia-cuda-{missing[0]}" if missing else None


@functools.cache
def tool(name: str) -> str | None:
    """The path of a disassembler: of its package, else of a toolkit on PATH."""
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or []) if nvidia else []:
        for path in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(path)
    return shutil.which(name)


def run(*command: str | None, cwd: str | None = None) -> str:
    if command[0] is None:
        raise FileNotFoundError("install nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump")
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=True).stdout


def read(module: Path) -> Code:
    """Count the instructions of every kernel of every architecture."""
    code: Code = {}
    with tempfile.TemporaryDirectory() as folder:
        run(tool("cuobjdump"), "-xelf", "all", str(module.resolve()), cwd=folder)
        for cubin in sorted(Path(folder).iterdir()):
            arch = cubin.suffixes[-2].removeprefix(".")
            kernels = code.setdefault(arch, {})
            registers = re.findall(r"Function (\S+):\s+REG:(\d+)", run(tool("cuobjdump"), "-res-usage", str(cubin)))
            counts = count(run(tool("nvdisasm"), "-c", str(cubin)))
            kernels.update({name: {"registers": int(n), **counts[name]} for name, n in registers})
    names = demangled(sorted({name for kernels in code.values() for name in kernels}))
    return {arch: {names[k]: v for k, v in sorted(kernels.items())} for arch, kernels in sorted(code.items())}


def ptx_of(module: Path) -> set[str]:
    """Architectures whose PTX the module carries."""
    return set(re.findall(r"\.(sm_\w+)\.ptx", run(tool("cuobjdump"), "-lptx", str(module))))


def count(disassembly: str) -> dict[str, Kernel]:
    """Instructions, and those of the budgeted groups, of each function in nvdisasm's output."""
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in disassembly.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^\s,]+)", line):
            counts = found.setdefault(section[1], Counter())
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            predicate, name = instruction.groups()
            if name == "NOP" or (predicate or "").startswith("@!PT"):  # padding, never executed
                continue
            counts["instructions"] += 1
            if name in EXACT + NEVER:
                counts[name] += 1
    return {name: dict(counts) for name, counts in found.items()}


def demangled(names: list[str]) -> dict[str, str]:
    """``namespace::kernel<arguments>``, without the parameters."""
    if not names:
        return {}
    plain = run("c++filt", *names).splitlines()
    plain = [re.sub(r"_GLOBAL__N__\w+::", "", name) for name in plain]  # a hash of the path
    short = [re.sub(r"\(.*", "", name).removeprefix("void ").replace("echo::", "") for name in plain]
    unique = [s if short.count(s) == 1 else p for s, p in zip(short, plain, strict=True)]
    return dict(zip(names, unique, strict=True))


def compare(code: Code, budget: Code) -> list[str]:
    """What differs from the budget, a line each; architectures that the module was not built for are not judged."""
    wrong = []
    for arch, kernels in code.items():
        allowed = budget.get(arch, {})
        wrong += [f"{arch} {name}: not in the module" for name in allowed.keys() - kernels.keys()]
        for name, counts in kernels.items():
            wrong += [f"{arch} {name}: {problem}" for problem in judge(counts, allowed.get(name))]
    if wrong:
        wrong.append("if this is meant: python tools/sass_gate.py --write")
    return wrong


def judge(counts: Kernel, allowed: Kernel | None) -> list[str]:
    spills = {name: counts[name] for name in NEVER if counts.get(name)}
    problems = [f"uses local memory: {spills}"] if spills else []
    if allowed is None:
        return [*problems, "has no budget"]
    differs = [name for name in EXACT if counts.get(name, 0) != allowed.get(name, 0)]
    problems += [f"{counts.get(name, 0)} {name}, budget {allowed.get(name, 0)}" for name in differs]
    near = ("registers", "instructions")
    off = [name for name in near if abs(counts[name] - allowed[name]) > SLACK * allowed[name]]
    return problems + [f"{counts[name]} {name}, budget {allowed[name]} +- {SLACK:.0%}" for name in off]


def load() -> dict:
    """``nvcc``: the version the budget holds for; ``code``."""
    return json.loads(BUDGET.read_text())


def write(code: Code, compiler: str | None) -> None:
    """A line a kernel, so that a change shows as one."""
    lines = []
    for arch, kernels in code.items():
        rows = [f"   {json.dumps(name)}: {json.dumps(counts)}" for name, counts in kernels.items()]
        lines.append(f"  {json.dumps(arch)}: {{\n" + ",\n".join(rows) + "\n  }")
    text = f'{{\n "nvcc": {json.dumps(compiler)},\n "code": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    BUDGET.write_text(text)


def compiler_of(module: Path) -> str | None:
    """The version of nvcc that built a module, None if none did."""
    spec = importlib.util.spec_from_file_location("_C", module)
    if spec is None or spec.loader is None:
        raise ImportError(f"{module} is no extension module")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.cuda_version


if __name__ == "__main__":
    sys.exit(main())
