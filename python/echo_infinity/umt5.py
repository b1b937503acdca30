"""Prompts to embeddings with the UMT5 encoder of Wan, through transformers; encoded once, kept on disk."""

from __future__ import annotations

import hashlib
import html
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from echo_infinity.checkpoints.entries import WEIGHT_DTYPES, check_folder_depth
from echo_infinity.contents import content_hash
from echo_infinity.extras import library

TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEXT_DEPTH = ("num_layers",)
KEEPS = ("loaded", "cpu", "freed")


class LongPromptWarning(UserWarning):
    """A prompt has more tokens than the model reads; the rest is left out, as in training."""


class Umt5Text:
    """Encode prompts as the Wan models were trained to read them.

    The encoder is loaded when a prompt is not in the cache, and afterwards stays where it is (``loaded``), moves to
    main memory (``cpu``) or is dropped (``freed``).

    Args:
        folder: config, weights (safetensors) and tokenizer, as ``echo-infinity convert`` writes them.
        tokens: rows of an embedding, the DiT's ``text_tokens``.
        width: of an embedding, the DiT's ``text_width``.
        device: where it computes.
        dtype: of its weights; None for the file's.
        keep: one of ``loaded``, ``cpu``, ``freed``.
        cache: folder of the embeddings; None keeps none on disk.

    Raises:
        ValueError: the folder lacks its configuration or tokenizer, or ``keep`` is something else.

    Source: docs/method.md section 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tokens: int,
        width: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        keep: str = "loaded",
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder, self.tokens, self.width = Path(folder), tokens, width
        self.device, self.dtype, self.keep = torch.device(device), dtype, keep
        self.cache = None if cache is None else Path(cache)
        if keep not in KEEPS:
            raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{self.folder} holds no config.json: not a text encoder's folder")
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES[:2]):
            raise ValueError(f"{self.folder} holds no tokenizer ({' or '.join(TOKENIZER_FILES[:2])})")
        self._model: Any = None  # transformers is untyped
        self._tokenizer: Any = None
        self._key: str | None = None

    @property
    def loaded(self) -> bool:
        """Whether the encoder is in memory."""
        return self._model is not None

    def free(self) -> None:
        """Drop the encoder from memory; it is loaded again where a new prompt needs it."""
        self._model = None

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts.

        Args:
            prompts: ``B`` texts.

        Returns:
            ``(B, tokens, width)`` in the encoder's dtype on its device, zeros past each prompt's length.

        Raises:
            ValueError: a prompt is empty.
            MissingExtraError: transformers or ftfy is not installed.

        Warns:
            LongPromptWarning: a prompt has more than ``tokens`` tokens.
        """
        rows = [self._one(prompt) for prompt in prompts]
        out = torch.zeros(len(rows), self.tokens, self.width, dtype=rows[0].dtype, device=self.device)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out

    def save(self, prompts: Sequence[str], path: str | os.PathLike[str]) -> None:
        """Embed prompts into a file for :class:`PrecomputedText`, with which a machine needs no encoder.

        Raises:
            ValueError: a prompt is empty.
            OSError: the disk refused.
        """
        from echo_infinity.weights import write_tensors

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {prompt: self._one(prompt).contiguous() for prompt in prompts}, {})

    def _one(self, prompt: str) -> Tensor:
        text = clean_prompt(prompt)
        path = None if self.cache is None else self.cache / f"{self._digest(text, self.cache)}.safetensors"
        if path is not None and (cached := _read_cached(path, self.width)) is not None:
            return cached
        row = self._compute(text)
        if path is not None:
            _write_cached(path, row)
        return row

    @torch.inference_mode()
    def _compute(self, text: str) -> Tensor:
        model = self._load()
        ids = self._tokenise(text)
        model.to(self.device)
        # A padded batch under a mask gives the same numbers for the prompt's own tokens; zeros replace the rest.
        row = model(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state[0].cpu()
        if self.keep == "cpu":
            model.to("cpu")
        elif self.keep == "freed":
            self.free()
        return row

    def _tokenise(self, text: str) -> list[int]:
        if self._tokenizer is None:
            transformers = library("transformers", "a UMT5 text encoder")
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        ids = list(self._tokenizer(text)["input_ids"])
        if len(ids) > self.tokens:
            warnings.warn(
                f"the prompt has {len(ids)} tokens, this model reads {self.tokens}: the end is left out",
                LongPromptWarning,
                stacklevel=5,
            )
            ids = list(self._tokenizer(text, truncation=True, max_length=self.tokens)["input_ids"])
        return ids

    def _load(self) -> Any:
        if self._model is None:
            transformers = library("transformers", "a UMT5 text encoder")
            check_folder_depth(self.folder, TEXT_DEPTH)
            try:
                model, report = transformers.UMT5EncoderModel.from_pretrained(
                    self.folder,
                    dtype=self.dtype or "auto",
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                )
            except (OSError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ValueError(f"{self.folder} can't be read as a UMT5 encoder: {error}") from error
            wrong = {name: found for name, found in report.items() if found}
            if wrong:
                raise ValueError(f"{self.folder} doesn't fit its configuration: {wrong}")
            if model.config.d_model != self.width:
                raise ValueError(f"{self.folder} embeds to width {model.config.d_model}, the model reads {self.width}")
            self._model = model.eval().requires_grad_(False)
        return self._model

    def _digest(self, text: str, memo: Path) -> str:
        """Content of the prompt and of everything that decides its embedding."""
        if self._key is None:
            digest = hashlib.sha256(f"2 {self.tokens} {self.dtype}".encode())
            for path in sorted(path for path in self.folder.iterdir() if path.is_file()):
                digest.update(f" {path.name} {content_hash(path, memo)}".encode())
            self._key = digest.hexdigest()
        return hashlib.sha256(f"{self._key} {text}".encode()).hexdigest()


class PrecomputedText:
    """Embeddings of known prompts, read from a file instead of computed.

    Args:
        path: safetensors; each prompt is the name of its ``(n, width)`` embedding, ``n <= tokens``.
        tokens: rows of an embedding, the DiT's ``text_tokens``.
        width: of an embedding, the DiT's ``text_width``.

    Raises:
        ValueError: missing, corrupt, or with embeddings of another shape or kind of number.
    """

    def __init__(self, path: str | os.PathLike[str], tokens: int, width: int) -> None:
        self.path, self.tokens, self.width = Path(path), tokens, width
        if not self.path.is_file():
            raise ValueError(f"{path} is missing")
        try:
            with safe_open(self.path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is corrupt or truncated: {error}") from error
        wrong = [
            f"{name!r} {dtype} {s}"
            for name, (s, dtype) in found.items()
            if len(s) != 2 or not 1 <= s[0] <= tokens or s[1] != width or dtype not in WEIGHT_DTYPES
        ]
        if wrong or not found:
            raise ValueError(
                f"{path} must hold embeddings (<= {tokens}, {width}) by prompt, found: {', '.join(wrong) or 'none'}"
            )
        self.prompts = tuple(found)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Look prompts up: ``(B, tokens, width)``, zeros past each one's length.

        Raises:
            ValueError: a prompt is not in the file (lists those that are), or its embedding holds NaN or Inf.
        """
        known = {clean_prompt(name): name for name in self.prompts}
        rows = []
        for prompt in prompts:
            text = clean_prompt(prompt)
            if text not in known:
                raise ValueError(f"no embedding of {prompt!r} in {self.path}; it holds: {', '.join(self.prompts)}")
            with safe_open(self.path, framework="pt") as file:
                row = file.get_tensor(known[text])
            if not torch.isfinite(row).all():
                raise ValueError(f"the embedding of {prompt!r} in {self.path} holds NaN or Inf")
            rows.append(row)
        out = torch.zeros(len(rows), self.tokens, self.width, dtype=rows[0].dtype)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out


def clean_prompt(prompt: str) -> str:
    """Repair and unescape a prompt and squeeze its spaces, as the models' training did.

    Raises:
        ValueError: nothing is left.
        MissingExtraError: ftfy is needed (the prompt is not plain ASCII) and is not installed.
    """
    text = prompt if prompt.isascii() else library("ftfy", "a prompt beyond ASCII").fix_text(prompt)
    text = re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
    if not text:
        raise ValueError("the prompt is empty; say what to show")
    return text


def cache_folder() -> Path:
    """Where embeddings are kept by default: ``echo-infinity/text`` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "echo-infinity" / "text"


def _read_cached(path: Path, width: int) -> Tensor | None:
    """The embedding, or None where there is none or it is broken: then it is computed again."""
    try:
        with safe_open(path, framework="pt") as file:
            row: Tensor = file.get_tensor("embedding").clone()
    except (OSError, SafetensorError):
        return None
    return row if row.ndim == 2 and row.shape[1] == width else None


def _write_cached(path: Path, row: Tensor) -> None:
    """Keep an embedding; a cache that can't be written costs time at the next start and nothing else."""
    from echo_infinity.weights import write_tensors

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"embedding": row.contiguous()}, {})
    except OSError as error:
        warnings.warn(f"could not keep the prompt's embedding in {path.parent}: {error}", UserWarning, stacklevel=5)
