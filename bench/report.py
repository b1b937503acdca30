"""Put what bench/gpu.sh measured into one JSON file and one table.

    python bench/report.py --logs FOLDER --out bench/results

Reads ``ceilings.json``, ``ops.json`` and ``block.json`` (pytest-benchmark's) and ``baseline.json``; what is missing is
left out and named.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

PARTS = ("ceilings", "ops", "block", "baseline")


def main(arguments: list[str] | None = None) -> int:
    """Read the parts, write the report; 1 where nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, required=True, help="folder of the parts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--failed", default="", help="steps that failed, to be named in the report")
    args = parser.parse_args(arguments)
    parts = {name: _read(args.logs / f"{name}.json") for name in PARTS}
    missing = [name for name, part in parts.items() if part is None]
    if len(missing) == len(PARTS):
        sys.stderr.write(f"nothing measured: no {', '.join(PARTS)} in {args.logs}\n")
        return 1
    report = build(parts) | {"missing": missing, "failed": args.failed.split()}
    device = str(report["device"])
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = args.out / f"{date.today()}-{slug}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = table(report)
    stem.with_suffix(".md").write_text(text)
    sys.stdout.write(text)
    return 0


def build(parts: dict[str, Any]) -> dict[str, Any]:
    """Return device, commit, ceilings and one row a benchmark with its share of the card's ceilings."""
    ceilings = parts["ceilings"] or {}
    rows = [_row(bench, ceilings) for name in ("ops", "block") if parts[name] for bench in parts[name]["benchmarks"]]
    devices = [str(row["device"]) for row in rows if "device" in row]
    return {
        "device": ceilings.get("device") or next(iter(devices), "unknown device"),
        "commit": _commit(),
        "ceilings": ceilings,
        "rows": rows,
        "baseline": parts["baseline"],
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    ceilings = report["ceilings"]
    lines = [f"# {report['device']}, commit {report['commit']}", ""]
    if ceilings:
        products = ", ".join(f"{k} {v:.0f}" for k, v in ceilings.items() if k.endswith("TFLOP/s"))
        lines += [f"Ceilings: copy {ceilings['copy_GB/s']:.0f} GB/s (read and written), {products}.", ""]
    if report["failed"] or report["missing"]:
        lines += [f"Failed: {', '.join(report['failed']) or '-'}. Missing: {', '.join(report['missing']) or '-'}.", ""]
    lines += [
        "| benchmark | median ms | min - max | TFLOP/s | GB/s | % of ceiling | more |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        spread = f"{row['min_ms']:.3f} - {row['max_ms']:.3f}"
        figures = [f"{row[k]:.1f}" if row.get(k) else "" for k in ("TFLOP/s", "GB/s", "% of ceiling")]
        more = ", ".join(f"{k} {_short(v)}" for k, v in row["more"].items())
        lines.append(f"| {row['name']} | {row['median_ms']:.3f} | {spread} | {' | '.join(figures)} | {more} |")
    for dtype, loops in ((report["baseline"] or {}).get("seconds_per_block") or {}).items():
        lines += [
            "",
            f"Naive loop, {dtype}, one run with the engine:",
            "",
            "| loop | s/block | / engine |",
            "|---|---|---|",
        ]
        lines += [f"| {name} | {loop['median']:.4f} | {loop['ratio']:.2f} |" for name, loop in loops.items()]
    return "\n".join(lines) + "\n"


def _row(bench: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, Any]:
    stats, extra = bench["stats"], dict(bench["extra_info"])
    row = {
        "name": bench["name"].removeprefix("bench_"),
        "median_ms": stats["median"] * 1e3,
        "min_ms": stats["min"] * 1e3,
        "max_ms": stats["max"] * 1e3,
        "rounds": stats["rounds"],
    }
    row |= {name: extra.pop(name) for name in ("device", "TFLOP/s", "GB/s") if name in extra}
    extra.pop("torch", None)
    shares = [
        row[unit] / ceilings[ceiling]
        for unit, ceiling in (("TFLOP/s", "bfloat16_TFLOP/s"), ("GB/s", "copy_GB/s"))
        if row.get(unit) and ceilings.get(ceiling)
    ]
    if shares:
        row["% of ceiling"] = 100 * max(shares)  # the nearer ceiling is the one that binds
    return row | {"more": extra}


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
