"""What ships, what an import may touch, and what must never be in the tree."""

import functools
import importlib
import importlib.metadata
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"echo_ext": "echo_ext/", "echo_infinity": "python/echo_infinity/"}
SOURCES = (".h", ".cpp", ".cu", ".cuh", ".inc")
MAX_BYTES = 10 << 20


@functools.cache
def tree() -> dict[str, Path]:
    """Every file of the project by its path from the root: git's list, or of an unpacked copy all there is."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        names = listing.stdout.split("\0")
    else:
        made = {"build", "dist", "__pycache__", ".venv", ".pytest_cache", ".hypothesis", ".ruff_cache", ".mypy_cache"}
        paths = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.suffix != ".so")
        names = [p.as_posix() for p in paths if not made & set(p.parts) and ".egg-info" not in str(p)]
    return {name: ROOT / name for name in names if (ROOT / name).is_file()}


def text_of(path: Path) -> str:
    """The text of a file, "" for a binary one."""
    data = path.read_bytes()
    return "" if b"\0" in data else data.decode()


def offenders(pattern: str, names) -> list[str]:
    """``path:line`` of every line of these files that matches."""
    found = re.compile(pattern)
    return [
        f"{name}:{number}: {line.strip()}"
        for name in names
        for number, line in enumerate(text_of(tree()[name]).splitlines(), 1)
        if found.search(line)
    ]


def python(code: str, cwd: Path) -> str:
    """Run ``code`` in a new interpreter away from the source tree, so that the installed package is imported."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(sdist's names, wheel's package files), made from a copy of the tree without compiling anything."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for name, path in tree().items():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    command = ["setup.py", "-q", "sdist", "-d", str(out), "build_py", "-d", str(out / "lib")]
    subprocess.run([sys.executable, *command], cwd=copy, check=True, capture_output=True)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        in_sdist = {m.name.partition("/")[2] for m in sdist.getmembers() if m.isfile()}
    in_wheel = {p.relative_to(out / "lib").as_posix() for p in (out / "lib").rglob("*") if p.is_file()}
    return in_sdist, in_wheel


def test_sdist_has_everything_the_build_needs(packed):
    build = ("csrc/", *PACKAGES.values(), "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    needed = {name for name in tree() if name.startswith(build)}
    assert needed - packed[0] == set()
    assert "csrc/bindings.cpp" in packed[0]


def test_sdist_has_no_tests(packed):
    others = ("tests/", "bench/", "docs/", "tools/", ".ci/")
    assert [name for name in packed[0] if name.startswith(others)] == []


def test_wheel_ships_every_file_of_both_packages_and_nothing_else(packed):
    expected = {name.removeprefix("python/") for name in tree() if name.startswith(tuple(PACKAGES.values()))}
    assert packed[1] == expected


def test_installed_package_is_the_one_in_this_tree():
    for package, folder in PACKAGES.items():
        installed = importlib.resources.files(package)
        missing = [
            name
            for name in tree()
            if name.startswith(folder) and not installed.joinpath(name.removeprefix(folder)).is_file()
        ]
        assert missing == [], f"install again: {package} lacks files of the tree"


def test_metadata_of_the_installed_distribution():
    meta = importlib.metadata.metadata("echo-infinity")
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Requires-Python"] == ">=3.10"
    assert meta["Version"] == importlib.import_module("echo_ext").__version__
    assert {"test", "train", "dev"} <= set(meta.get_all("Provides-Extra"))
    core = {re.match(r"[\w-]+", r)[0] for r in meta.get_all("Requires-Dist") if "extra ==" not in r}
    assert core == {"torch", "numpy", "safetensors", "tqdm", "av"}


def test_command_line_entry_point_is_callable():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="echo-infinity")
    assert callable(entry.load())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_exists(package):
    module = importlib.import_module(package)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_import_works_without_the_compiled_module_and_says_why(tmp_path):
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "echo_ext._C":
            raise ImportError("hidden by a test")
sys.meta_path.insert(0, Hide())
import echo_ext, echo_infinity
from echo_ext import _native
try:
    _native.module()
except ImportError as error:
    assert str(error) == echo_ext.build_info()["why_no_kernels"]
    print(error)
"""
    assert python(code, tmp_path).startswith("echo_ext._C is not built (hidden by a test); run: pip install")


def test_importing_every_module_makes_no_cuda_call(tmp_path):
    code = f"""
import importlib, pkgutil, torch
def forbidden(*args, **kwargs):
    raise AssertionError("CUDA was asked at import")
for name in ("is_available init _lazy_init device_count current_device current_stream default_stream synchronize "
             "get_device_name get_device_properties get_device_capability mem_get_info").split():
    setattr(torch.cuda, name, forbidden)
from echo_ext import _C
assert _C.driver_error and _C.device_info
count = 0
for package in {list(PACKAGES)}:
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
            count += 1
assert not torch.cuda.is_initialized()
print(count)
"""
    assert int(python(code, tmp_path)) >= 2


def test_csrc_knows_no_torch_and_only_the_bindings_know_python():
    sources = [name for name in tree() if name.startswith("csrc/") and name.endswith(SOURCES)]
    assert offenders(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)', sources) == []
    sources = [name for name in sources if not name.startswith("csrc/bindings")]
    assert offenders(r'#\s*include\s*[<"](pybind11|Python\.h)', sources) == []


def test_inline_assembly_lives_in_simt_alone():
    sources = [name for name in tree() if name.endswith(SOURCES) and not name.startswith("csrc/simt/")]
    assert offenders(r"\b(__)?asm(__)?\s*(volatile\s*)?\(", sources) == []


def test_no_path_of_a_machine_and_no_registry_in_the_tree():
    assert offenders(r"(^|[^\w.])/(?:work|farm|tmp|home|root|Users)/", tree()) == []
    assert offenders(r"https?://[^ )\">]*(?:pypi|debian|npm)", tree()) == []


def test_no_file_is_opened_in_a_way_that_could_run_code():
    sources = [name for name in tree() if name.startswith(tuple(PACKAGES.values())) and name.endswith(".py")]
    unsafe = r"torch\.load\((?!.*weights_only=True)|weights_only=False|trust_remote_code=True|use_safetensors=False"
    assert offenders(rf"{unsafe}|allow_pickle=True|^\s*(import|from) (pickle|marshal|shelve|dill)\b", sources) == []


def test_no_file_is_larger_than_10_mb():
    assert {name: path.stat().st_size for name, path in tree().items() if path.stat().st_size > MAX_BYTES} == {}


def test_layers_point_one_way(tmp_path):
    assert python("import echo_ext, sys; print('echo_infinity' in sys.modules)", tmp_path).strip() == "False"
    upper = [name for name in tree() if name.startswith("python/") and name.endswith(".py")]
    assert offenders(r"echo_ext\._(C|native)\b|from echo_ext import .*\b_(C|native)\b", upper) == []


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".clang-format", ".pre-commit-config.yaml"),
        *("CMakeLists.txt", "setup.py", "pyproject.toml", ".ci/run", "csrc/common", "echo_ext", "python/echo_infinity"),
        *("csrc/simt", "docs", "bench", "tools", "tests/conftest.py", "tests/numerics.py"),
    ],
)
def test_top_level_is_complete(name):
    assert (ROOT / name).exists()


def test_ci_script_is_executable():
    assert os.access(ROOT / ".ci/run", os.X_OK)
