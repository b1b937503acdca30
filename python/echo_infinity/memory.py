"""The evolving memory: a fixed number of tokens that everything which leaves the window is written into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from echo_ext.memory import RopeTables, Segment, WriteGate, WriteLayer, memory_write
from echo_ext.rope import axis_pairs

_EPS = 1e-6


@dataclass(frozen=True)
class MemoryConfig:
    """Shape and options of an `EvolvingMemory`; impossible combinations raise ValueError with the numbers.

    Args:
        width: ``D`` of the model, of the memory tokens, and of the keys and values that are written.
        heads: ``H``; the head dim is ``width / heads``.
        frames: memory frames ``M``.
        tokens_per_frame: memory tokens of a memory frame; fewer than a video frame's compress it.
        layers: cross-attention layers of a write.
        groups: groups of consecutive transformer layers that have a memory of their own.
        gate_bias: initial bias of the gate; +2 keeps 88 % of the state in a write.
        init_range: standard deviation of the learned start.
        residual: publish the layers' output; no connector, no gate.
        post_norm: normalise the new state.
        normalise_keys: normalise K read from the memory over ``width``.
        sink_anchor: every write reads the sink's K and V as well.
        write_every: evictions that one write takes. The memory keeps no pending ones: the stream copies evicted K and
            V aside before their slots are overwritten, and calls `EvolvingMemory.write` with all of them as one
            segment once this many evictions are pending.
        positions: rotate memory queries and evicted keys by frame, row and column in the write (beyond the paper).
        frozen: writes leave the memory at its learned start (the paper's ablation).
    """

    width: int
    heads: int
    frames: int
    tokens_per_frame: int
    layers: int = 2
    groups: int = 1
    gate_bias: float = 2.0
    init_range: float = 0.014
    residual: bool = False
    post_norm: bool = False
    normalise_keys: bool = True
    sink_anchor: bool = False
    write_every: int = 1
    positions: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "heads", "frames", "tokens_per_frame", "layers", "groups", "write_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory {name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"memory width {self.width} is no multiple of {self.heads} heads")
        if self.positions:
            axis_pairs(self.head_dim)  # raises where the head dim can't be rotated by three axes
        if self.init_range < 0:
            raise ValueError(f"memory init_range is a standard deviation, got {self.init_range}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Memory tokens of a group."""
        return self.frames * self.tokens_per_frame

    def group_of(self, layer: int, layers: int) -> int:
        """Group whose memory transformer layer ``layer`` of ``layers`` reads; the last group takes the remainder."""
        if not 0 <= layer < layers:
            raise ValueError(f"layer {layer} is not one of {layers} layers")
        if layers < self.groups:
            raise ValueError(f"{self.groups} memory groups need at least as many layers, the model has {layers}")
        return min(layer // (layers // self.groups), self.groups - 1)


class EvolvingMemory(nn.Module):
    """Write evicted frames into a memory state and read keys and values from it.

    Holds weights only: the state belongs to the stream, ``start() -> state``, ``write(state, ...) -> state``,
    ``read(state) -> K, V``. States always lead with the group dim, ``(G, B, T, D)`` with ``T`` memory tokens a group,
    also for one group. Parameters have the official checkpoints' names, and only those that the options use exist;
    others in a checkpoint (a connector beside a residual update, a key norm that is off) are ignored on load.

    Source: arXiv 2606.04527; docs/method.md, the evolving memory.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.layers = nn.ModuleList(_WriteLayer(width) for _ in range(config.layers))
        if config.post_norm:
            self.post_norm = nn.RMSNorm(width, _EPS)
        starts = [nn.Parameter(torch.randn(1, config.tokens, width) * config.init_range) for _ in range(config.groups)]
        self._add("query_init", starts)
        if not config.residual:
            self._add("connector_proj", [_connector(width) for _ in starts])
            self._add("gate_linear", [nn.Linear(2 * width, width) for _ in starts])
            for gate in self._all("gate_linear"):
                nn.init.constant_(gate.bias, config.gate_bias)
        self._add("to_k", [nn.Linear(width, width) for _ in starts])
        self._add("to_v", [nn.Linear(width, width) for _ in starts])
        if config.normalise_keys:
            self._add("norm_k_out", [nn.RMSNorm(width, _EPS) for _ in starts])
        self.register_load_state_dict_pre_hook(_drop_unused)

    def start(self, batch: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """Return the learned start for ``batch`` streams.

        Args:
            batch: ``B``.
            dtype: of the state; default the weights'. A wider one keeps long rollouts from rounding the state.
            device: of the state; default the weights'.

        Returns:
            ``(G, B, T, D)``, a view that repeats one row: writes return a new state and never change it.

        Raises:
            ValueError: ``dtype`` is narrower than the weights'.
        """
        starts = self._all("query_init")
        own = starts[0].dtype
        dtype = own if dtype is None else dtype
        if torch.promote_types(own, dtype) != dtype:
            raise ValueError(f"a {dtype} state would round {own} weights: use {own} or wider")
        state = torch.stack(tuple(starts)) if len(starts) > 1 else starts[0].unsqueeze(0)  # (G, 1, T, D)
        return state.to(device=device, dtype=dtype).expand(-1, batch, -1, -1)

    def write(
        self,
        state: Tensor,
        segments: Sequence[Segment],
        *,
        sink: Segment | None = None,
        q_rope: RopeTables | None = None,
        k_rope: Sequence[RopeTables] | None = None,
    ) -> Tensor:
        """Return the state after the evicted frames in ``segments``; ``state`` itself is left alone.

        Args:
            state: ``(G, B, T, D)`` from `start` or the last write.
            segments: evicted K and V of the last transformer layer, before RoPE, as pairs ``(B, Tk, H, d)``: one, or
                two where they wrap around in the ring. Views are read in place.
            sink: K and V ``(B, Tk, H, d)`` of the sink, for ``sink_anchor``, else None.
            q_rope: frame table ``(B or 1, M, n_t, 2)`` and grid table ``(tokens_per_frame, n_s, 2)`` that rotate the
                memory queries, for ``positions``, else None.
            k_rope: such tables for the keys of ``sink``, if given, and of each segment.

        Returns:
            ``(G, B, T, D)`` in the state's dtype.

        Raises:
            ValueError: shapes or dtypes disagree, or an argument and the option it belongs to.
        """
        config = self.config
        expected = (config.groups, state.shape[1], config.tokens, config.width)
        if state.shape != expected:
            raise ValueError(f"state is {tuple(state.shape)}, this memory's is {expected}")
        if config.sink_anchor != (sink is not None):
            raise ValueError(f"sink_anchor is {config.sink_anchor}, sink given: {sink is not None}: they must agree")
        if config.positions != (q_rope is not None) or config.positions != (k_rope is not None):
            tables = [name for name, given in (("q_rope", q_rope), ("k_rope", k_rope)) if given is not None]
            raise ValueError(f"positions is {config.positions}, tables given: {tables}: it takes q_rope and k_rope")
        if config.frozen:
            return state
        pairs = [] if config.residual else self._pairs("connector_proj", "gate_linear")
        return memory_write(
            state,
            segments if sink is None else [sink, *segments],
            [_layer_weights(layer) for layer in self.layers],
            None if config.residual else [_gate_weights(*pair) for pair in pairs],
            heads=config.heads,
            post_norm=self.post_norm.weight if config.post_norm else None,
            eps=_EPS,
            q_rope=q_rope,
            k_rope=k_rope,
        )

    @torch.no_grad()
    def gate(
        self,
        state: Tensor,
        segments: Sequence[Segment],
        *,
        sink: Segment | None = None,
        q_rope: RopeTables | None = None,
        k_rope: Sequence[RopeTables] | None = None,
    ) -> Tensor:
        """Return the gate of the write that `write` does with the same arguments: the share of the state it keeps.

        Returns:
            ``(G, B, T, D)`` in 0 .. 1, without gradient; ones where the memory is frozen.

        Raises:
            ValueError: the memory has no gate (residual update).
        """
        if self.config.residual:
            raise ValueError("a memory with a residual update has no gate")
        if self.config.frozen:
            return torch.ones_like(state)
        read = segments if sink is None else [sink, *segments]
        layers = [_layer_weights(layer) for layer in self.layers]
        out = memory_write(state, read, layers, None, heads=self.config.heads, eps=_EPS, q_rope=q_rope, k_rope=k_rope)
        gates = []
        for g, (connector, gate) in enumerate(self._pairs("connector_proj", "gate_linear")):
            up, gelu, down, norm = connector
            dtype = gate.weight.dtype
            proposal = norm(down(gelu(up(out[g].to(dtype)))).to(dtype))  # autocast may have narrowed what comes in
            gates.append(torch.sigmoid(gate(torch.cat([state[g].to(dtype), proposal], dim=-1))))
        return torch.stack(gates)

    def read(self, state: Tensor) -> Segment:
        """Project the keys and values that a group's transformer layers attend to; once a write, not once a layer.

        Args:
            state: ``(G, B, T, D)``.

        Returns:
            K and V, each ``(G, B, T, H, d)`` in the weights' dtype. K is normalised where configured, and before RoPE.
        """
        keys, values = [], []
        for g, (to_k, to_v) in enumerate(self._pairs("to_k", "to_v")):
            x = state[g].to(to_k.weight.dtype)
            k = to_k(x)
            if self.config.normalise_keys:
                norm = self._all("norm_k_out")[g]
                k = norm(k.to(norm.weight.dtype)).to(k.dtype)  # autocast may have narrowed k
            keys.append(k)
            values.append(to_v(x))
        heads = (self.config.heads, self.config.head_dim)
        k, v = (torch.stack(x) if len(x) > 1 else x[0].unsqueeze(0) for x in (keys, values))
        return k.unflatten(-1, heads), v.unflatten(-1, heads)

    def _add(self, name: str, parts: Sequence[Any]) -> None:
        """Register one part under ``name``, or one a group under the official plural."""
        if self.config.groups == 1:
            setattr(self, name, parts[0])
        else:
            many = nn.ParameterList if isinstance(parts[0], nn.Parameter) else nn.ModuleList
            setattr(self, _plural(name), many(parts))

    def _all(self, name: str) -> Sequence[Any]:
        return [getattr(self, name)] if self.config.groups == 1 else getattr(self, _plural(name))

    def _pairs(self, first: str, second: str) -> list[tuple[Any, Any]]:
        return list(zip(self._all(first), self._all(second), strict=True))


class _WriteLayer(nn.Module):
    """Weights of one cross-attention layer, under their official names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, _EPS)
        self.q = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width, _EPS)
        self.o = nn.Linear(width, width)
        self.norm2 = nn.RMSNorm(width, _EPS)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


def _connector(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width), nn.RMSNorm(width, _EPS)
    )


def _layer_weights(layer: Any) -> WriteLayer:
    up, _, down = layer.ffn
    return WriteLayer(
        norm1=layer.norm1.weight,
        q_weight=layer.q.weight,
        q_bias=layer.q.bias,
        norm_q=layer.norm_q.weight,
        o_weight=layer.o.weight,
        o_bias=layer.o.bias,
        norm2=layer.norm2.weight,
        up_weight=up.weight,
        up_bias=up.bias,
        down_weight=down.weight,
        down_bias=down.bias,
    )


def _gate_weights(connector: Any, gate: nn.Linear) -> WriteGate:
    first, _, second, norm = connector
    return WriteGate(
        in_weight=first.weight,
        in_bias=first.bias,
        out_weight=second.weight,
        out_bias=second.bias,
        norm=norm.weight,
        gate_weight=gate.weight,
        gate_bias=gate.bias,
    )


def _plural(name: str) -> str:
    return name + ("_groups" if name in ("to_k", "to_v", "norm_k_out") else "s")


def _drop_unused(module: EvolvingMemory, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Checkpoints carry weights of options that are off; anything else that is unexpected stays an error."""
    unused = ["connector_proj", "gate_linear"] if module.config.residual else []
    if not module.config.normalise_keys:
        unused.append("norm_k_out")
    starts = tuple(f"{prefix}{name if module.config.groups == 1 else _plural(name)}." for name in unused)
    for key in [key for key in state_dict if key.startswith(starts)]:
        del state_dict[key]
