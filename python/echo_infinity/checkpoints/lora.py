"""Low-rank updates in PEFT's layout, merged into the weights they belong to as those are read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from echo_infinity.checkpoints.entries import Entries, Entry


def merge_lora(base: Entries, lora: Entries, *, alpha: float | None = None, source: str = "the LoRA") -> Entries:
    """Return ``base`` with ``W + alpha / rank * B A`` in place of each weight that has an update.

    The sum is formed in float32 and rounded once, to the weight's dtype.

    Args:
        base: official names without ``model.``.
        lora: official names too, with ``lora_A.weight`` ``(rank, in)`` and ``lora_B.weight`` ``(out, rank)`` in the
            place of ``weight``; an adapter's name may stand in between.
        alpha: numerator of the scale; default the rank, which makes the scale 1.
        source: for messages.

    Raises:
        ValueError: a half without the other, no such weight, other shapes, or other kinds of tensors; all are listed.

    Source: docs/method.md section 10.
    """
    halves: dict[str, dict[str, Entry]] = {}
    problems: list[str] = []
    for name, entry in lora.items():
        stem, half = _split(name)
        if not half:
            problems.append(f"unexpected {name}")
        elif half in halves.setdefault(stem, {}):
            problems.append(f"{stem} has two adapters: merge one at a time")
        else:
            halves[stem][half] = entry
    merged = dict(base)
    for stem, pair in halves.items():
        target = base.get(f"{stem}.weight")
        if why := _why_not(target, pair):
            problems.append(f"{stem}: {why}")
        elif target is not None:
            merged[f"{stem}.weight"] = _merged(target, pair["A"], pair["B"], alpha)
    if problems:
        raise ValueError(f"{source} can't be merged:\n  " + "\n  ".join(sorted(problems)))
    return merged


def _split(name: str) -> tuple[str, str]:
    """``blocks.0.ffn.0.lora_A.default.weight`` -> (``blocks.0.ffn.0``, ``A``); the half is "" for other names."""
    parts = name.split(".")
    for half in ("A", "B"):
        if f"lora_{half}" in parts and parts[-1] == "weight" and len(parts) - parts.index(f"lora_{half}") <= 3:
            return ".".join(parts[: parts.index(f"lora_{half}")]), half
    return name, ""


def _why_not(target: Entry | None, pair: dict[str, Entry]) -> str:
    if target is None:
        return "the base has no such weight"
    if pair.keys() != {"A", "B"}:
        return f"lora_{'B' if 'A' in pair else 'A'} is missing"
    a, b = pair["A"].shape, pair["B"].shape
    if len(target.shape) != 2 or len(a) != 2 or len(b) != 2 or (b[0], a[1]) != target.shape or a[0] != b[1]:
        return f"lora_B {b} x lora_A {a} doesn't fit the weight {target.shape}"
    return ""


def _merged(target: Entry, a: Entry, b: Entry, alpha: float | None) -> Entry:
    scale = 1.0 if alpha is None else alpha / a.shape[0]

    def read() -> Tensor:
        weight = target.read().to(torch.float32, copy=True)  # the only one of its size beside the file's own
        return weight.addmm_(b.read().float(), a.read().float(), alpha=scale)

    return replace(target, dtype=torch.float32, read=read, where=f"{target.where} with LoRA").to(target.dtype)
