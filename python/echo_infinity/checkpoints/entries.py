"""Tensors in files, listed before they are read: one at a time, with nothing in the file trusted."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX_SUFFIX = ".index.json"
_REMAP_BYTES = 16 << 20  # pages of a mapped .pt that may stay resident before it is mapped afresh


@dataclass(frozen=True)
class Entry:
    """A tensor that has not been read yet.

    Args:
        shape: as the file says.
        dtype: as the file says.
        read: reads it; ValueError if the file turns out to be broken.
        where: file and name, for messages.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    where: str

    def to(self, dtype: torch.dtype) -> Entry:
        """The same tensor, cast when it is read."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


Entries = dict[str, Entry]


def open_weights(path: Path) -> dict[str, Entries]:
    """List the tensors of a checkpoint file or folder.

    Args:
        path: a ``.safetensors`` file, an index of shards or a folder that holds one of them, or a file of
            ``torch.save``.

    Returns:
        Sections by name; one section ``""`` where the tensors lie at the top. Whatever is no tensor is left out.

    Raises:
        ValueError: missing, corrupt, truncated, holds code, or an index points out of its folder.
    """
    if path.is_dir():
        path = _weights_in(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.name.endswith(INDEX_SUFFIX):
        return {"": open_shards(path)}
    if path.suffix == ".safetensors":
        return {"": open_safetensors(path)}
    return _TorchFile(path).sections()


def open_safetensors(path: Path) -> Entries:
    """List the tensors of one safetensors file.

    Raises:
        ValueError: missing, corrupt, truncated, or with a header that lies about its shapes.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            found = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error
    wrong = [f"{name} is {dtype}" for name, (_, dtype) in found.items() if dtype not in WEIGHT_DTYPES]
    if wrong:
        raise ValueError(f"{path} holds tensors that are no weights of {', '.join(WEIGHT_DTYPES)}: {_some(wrong)}")
    return {
        name: Entry(shape, WEIGHT_DTYPES[dtype], _safetensors_reader(path, name), f"{path}: {name}")
        for name, (shape, dtype) in found.items()
    }


def open_shards(index: Path) -> Entries:
    """List the tensors that an index of safetensors shards names.

    Raises:
        ValueError: no JSON, a shard outside the index's folder, a missing shard, or shards whose tensors are not
            exactly those of the index.
    """
    try:
        listed = json.loads(index.read_text())["weight_map"]
        pairs = sorted((str(name), str(shard)) for name, shard in listed.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from error
    found: Entries = {}
    problems: list[str] = []
    for shard in sorted({shard for _, shard in pairs}):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise ValueError(f"{index} names the shard {shard!r}: shards must lie in the index's own folder")
        entries = open_safetensors(index.with_name(shard))
        own = {name for name, s in pairs if s == shard}
        problems += [f"{shard} lacks {name}" for name in sorted(own - entries.keys())]
        problems += [f"{shard} holds {name}, which the index puts elsewhere" for name in sorted(entries.keys() - own)]
        found |= entries
    if problems:
        raise ValueError(f"{index} doesn't fit its shards:\n  " + "\n  ".join(problems))
    return found


def check_entries(entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare names and shapes before anything is read.

    Raises:
        ValueError: lists every missing, unexpected and misshapen tensor.
    """
    problems = [f"missing {name}" for name in expected.keys() - entries.keys()]
    problems += [f"unexpected {name}" for name in entries.keys() - expected.keys()]
    for name in expected.keys() & entries.keys():
        if entries[name].shape != expected[name]:
            problems.append(f"{name} is {entries[name].shape}, expected {expected[name]}")
    if problems:
        raise ValueError(f"{source} doesn't fit its configuration:\n  " + "\n  ".join(sorted(problems)))


def read_settings(path: Path) -> dict[str, Any]:
    """Read a configuration of a library, without what the library notes there for itself.

    Raises:
        ValueError: missing, no JSON, or no object.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected an object")
    return {str(name): value for name, value in data.items() if not str(name).startswith("_")}


def check_depth(settings: Mapping[str, Any], names: Iterable[str], tensors: int, source: str) -> None:
    """Refuse a configuration whose counts exceed the tensors there are, before a model of that depth is built.

    Args:
        settings: as the file has them.
        names: of settings that count layers or blocks, or list them.
        tensors: how many the weights have.
        source: for messages.

    Raises:
        ValueError: a count is larger, negative or no whole number.
    """
    for name in names:
        count = settings.get(name, 0)
        count = len(count) if isinstance(count, list) else count
        if not isinstance(count, int) or not 0 <= count <= tensors:
            raise ValueError(f"{source} has {name} {count!r}, the weights {tensors} tensors")


def check_folder_depth(folder: Path, names: Iterable[str]) -> None:
    """:func:`check_depth` for a folder with ``config.json`` and its weights."""
    tensors = sum(map(len, open_weights(folder).values()))
    check_depth(read_settings(folder / "config.json"), names, tensors, str(folder))


def _weights_in(folder: Path) -> Path:
    found = sorted(p for p in folder.iterdir() if p.name.endswith((".safetensors" + INDEX_SUFFIX, ".safetensors")))
    indices = [p for p in found if p.name.endswith(INDEX_SUFFIX)]
    candidates = indices or found
    if len(candidates) != 1:
        names = ", ".join(p.name for p in candidates) or "none"
        raise ValueError(f"{folder} must hold one .safetensors file or one index of shards, found: {names}")
    return candidates[0]


def _safetensors_reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:  # opened anew: the pages of the one before are let go
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} changed or is corrupt: {error}") from error

    return read


class _TorchFile:
    """A file of ``torch.save``, mapped into memory and unpickled with tensors and plain containers alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tree: Any = None
        self._touched = 0
        try:
            with zipfile.ZipFile(path) as archive:
                packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(
                f"{path} is truncated, corrupt, or in the format before torch 1.6; if it is the last, load it where "
                "you trust it and torch.save it again"
            ) from error
        if packed:
            raise ValueError(f"{path} is compressed ({_some(packed)}), which torch.save never does: refused")

    def sections(self) -> dict[str, Entries]:
        """Name every section that holds tensors, and the tensors in it."""
        tree = self._load()
        if not isinstance(tree, dict):
            raise ValueError(f"{self.path} holds a {type(tree).__name__}, expected a dict of tensors")
        found = {str(name): self._section(str(name), x) for name, x in tree.items() if isinstance(x, dict)}
        top = self._section("", {name: x for name, x in tree.items() if isinstance(x, Tensor)})
        self._tree = None
        return {name: entries for name, entries in ({"": top} | found).items() if entries}

    def _section(self, section: str, values: Mapping[Any, Any]) -> Entries:
        tensors = {name: x for name, x in values.items() if isinstance(name, str) and isinstance(x, Tensor)}
        wrong = [f"{name} ({why})" for name, x in tensors.items() if (why := _why_no_weight(x))]
        if wrong and section in ("", *SECTIONS):
            raise ValueError(f"{self.path} holds tensors that are no plain weights: {_some(wrong)}")
        label = f"{self.path}: {section}{':' if section else ''}"
        return {
            name: Entry(tuple(x.shape), x.dtype, self._reader(section, name), f"{label}{name}")
            for name, x in tensors.items()
        }

    def _reader(self, section: str, name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            if self._tree is None or self._touched > _REMAP_BYTES:
                self._tree, self._touched = self._load(), 0
            tree = self._tree[section] if section else self._tree
            x = tree[name].detach()
            self._touched += x.nbytes
            return x

        return read

    def _load(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a hostile pickle can raise anything
            raise ValueError(f"{self.path} is refused: {_reason(error)}") from error


# Of a training checkpoint, what a generator needs; the rest (critics, optimisers, counters) is not read.
SECTIONS = ("generator", "generator_ema", "model", "state_dict", "generator_lora", "query_memory_encoder")


def _why_no_weight(x: Tensor) -> str:
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__}"
    if x.layout != torch.strided or x.is_quantized or x.device.type != "cpu":
        return f"{x.layout} on {x.device}{', quantised' if x.is_quantized else ''}"
    return "" if x.dtype in WEIGHT_DTYPES.values() else str(x.dtype)


def _reason(error: Exception) -> str:
    """The one sentence of torch's message that names the cause; its advice is to switch the safety off."""
    text = " ".join(str(error).split())
    if found := re.search(r"(?:global: |unsupported )GLOBAL (\S+)", text):
        return f"it holds {found[1]}, which is code or an object and no tensor"
    return f"{type(error).__name__}: {text[:200]}"


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
