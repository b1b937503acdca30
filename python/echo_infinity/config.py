"""Geometry of a generator and its presets; impossible settings are errors that name the numbers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from echo_infinity.memory import MemoryConfig
from echo_infinity.schedule import TRAIN_STEPS


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the causal DiT (docs/method.md sections 1 and 5)."""

    width: int
    heads: int
    layers: int
    ffn: int
    latent_channels: int
    text_tokens: int
    text_width: int
    time_width: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers", "ffn", "latent_channels", "text_tokens", "text_width", "time_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"head dim {self.head_dim} = {self.width} / {self.heads} must be even and at least 6")
        if self.time_width % 2:
            raise ValueError(f"time_width must be even, got {self.time_width}")
        if self.patch[0] != 1:
            raise ValueError(f"patches must not span latent frames, got patch {self.patch}")


@dataclass(frozen=True)
class WindowConfig:
    """What attention sees and the ids it gets (docs/method.md sections 2 and 3)."""

    sink_frames: int = 3
    window_frames: int = 12
    frames_per_block: int = 3
    p_max: int = 21
    relative: bool = True

    @property
    def local_frames(self) -> int:
        return self.window_frames - self.sink_frames

    def __post_init__(self) -> None:
        if self.frames_per_block < 1 or self.sink_frames < 0:
            raise ValueError(f"need frames_per_block >= 1 and sink_frames >= 0, got {self}")
        if self.local_frames < self.frames_per_block:
            raise ValueError(
                f"window_frames {self.window_frames} - sink_frames {self.sink_frames} = {self.local_frames} local "
                f"frames can't hold a block of {self.frames_per_block}"
            )
        if self.relative and self.window_frames > self.p_max:
            raise ValueError(f"window_frames {self.window_frames} exceeds the pretrained range p_max {self.p_max}")


@dataclass(frozen=True)
class SamplerConfig:
    """Denoising steps of a block (docs/method.md section 5)."""

    shift: float = 5.0
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    warp: bool = True
    solver: str = "renoise"

    def __post_init__(self) -> None:
        if self.solver not in ("renoise", "euler"):
            raise ValueError(f"solver must be 'renoise' (distilled models) or 'euler', got {self.solver!r}")
        if not self.steps or any(a <= b for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps must fall from noise to clean and not be empty, got {self.steps}")
        if not all(0 <= s <= TRAIN_STEPS for s in self.steps):
            raise ValueError(f"steps must lie in 0 .. {TRAIN_STEPS}, got {self.steps}")
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")


@dataclass(frozen=True)
class EchoConfig:
    """Everything that fixes a generator's behaviour except its weights.

    ``policy`` names what happens to frames that leave the window (:mod:`echo_infinity.policies`): by default they are
    written to ``memory``, where there is one. ``image_start`` says that the weights were trained to go on from a given
    first frame.
    """

    model: ModelConfig
    latent_rows: int
    latent_columns: int
    window: WindowConfig = field(default_factory=WindowConfig)
    memory: MemoryConfig | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    fps: int = 16
    name: str = "custom"
    policy: str = "evolving"
    image_start: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return self.latent_rows // self.model.patch[1], self.latent_columns // self.model.patch[2]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    def __post_init__(self) -> None:
        _, ph, pw = self.model.patch
        if self.latent_rows % ph or self.latent_columns % pw or min(self.latent_rows, self.latent_columns) < 1:
            raise ValueError(f"latent {self.latent_rows} x {self.latent_columns} is no multiple of patch {ph} x {pw}")
        if self.memory is not None:
            self._check_memory(self.memory)

    def _check_memory(self, memory: MemoryConfig) -> None:
        w, m = self.window, self.model
        if (memory.width, memory.heads) != (m.width, m.heads):
            raise ValueError(
                f"memory is {memory.width} wide with {memory.heads} heads, the model {m.width} with {m.heads}: "
                "they share keys and values"
            )
        if m.layers < memory.groups:
            raise ValueError(f"{memory.groups} memory groups need at least as many layers, got {m.layers}")
        if memory.sink_anchor and w.sink_frames == 0:
            raise ValueError("memory sink_anchor reads the sink, but sink_frames is 0: keep a sink or turn it off")
        if w.relative and memory.frames > w.frames_per_block:
            raise ValueError(
                f"memory frames {memory.frames} > frames_per_block {w.frames_per_block}: ids would overlap the sink"
            )
        if w.relative and w.window_frames + memory.frames > w.p_max:
            raise ValueError(
                f"window_frames {w.window_frames} + memory frames {memory.frames} = "
                f"{w.window_frames + memory.frames} exceed p_max {w.p_max}: ids would overlap the sink"
            )
        if w.relative and w.window_frames % w.frames_per_block:
            raise ValueError(
                f"with memory, window_frames {w.window_frames} must be a multiple of frames_per_block "
                f"{w.frames_per_block}, or memory ids overlap the sink while the window fills"
            )
        memory_grid(memory.tokens_per_frame, self.grid)

    def to_json(self) -> str:
        """Return the configuration as JSON, readable by :meth:`from_json`."""
        data = dataclasses.asdict(self)
        for name, usual in (("policy", "evolving"), ("image_start", False)):
            if data[name] == usual:
                del data[name]  # so that configurations from before there was a choice compare equal
        return json.dumps(data, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EchoConfig:
        """Read a configuration.

        Raises:
            ValueError: not JSON, unknown or missing fields, or an impossible geometry.
        """
        try:
            data = json.loads(text)
            memory = data.get("memory")
            return cls(
                **{
                    **data,
                    "model": _build(ModelConfig, data["model"]),
                    "window": _build(WindowConfig, data.get("window", {})),
                    "memory": None if memory is None else _build(MemoryConfig, memory),
                    "sampler": _build(SamplerConfig, data.get("sampler", {})),
                }
            )
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a valid Echo configuration: {error!r}") from error


def _build(cls: type, data: dict[str, Any]) -> Any:
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def memory_grid(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the ``tokens`` memory tokens of one memory frame on a frame's ``grid``.

    Keeps the frame's aspect: the factorisation of ``tokens`` nearest to ``grid``'s ratio.

    Raises:
        ValueError: no factorisation stays inside the grid.
    """
    rows, columns = grid
    fits = [(r, tokens // r) for r in range(1, rows + 1) if tokens % r == 0 and tokens // r <= columns]
    if not fits:
        raise ValueError(f"{tokens} memory tokens a frame can't be laid out on a grid of {rows} x {columns} tokens")
    return min(fits, key=lambda rc: abs(rc[0] / rows - rc[1] / columns))


def preset(name: str) -> EchoConfig:
    """Return a named configuration: ``tiny`` (ships with the package) or ``wan2.1-1.3b``.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


PRESETS = {
    "tiny": EchoConfig(
        name="tiny",
        model=ModelConfig(
            width=128, heads=2, layers=6, ffn=512, latent_channels=8, text_tokens=24, text_width=64, time_width=64
        ),
        latent_rows=8,
        latent_columns=8,
        memory=MemoryConfig(width=128, heads=2, frames=3, tokens_per_frame=16, gate_bias=0.5, positions=True),
    ),
    "wan2.1-1.3b": EchoConfig(
        name="wan2.1-1.3b",
        model=ModelConfig(
            width=1536, heads=12, layers=30, ffn=8960, latent_channels=16, text_tokens=512, text_width=4096
        ),
        latent_rows=60,
        latent_columns=104,
        memory=MemoryConfig(width=1536, heads=12, frames=3, tokens_per_frame=1560, normalise_keys=False),
    ),
}
