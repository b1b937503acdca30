"""A student's own rollout in training: few steps a block, one of which carries gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from echo_infinity.config import EchoConfig
from echo_infinity.schedule import FlowSchedule
from echo_infinity.training.passes import StreamPasses


def few_steps(config: EchoConfig, steps: Sequence[float]) -> EchoConfig:
    """Return the configuration of a distilled generator: these warped steps, each from x0 and fresh noise."""
    sampler = replace(config.sampler, steps=tuple(steps), warp=True, solver="renoise")
    return replace(config, sampler=sampler)


class Levels:
    """The noise levels of a student's steps.

    Args:
        config: from :func:`few_steps`.
    """

    def __init__(self, config: EchoConfig) -> None:
        self.schedule = FlowSchedule(config.sampler.shift)
        steps = config.sampler.steps
        self.timesteps = self.schedule.warp(steps) if config.sampler.warp else [float(t) for t in steps]
        self.sigmas = [self.schedule.sigma(t) for t in self.timesteps]

    def __len__(self) -> int:
        return len(self.timesteps)


def roll_out(
    stream: StreamPasses, levels: Levels, exit_step: int, blocks: int, draw: Callable[[], Tensor], *, grad: bool
) -> Tensor:
    """Generate the stream's next blocks with the sampler's calls.

    Every block takes steps up to ``exit_step`` and gives that step's x0; that call and the memory's writes and reads
    carry gradient, the calls before it and the context pass do not. Nothing is detached on the way.

    Args:
        stream: goes on where it is.
        levels: of the steps.
        exit_step: the last step that is taken, 0 .. ``len(levels) - 1``.
        blocks: how many.
        draw: returns the next noise, ``(B, F, C, h, w)``: one to start a block and one a step that is taken after.
        grad: False generates without any gradient.

    Returns:
        ``(B, blocks * F, C, h, w)``.

    Source: docs/method.md sections 5 and 7.
    """
    model, device = stream.model, stream.geometry.device
    times = [torch.full((1, 1), t, device=device) for t in levels.timesteps]
    with torch.no_grad():
        clean = model.condition(torch.zeros(1, 1, device=device))
        conditions = [model.condition(t) for t in times[:exit_step]]
    generated = []
    with torch.set_grad_enabled(grad):
        conditions.append(model.condition(times[exit_step]))
        for _ in range(blocks):
            stream.begin()
            x = draw()
            for i, condition in enumerate(conditions):
                with torch.set_grad_enabled(grad and i == exit_step):
                    flow = stream.flow(x, condition)
                    x0 = levels.schedule.to_x0(x, flow, levels.timesteps[i])
                if i == 0:
                    stream.publish()
                if i < exit_step:
                    x = levels.schedule.add_noise(x0, draw(), levels.timesteps[i + 1])
            stream.show(x0.detach(), clean)
            generated.append(x0)
    return torch.cat(generated, dim=1)
