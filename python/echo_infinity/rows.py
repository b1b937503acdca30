"""One sampler for the rows of a batch: each looks like the sampler of a stream of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from echo_infinity.cache import KV
from echo_infinity.finite import FiniteWatch
from echo_infinity.generator import Generator
from echo_infinity.model import TextKV
from echo_infinity.noise import Noise
from echo_infinity.sampler import BlockSampler

_TOGETHER = "this stream advances with its batch: iterate the StreamBatch, or fork() the stream"
_NO_RECACHE = (
    "one stream's memory can't start over here: what it keeps would no longer be shaped as the other streams' of its "
    "batch; switch without memory_recache, or fork() the stream"
)
_SECOND = ("state", "k", "v")  # of a memory, whose first dimension counts groups or layers


class BatchSampler:
    """The sampler of all rows, and what each of them waits for.

    Args:
        generator: weights and tables.
        texts: per layer K/V of each row's prompt.
        noises: each row's.
        memory_dtype: of the memory state; default the weights'.
    """

    def __init__(
        self,
        generator: Generator,
        texts: Sequence[list[KV]],
        noises: Sequence[Noise],
        memory_dtype: torch.dtype | None = None,
    ) -> None:
        self.texts, self.noises, self.memory_dtype = list(texts), list(noises), memory_dtype
        self.whole = BlockSampler(generator, _join_texts(self.texts), self._draw, len(texts), memory_dtype)
        self.blocks: list[Tensor | None] = [None] * len(texts)  # made and not taken yet
        self._given: dict[int, tuple[dict[str, Tensor], int, int]] = {}  # saved rows that wait for the others
        self._images: dict[int, Tensor] = {}

    def rows(self) -> list[RowSampler]:
        """Each row as a stream's sampler."""
        return [RowSampler(self, row) for row in range(len(self.texts))]

    def advance(self) -> None:
        """Make every row's next block.

        Raises:
            ValueError: a row has not taken its block, or some rows have an image to start from and others don't.
            NonFiniteError: a row's block holds NaN or Inf; all of them may be spoilt.
        """
        count = len(self.texts)
        if any(block is not None for block in self.blocks):
            raise ValueError("a stream of the batch has not taken its block: take one of each")
        if 0 < len(self._images) < count:
            raise ValueError(
                f"streams {sorted(self._images)} of a batch of {count} start from an image: all must, or none"
            )
        if self._images:
            self.whole.start_from(torch.cat([self._images[row] for row in range(count)]))
            self._images = {}
        made = self.whole.next_block()
        self.blocks = [made[row : row + 1] for row in range(count)]

    def cut(self, texts: Sequence[list[KV]]) -> None:
        """Begin a new shot in every row."""
        self.whole.cut(_join_texts(texts))
        self.texts = list(texts)

    def start_from(self, row: int, image: Tensor) -> None:
        """Ask for a row's first frame ``(1, 1, C, h, w)``; all rows must before the next block.

        Raises:
            ValueError: as :meth:`BlockSampler.start_from`.
        """
        self.whole.check_image(image.expand(len(self.texts), -1, -1, -1, -1))
        self._images[row] = image

    def tensors(self, row: int) -> dict[str, Tensor]:
        """A row's share of :meth:`BlockSampler.tensors`, as views."""
        named = {name: _row(name, x, row) for name, x in self.whole.tensors().items()}
        return named | ({"image": self._images[row]} if row in self._images else {})

    def load(self, row: int, named: Mapping[str, Tensor], frame: int, first_block: int) -> None:
        """Take a saved row; with the last of them the batch goes on from there.

        Raises:
            ValueError: the rows stand at different blocks, or as :meth:`BlockSampler.load_tensors`.
        """
        self._given[row] = {name: x for name, x in named.items() if name != "image"}, frame, first_block
        if "image" in named:
            self.start_from(row, named["image"])
        if len(self._given) < len(self.texts):
            return
        given, self._given = [self._given[i] for i in range(len(self.texts))], {}
        places = {(at, first) for _, at, first in given}
        if len(places) > 1:
            raise ValueError(
                f"the streams stand at different blocks, frames {sorted({at for at, _ in places})} of shots that began "
                f"with blocks {sorted({first for _, first in places})}: resume them one at a time"
            )
        saved = _join([x for x, _, _ in given], "the saved streams hold different tensors: resume them one at a time")
        self.whole.load_tensors(saved, frame, first_block)

    @torch.inference_mode()
    def switch(self, row: int, text: list[KV], *, global_sink: bool, memory_recache: bool) -> None:
        """Change a row's prompt as :meth:`BlockSampler.switch` does, the row taken out of the batch for it.

        Raises:
            ValueError: the row's memory can't start over while the others' go on; nothing has changed.
        """
        whole = self.whole
        texts = [text if i == row else own for i, own in enumerate(self.texts)]
        joined = _join_texts(texts)
        if whole.frame:
            single = BlockSampler(whole.generator, text, self.noises[row], 1, self.memory_dtype, graphs=False)
            single.load_tensors(self.tensors(row), whole.frame, whole.first_block)
            single.switch(text, global_sink=global_sink, memory_recache=memory_recache)
            if memory_recache and whole.memory is not None and single.memory is not None:
                now = whole.memory.tensors()
                rows = [{name: _row(name, x, i) for name, x in now.items()} for i in range(len(texts))]
                rows[row] = single.memory.tensors()
                whole.memory.load_tensors(_join(rows, _NO_RECACHE))
            for x, new in zip(whole.cache.tensors().values(), single.cache.tensors().values(), strict=True):
                x[row : row + 1] = new
        self.texts, whole.text = texts, joined

    def _draw(self, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([noise(block, step, (1, *shape[1:])) for noise in self.noises])


class RowSampler:
    """A row of a batch where a stream expects its sampler; :class:`StreamBatch` makes the blocks.

    Args:
        batch: of all rows.
        row: which.
    """

    def __init__(self, batch: BatchSampler, row: int) -> None:
        self._batch, self._row = batch, row

    @property
    def generator(self) -> Generator:
        """Weights and tables."""
        return self._batch.whole.generator

    @property
    def finite(self) -> FiniteWatch:
        """Whether blocks held NaN; of all rows."""
        return self._batch.whole.finite

    @property
    def frame(self) -> int:
        """The shot's next frame."""
        return self._batch.whole.frame

    @property
    def block(self) -> int:
        """Number of the next block."""
        return self._batch.whole.block

    def next_block(self) -> Tensor:
        """Take the block that the batch has made, ``(1, F, C, h, w)``.

        Raises:
            ValueError: there is none.
        """
        block, self._batch.blocks[self._row] = self._batch.blocks[self._row], None
        if block is None:
            raise ValueError(_TOGETHER)
        return block

    def switch(self, text: list[KV], *, global_sink: bool = True, memory_recache: bool = False) -> None:
        """Change the row's prompt."""
        self._batch.switch(self._row, text, global_sink=global_sink, memory_recache=memory_recache)

    def cut(self, text: list[KV]) -> None:
        """Refuse: a row begins a new shot with all others, see :meth:`StreamBatch.next_latents`.

        Raises:
            ValueError: always.
        """
        raise ValueError(_TOGETHER)

    def start_from(self, image: Tensor) -> None:
        """Give the row's first frame."""
        self._batch.start_from(self._row, image)

    def tensors(self) -> dict[str, Tensor]:
        """The row's tensors, as a stream of its own would have them."""
        return self._batch.tensors(self._row)

    def load_tensors(self, named: Mapping[str, Tensor], frame: int, first_block: int = 0) -> None:
        """Go on from saved tensors, once all rows have theirs."""
        self._batch.load(self._row, named, frame, first_block)


def _dim(name: str) -> int:
    return 1 if name.removeprefix("memory.") in _SECOND else 0


def _row(name: str, x: Tensor, row: int) -> Tensor:
    return x if x.ndim == 0 else x.narrow(_dim(name), row, 1)


def _join(rows: Sequence[Mapping[str, Tensor]], refusal: str) -> dict[str, Tensor]:
    """Rows' tensors in one; scalars are the first row's. Raise ValueError if they don't fit together."""
    if any({k: x.shape for k, x in row.items()} != {k: x.shape for k, x in rows[0].items()} for row in rows):
        raise ValueError(refusal)
    return {
        name: x if x.ndim == 0 else torch.cat([row[name] for row in rows], dim=_dim(name))
        for name, x in rows[0].items()
    }


def _join_texts(texts: Sequence[list[KV]]) -> list[KV]:
    joined = []
    for layer in zip(*texts, strict=True):
        kv = TextKV([torch.cat([x[i] for x in layer]) for i in (0, 1)])
        kv.padding = min(getattr(x, "padding", 0) for x in layer)  # what is padding in every row
        joined.append(kv)
    return list(joined)
