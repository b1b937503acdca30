"""Checkpoints of other layouts into one model folder: gathered, checked as a whole, then written tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from echo_infinity.checkpoints.entries import SECTIONS, Entries, check_entries, open_weights
from echo_infinity.checkpoints.lora import merge_lora
from echo_infinity.checkpoints.names import official, rename
from echo_infinity.checkpoints.parts import write_decoder, write_text, write_tiny_decoder
from echo_infinity.checkpoints.shards import SHARD_BYTES, Progress, write_shards
from echo_infinity.config import EchoConfig
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT
from echo_infinity.parts import DECODER_FOLDER, TEXT_FOLDER, TINY_DECODER
from echo_infinity.weights import CONFIG, MEMORY_PREFIX, MODEL_PREFIX, STEM, unused_names

_MEMORY_SECTION = "query_memory_encoder."


@dataclass(frozen=True)
class Sources:
    """What to convert.

    Args:
        weights: files or folders of the generator; one with the base, and others with a LoRA or a memory.
        text: the UMT5 encoder: its original ``.pth``, or a diffusers or transformers folder; None leaves it out.
        tokenizer: folder of its tokenizer; default beside ``text``.
        decoder: the Wan VAE: its original ``.pth``, or a diffusers folder; None leaves it out.
        tiny_decoder: a tiny autoencoder in the TAEHV layout; None leaves it out.
    """

    weights: Sequence[Path] = ()
    text: Path | None = None
    tokenizer: Path | None = None
    decoder: Path | None = None
    tiny_decoder: Path | None = None


@dataclass(frozen=True)
class Settings:
    """How to convert.

    Args:
        ema: read the averaged weights where a file has them.
        dtype: of the generator's weights as written; None keeps each tensor's own.
        text_dtype: of the text encoder's weights as written.
        lora_alpha: numerator of the LoRA's scale; None for its rank.
        shard_bytes: most bytes of a file.
        overwrite: replace a folder that is there.
    """

    ema: bool = True
    dtype: torch.dtype | None = None
    text_dtype: torch.dtype = torch.bfloat16
    lora_alpha: float | None = None
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False


@dataclass
class Gathered:
    """The generator's tensors under official names, not yet read, and what there is to say about them."""

    entries: Entries = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert(
    sources: Sources,
    folder: Path,
    config: EchoConfig,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> list[str]:
    """Write a folder that :meth:`EchoPipeline.from_pretrained` opens.

    The folder appears whole or not at all. Where it exists and no generator is given, text and decoders are added.

    Args:
        sources: what to read.
        folder: where to.
        config: the generator's; its memory is dropped where the files hold none.
        settings: how.
        progress: told what will be written and what has been.

    Returns:
        Notes: what was left out, and why.

    Raises:
        ValueError: a file is refused, or tensors are missing, unexpected or misshapen (all of them listed).
        FileExistsError: the folder exists.
    """
    settings = settings or Settings()
    adds = not sources.weights
    if adds and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no model folder yet: give the generator's checkpoint too")
    if not adds and folder.exists() and not settings.overwrite:
        raise FileExistsError(f"{folder} exists already: give another folder, or allow --overwrite")
    made = {TEXT_FOLDER: sources.text, DECODER_FOLDER: sources.decoder, TINY_DECODER: sources.tiny_decoder}
    there = [folder / name for name, source in made.items() if source is not None and (folder / name).exists()]
    if adds and there and not settings.overwrite:
        raise FileExistsError(f"{', '.join(map(str, there))} exists already: allow --overwrite to replace it")
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        notes = [] if adds else _write_generator(sources.weights, temporary, config, settings, progress)
        if sources.text is not None:
            write_text(sources.text, sources.tokenizer, temporary / TEXT_FOLDER, settings.text_dtype, progress)
        if sources.decoder is not None:
            write_decoder(sources.decoder, temporary / DECODER_FOLDER, progress)
        if sources.tiny_decoder is not None:
            write_tiny_decoder(sources.tiny_decoder, temporary / TINY_DECODER)
        _publish(temporary, folder, adds)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return notes


def gather(weights: Sequence[Path], *, ema: bool = True, lora_alpha: float | None = None) -> Gathered:
    """List the generator's tensors in these files under official names, memory and LoRA in their places.

    Raises:
        ValueError: a file is refused, no file holds a generator, or more than one does.
    """
    found = Gathered()
    base: list[tuple[Path, Entries]] = []
    memories: list[tuple[Path, Entries]] = []
    loras: list[tuple[Path, Entries]] = []
    for path in weights:
        whole = (path / "transformer").is_dir()  # a pipeline of diffusers
        sections = open_weights(path / "transformer" if whole else path)
        names = {
            name: rename(x, official, f"{path}: {name}") for name, x in sections.items() if name in ("", *SECTIONS)
        }
        if ignored := sorted(sections.keys() - names.keys()):
            found.notes.append(f"{path.name}: not needed, not read: {', '.join(ignored)}")
        generator = _generator(names, ema, path, found.notes)
        lora = {k: v for k, v in generator.items() if ".lora_" in k} | names.get("generator_lora", {})
        generator = {k: v for k, v in generator.items() if ".lora_" not in k}
        memory = names.get("query_memory_encoder", {})
        if generator and all(name.startswith(_MEMORY_SECTION) for name in generator):
            memory, generator = generator | memory, {}
        for store, part in ((base, generator), (memories, memory), (loras, lora)):
            if part:
                store.append((path, part))
        if not (generator or memory or lora):
            raise ValueError(f"{path} holds no generator, memory or LoRA, but: {', '.join(map(repr, sections))}")
    if len(base) != 1:
        names_of = ", ".join(str(path) for path, _ in base) or "none"
        raise ValueError(f"one file must hold the generator, found in: {names_of}")
    own = base[0][1]
    for path, memory in memories:
        plain = {name.removeprefix(_MEMORY_SECTION): x for name, x in memory.items()}
        if any(name.startswith(_MEMORY_SECTION) for name in own):
            found.notes.append(f"{path.name}: its memory replaces the one in {base[0][0].name}")
        own = {name: x for name, x in own.items() if not name.startswith(_MEMORY_SECTION)}
        own |= {_MEMORY_SECTION + name: x for name, x in plain.items()}
    for path, lora in loras:
        own = merge_lora(own, lora, alpha=lora_alpha, source=str(path))
        rank = min(x.shape[0] for name, x in lora.items() if ".lora_A." in name)
        scale = (lora_alpha or rank) / rank
        found.notes.append(f"{path.name}: LoRA of rank {rank} on {len(lora) // 2} weights merged, scale {scale:g}")
    found.entries = own
    return found


def expected_shapes(config: EchoConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a generator, in a folder's naming; nothing is allocated."""
    with torch.device("meta"):
        parts: dict[str, torch.nn.Module] = {MODEL_PREFIX: CausalDiT(config.model)}
        if config.memory is not None:
            parts[MEMORY_PREFIX] = EvolvingMemory(config.memory)
    return {prefix + name: tuple(x.shape) for prefix, part in parts.items() for name, x in part.state_dict().items()}


def _write_generator(
    weights: Sequence[Path],
    folder: Path,
    config: EchoConfig,
    settings: Settings,
    progress: Progress | None,
) -> list[str]:
    found = gather(weights, ema=settings.ema, lora_alpha=settings.lora_alpha)
    notes = found.notes
    if config.memory is not None and not any(name.startswith(_MEMORY_SECTION) for name in found.entries):
        config = replace(config, memory=None)
        notes.append("no memory in these files: the model streams with its window and sink alone")
    expected = expected_shapes(config)
    given = {MODEL_PREFIX + name: x for name, x in found.entries.items()}
    for name in [name for name in given if name.startswith(unused_names(config.memory)) and name not in expected]:
        notes.append(f"{name} belongs to an option that is off: left out")
        del given[name]
    check_entries(given, expected, ", ".join(map(str, weights)))
    ordered = {name: given[name] if settings.dtype is None else given[name].to(settings.dtype) for name in expected}
    write_shards(folder, STEM, ordered, shard_bytes=settings.shard_bytes, progress=progress)
    (folder / CONFIG).write_text(config.to_json() + "\n")
    return notes


def _generator(names: Mapping[str, Entries], ema: bool, path: Path, notes: list[str]) -> Entries:
    """The section with the generator; an average that lacks tensors of the memory gets them from beside it."""
    order = ["generator_ema", "generator", "model", "state_dict", ""]
    present = [name for name in order if names.get(name)]
    if not ema and len(present) > 1 and present[0] == "generator_ema":
        present = [*present[1:], present[0]]
    if not present:
        return {}
    chosen = dict(names[present[0]])
    if present[0] == "generator_ema" and "generator" in present:
        extra = {
            name: x for name, x in names["generator"].items() if name.startswith(_MEMORY_SECTION) and name not in chosen
        }
        if extra:
            notes.append(f"{path.name}: {len(extra)} memory tensors are missing in generator_ema: taken from generator")
        chosen |= extra
    return chosen


def _publish(temporary: Path, folder: Path, adds: bool) -> None:
    """Rename what is complete into place; an old folder, or an old part, goes after the new one is there."""
    pairs = [(path, folder / path.name) for path in temporary.iterdir()] if adds else [(temporary, folder)]
    for new, target in pairs:
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            _remove(old)  # what a killed run left
            target.rename(old)
        new.rename(target)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
