"""The report of a GPU run: shares of ceilings, the baseline's ratios, missing parts by name; exit 2 without a GPU."""

import json
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
REPORT = runpy.run_path(str(BENCH / "report.py"))


def write(folder, **parts):
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part))


def a_bench(name, seconds, **extra):
    stats = {"median": seconds, "min": seconds / 2, "max": seconds * 2, "rounds": 5}
    return {"name": name, "stats": stats, "extra_info": extra}


def run(folder, *options):
    return REPORT["main"](["--logs", str(folder), "--out", str(folder), *options])


def test_shares_are_of_the_ceiling_that_binds(tmp_path):
    ceilings = {"device": "Card 9", "copy_GB/s": 2000.0, "bfloat16_TFLOP/s": 500.0}
    ops = [
        a_bench("bench_copy", 0.001, **{"GB/s": 1500.0, "TFLOP/s": 5.0, "device": "Card 9", "torch": "2"}),
        a_bench("bench_attention", 0.002, **{"GB/s": 200.0, "TFLOP/s": 450.0, "host_ms": 0.25}),
    ]
    write(tmp_path, ceilings=ceilings, ops={"benchmarks": ops})
    assert run(tmp_path, "--failed", "tests racecheck") == 0
    (path,) = tmp_path.glob("*-card-9.json")
    report = json.loads(path.read_text())
    assert [round(row["% of ceiling"]) for row in report["rows"]] == [75, 90]
    assert [row["median_ms"] for row in report["rows"]] == [1.0, 2.0]
    assert report["missing"] == ["block", "baseline"]
    assert report["failed"] == ["tests", "racecheck"]
    text = path.with_suffix(".md").read_text()
    assert "| attention | 2.000 | 1.000 - 4.000 | 450.0 | 200.0 | 90.0 | host_ms 0.25 |" in text
    assert "Failed: tests, racecheck. Missing: block, baseline." in text


def test_the_naive_loop_stands_beside_the_engine(tmp_path):
    loops = {"engine": {"median": 0.3, "ratio": 1.0}, "all": {"median": 0.75, "ratio": 2.5}}
    write(tmp_path, ceilings={"device": "Card", "copy_GB/s": 1.0}, baseline={"seconds_per_block": {"bf16": loops}})
    assert run(tmp_path) == 0
    (path,) = tmp_path.glob("*.md")
    assert "| all | 0.7500 | 2.50 |" in path.read_text()


def test_nothing_measured_is_an_error(tmp_path, capsys):
    assert run(tmp_path) == 1
    assert "nothing measured" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_run_says_so_and_exits_2(tmp_path):
    done = subprocess.run(["bash", str(BENCH / "gpu.sh"), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU: this torch sees no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())
