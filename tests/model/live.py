"""How many bytes of tensors are alive at once, on any device: on "meta" at full size without computing anything."""

import weakref

import torch
from echo_infinity.codec import to_uint8
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what is allocated inside: ``now`` and ``peak``. What an op allocates and drops itself is not seen."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self._seen.discard(key)
        self.now -= size


def decoding(codec, channels, rows, columns):
    """Peak bytes of decoding a steady block of three latents to uint8, the carried state included, as streams do it."""
    state = None
    for _ in range(3):
        with LiveBytes() as live:
            before = sum(x.nbytes for x in (state or {}).values())
            pixels, state = codec.decode(torch.zeros(1, 3, channels, rows, columns, device="meta"), state)
            pixels.isfinite().all()
            to_uint8(pixels[0]).permute(0, 2, 3, 1)
            del pixels
    return before + live.peak
