"""A generator's folder: configuration, weights in one file or in shards, text encoder, decoders; safetensors only."""

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

from echo_infinity.checkpoints.entries import INDEX_SUFFIX, Entries, check_entries, open_safetensors, open_shards
from echo_infinity.codec import Codec
from echo_infinity.config import PRESETS, EchoConfig
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.parts import CODEC, PartOptions, codec_path, open_codec, open_text
from echo_infinity.text import GrammarText

CONFIG, STEM = "config.json", "model"
MODEL = f"{STEM}.safetensors"
MODEL_PREFIX, MEMORY_PREFIX, _TEXT = "model.", "model.query_memory_encoder.", "text."


class Checkpoint(NamedTuple):
    """A generator's parts as loaded, in evaluation mode."""

    config: EchoConfig
    model: CausalDiT
    memory: EvolvingMemory | None
    text: Any  # a TextEncoder; GrammarText where the model learned its own
    codec: Any  # a VideoCodec; Codec where it was trained with the model
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
    name_or_folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    parts: PartOptions | None = None,
) -> Checkpoint:
    """Load a generator; each tensor goes to its place on its own, so the model is in memory once.

    Args:
        name_or_folder: a bundled model (``tiny``) or a folder written by :func:`save_checkpoint` or by
            ``echo-infinity convert``.
        dtype: of model, memory and learned text; the codec stays float32 unless ``parts`` says otherwise.
        device: where everything goes.
        parts: which text encoder and decoder.

    Raises:
        ValueError: unknown name, impossible configuration, corrupt or truncated file, or tensors that are missing,
            unexpected or of another shape (all of them listed).
    """
    folder, options = find(name_or_folder), parts or PartOptions()
    config = EchoConfig.from_json((folder / CONFIG).read_text())
    entries, vocabulary = _open_model(folder)
    if config.model.layers > len(entries):
        raise ValueError(f"{folder / CONFIG} has {config.model.layers} layers, the weights only {len(entries)} tensors")
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {MODEL_PREFIX: CausalDiT(config.model)}
        if config.memory is not None:
            modules[MEMORY_PREFIX] = EvolvingMemory(config.memory)
    if vocabulary is not None:
        modules[_TEXT] = GrammarText(vocabulary, config.model.text_tokens, config.model.text_width)
    _fill(modules, entries, str(folder / MODEL), dtype, device)
    for module in modules.values():
        module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    text = modules.get(_TEXT) if options.text is None else None
    own = vocabulary is not None and options.decoder is None  # a model trained here has its own codec, or is incomplete
    codec_at = folder / CODEC if own else codec_path(folder, options.decoder)
    return Checkpoint(
        config,
        modules[MODEL_PREFIX],  # type: ignore[arg-type]
        modules.get(MEMORY_PREFIX),  # type: ignore[arg-type]
        text or open_text(folder, config, options, device),
        open_codec(codec_at, config.model.latent_channels, device, options.decoder_dtype),
        fingerprint(folder, codec_at),
    )


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
    parts: dict[str, nn.Module] = {MODEL_PREFIX: model, _TEXT: text}
    if memory is not None:
        parts[MEMORY_PREFIX] = memory
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


def fingerprint(folder: str | os.PathLike[str], codec: Path | None = None) -> str:
    """Hash of everything in a model folder that a stream depends on.

    Args:
        folder: the model's.
        codec: the codec in use, a file or a folder; default the one trained with the model.
    """
    folder = Path(folder)
    codec = folder / CODEC if codec is None and (folder / CODEC).is_file() else codec
    paths = [folder / CONFIG, *_model_files(folder)]
    if codec is not None:
        paths += [codec] if codec.is_file() else sorted(path for path in codec.iterdir() if path.is_file())
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()[:32]


def _model_files(folder: Path) -> list[Path]:
    if (folder / MODEL).is_file():
        return [folder / MODEL]
    return sorted(folder.glob(f"{STEM}-*.safetensors"))


def _open_model(folder: Path) -> tuple[Entries, list[str] | None]:
    """The generator's tensors, unread, and its vocabulary where it has a learned one."""
    index = folder / f"{MODEL}{INDEX_SUFFIX}"
    if index.is_file() and not (folder / MODEL).is_file():
        return open_shards(index), None
    entries = open_safetensors(folder / MODEL)
    if not any(name.startswith(_TEXT) for name in entries):
        return entries, None
    try:
        return entries, list(json.loads(text_metadata(folder / MODEL)["vocabulary"]))
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{folder / MODEL} names no vocabulary: not written by save_checkpoint") from None


def _fill(
    modules: Mapping[str, nn.Module], entries: Entries, source: str, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Read the weights into modules built without memory."""
    expected: dict[str, tuple[int, ...]] = {}
    prefixes = sorted(modules, key=len, reverse=True)
    for prefix, module in modules.items():
        expected |= {prefix + name: tuple(x.shape) for name, x in module.state_dict().items()}
    unused = unused_names(modules.get(MEMORY_PREFIX))
    given = {n: x for n, x in entries.items() if n in expected or not n.startswith(unused)}
    check_entries(given, expected, source)
    own: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for name, entry in given.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        own[prefix][name.removeprefix(prefix)] = entry.read().to(device=device, dtype=dtype, copy=True)
    for prefix, tensors in own.items():
        modules[prefix].load_state_dict(tensors, assign=True)


def unused_names(memory: nn.Module | MemoryConfig | None) -> tuple[str, ...]:
    """Prefixes of weights that checkpoints carry for options of the memory that are off."""
    config = memory.config if isinstance(memory, EvolvingMemory) else memory
    if not isinstance(config, MemoryConfig):
        return ("\0",)  # no name starts so
    off = [] if config.normalise_keys else ["norm_k_out"]
    off += ["connector_proj", "gate_linear"] if config.residual else []
    return tuple(MEMORY_PREFIX + name for name in off) or ("\0",)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], device: torch.device | str) -> Iterator[Any]:
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error
