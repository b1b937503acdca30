"""A generator's folder: config.json, model.safetensors, codec.safetensors; read strictly, safetensors only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from echo_infinity.codec import Codec
from echo_infinity.config import PRESETS, EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT
from echo_infinity.text import GrammarText

CONFIG, MODEL, CODEC = "config.json", "model.safetensors", "codec.safetensors"
_MODEL, _MEMORY, _TEXT = "model.", "model.query_memory_encoder.", "text."


class Checkpoint(NamedTuple):
    """A generator's parts as loaded, in evaluation mode."""

    config: EchoConfig
    model: CausalDiT
    memory: EvolvingMemory | None
    text: GrammarText
    codec: Codec
    fingerprint: str  # of configuration and weights: a saved stream only resumes on the same


def find(name_or_folder: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundled model or of a checkpoint.

    Raises:
        ValueError: neither a bundled model's name nor a folder with a configuration.
    """
    folder = Path(name_or_folder)
    if (folder / CONFIG).is_file():
        return folder
    bundled = Path(str(files("echo_infinity"))) / "weights"
    if (bundled / str(name_or_folder) / CONFIG).is_file():
        return bundled / str(name_or_folder)
    names = ", ".join(sorted(p.parent.name for p in bundled.glob(f"*/{CONFIG}"))) or "none"
    if folder.is_dir():
        raise ValueError(f"{folder} holds no {CONFIG}: not a model folder")
    if str(name_or_folder) in PRESETS:
        raise ValueError(f"preset {name_or_folder} ships without weights: give a checkpoint's folder. Bundled: {names}")
    raise ValueError(f"no model {str(name_or_folder)!r}: neither a bundled one ({names}) nor a folder")


def load_checkpoint(
    name_or_folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Load a generator.

    Args:
        name_or_folder: a bundled model (``tiny``) or a folder written by :func:`save_checkpoint`.
        dtype: of model, memory and text; the codec stays float32.
        device: where everything goes.

    Raises:
        ValueError: unknown name, impossible configuration, corrupt or truncated file, or tensors that are missing,
            unexpected or of another shape (all of them listed).
    """
    folder = find(name_or_folder)
    text = (folder / CONFIG).read_text()
    config = EchoConfig.from_json(text)
    try:
        vocabulary = json.loads(text_metadata(folder / MODEL)["vocabulary"])
    except KeyError:
        raise ValueError(f"{folder / MODEL} names no vocabulary: not written by save_checkpoint") from None
    parts: dict[str, nn.Module] = {
        _MODEL: CausalDiT(config.model),
        _TEXT: GrammarText(vocabulary, config.model.text_tokens, config.model.text_width),
    }
    if config.memory is not None:
        parts[_MEMORY] = EvolvingMemory(config.memory)
    load_parts(parts, read_tensors(folder / MODEL), str(folder / MODEL))
    for part in parts.values():
        part.to(device=device, dtype=dtype).eval().requires_grad_(False)
    codec = Codec.load(folder / CODEC, device=device).eval().requires_grad_(False)
    if codec.config.latent_channels != config.model.latent_channels:
        raise ValueError(
            f"the codec has {codec.config.latent_channels} latent channels, the model {config.model.latent_channels}"
        )
    return Checkpoint(config, parts[_MODEL], parts.get(_MEMORY), parts[_TEXT], codec, fingerprint(folder))  # type: ignore[arg-type]


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: EchoConfig,
    model: CausalDiT,
    memory: EvolvingMemory | None,
    text: GrammarText,
    codec: Codec | None = None,
) -> None:
    """Write a folder that :func:`load_checkpoint` opens; each file appears whole or not at all.

    Args:
        folder: made if missing.
        config: geometry; must describe the parts.
        model: the DiT.
        memory: the evolving memory, or None.
        text: the text encoder.
        codec: written too if given; otherwise the folder's own stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, nn.Module] = {_MODEL: model, _TEXT: text}
    if memory is not None:
        parts[_MEMORY] = memory
    tensors = {prefix + name: x.contiguous() for prefix, part in parts.items() for name, x in part.state_dict().items()}
    write_tensors(folder / MODEL, tensors, {"vocabulary": json.dumps(text.vocabulary)})
    if codec is not None:
        codec.save(folder / CODEC)
    temporary = folder / f".{CONFIG}.part"
    temporary.write_text(config.to_json() + "\n")
    temporary.replace(folder / CONFIG)


def load_parts(parts: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], source: str) -> None:
    """Load tensors into modules by name prefix, the longest prefix first.

    Raises:
        ValueError: lists every missing, unexpected and misshapen tensor.
    """
    rest = dict(tensors)
    problems: list[str] = []
    for prefix in sorted(parts, key=len, reverse=True):
        own = {name.removeprefix(prefix): rest.pop(name) for name in [n for n in rest if n.startswith(prefix)]}
        expected = parts[prefix].state_dict()
        problems += [f"missing {prefix}{name}" for name in expected.keys() - own.keys()]
        for name, x in list(own.items()):
            if name in expected and x.shape != expected[name].shape:
                problems.append(f"{prefix}{name} is {tuple(x.shape)}, expected {tuple(expected[name].shape)}")
                del own[name]
        problems += [f"unexpected {prefix}{name}" for name in parts[prefix].load_state_dict(own, strict=False)[1]]
    problems += [f"unexpected {name}" for name in rest]
    if problems:
        raise ValueError(f"{source} doesn't fit its configuration:\n  " + "\n  ".join(sorted(problems)))


def read_tensors(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: missing, corrupt or truncated.
    """
    with _opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping


def text_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file; ValueError if it can't be read."""
    with _opened(path, "cpu") as file:
        return file.metadata() or {}


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name in the same folder, flush it to disk, rename it into place."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Hash of everything in a model folder that a stream depends on."""
    digest = hashlib.sha256()
    for name in (CONFIG, MODEL, CODEC):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], device: torch.device | str) -> Iterator[Any]:
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error
