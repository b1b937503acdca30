"""Train the codec on procedural worlds: resumable, every step's data and noise a function of (seed, step)."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..codec import SPACE_STRIDE, Codec, CodecConfig, to_uint8, to_unit
from ..worlds import World, block_start, nearest_colour
from ..worlds.motion import SIZE, centres
from .loop import Trainer

HELD_OUT = 1 << 20  # worlds with smaller seeds are never trained on
_KINDS = ("open",) * 9 + ("curtain",) * 7 + ("path",) * 4
_CURTAIN = (True, False, False, True, True)  # half open, half closed, from block 1 on for ever


@dataclass(frozen=True)
class CodecTraining:
    """Settings of a training run.

    Args:
        steps, batch, latent_frames: length of the run, clips a step, latents a clip.
        crop, whole_share: side in pixels of the crops, mostly around objects, that all but the last ``whole_share``
            of the steps train on; the last ones see whole frames, a quarter as many.
        rate, warmup: peak learning rate (cosine to 1 % of it) and its warm-up steps.
        noise: largest standard deviation of the noise added to the unit-variance latents.
        colour_weight: extra weight of vivid pixels, which are the objects.
        edge_weight: weight of the error of spatial differences.
        seed: of weights, worlds and noise.
        bf16: compute convolutions in bfloat16.
        decoder_only: leave the encoder, and so the latents that other models were trained on, as they are.
    """

    steps: int = 4000
    batch: int = 16
    latent_frames: int = 4
    crop: int = 32
    whole_share: float = 0.15
    rate: float = 2e-3
    warmup: int = 100
    noise: float = 0.25
    colour_weight: float = 3.0
    edge_weight: float = 0.5
    seed: int = 0
    bf16: bool = True
    decoder_only: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``echo-infinity train codec``."""
    defaults = CodecTraining()
    parser.add_argument("--out", type=Path, default=Path("runs/codec"), help="folder of checkpoint, log and weights")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch, help="clips a step")
    parser.add_argument("--latent-frames", type=int, default=defaults.latent_frames, help="latents a clip")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="peak learning rate")
    parser.add_argument("--noise", type=float, default=defaults.noise, help="largest latent noise in training")
    parser.add_argument(
        "--colour-weight", type=float, default=defaults.colour_weight, help="extra weight of vivid pixels"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="compute in float32")
    parser.add_argument("--init", type=Path, help="start from this codec's weights")
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder and its latents; needs --init")
    parser.add_argument("--restart", action="store_true", help="ignore the checkpoint in --out")


def run(args: argparse.Namespace) -> int:
    """Train (or go on training) as the options say, judge the result, print where it is; return the exit code."""
    names = {f.name for f in fields(CodecTraining)} & set(vars(args))
    settings = CodecTraining(**{name: getattr(args, name) for name in names})
    trainer = CodecTrainer(settings, args.out, init=Codec.load(args.init) if args.init else None)
    if not args.restart:
        trainer.resume()
    if not trainer.train():
        tqdm.write(f"stopped at step {trainer.step}; the same command goes on from {trainer.checkpoint}")
        return 130
    if not settings.decoder_only:
        trainer.normalise()
    trainer.codec.save(args.out / "codec.safetensors")
    scores = judge(trainer.codec)
    (args.out / "scores.json").write_text(json.dumps(scores, indent=1))
    tqdm.write(f"{args.out / 'codec.safetensors'}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
    return 0


class CodecTrainer(Trainer):
    """A codec, its optimiser and its place in the run.

    Args:
        settings: of the run; a checkpoint written with others is refused.
        out: the run's folder.
        config: sizes of a new codec.
        init: a codec to start from instead.

    Raises:
        ValueError: ``decoder_only`` without ``init``.
    """

    name, curves = "codec", ("loss", "l1")

    def __init__(
        self, settings: CodecTraining, out: Path, config: CodecConfig | None = None, init: Codec | None = None
    ) -> None:
        if settings.decoder_only and init is None:
            raise ValueError("decoder_only keeps an encoder, but there is none: give a trained codec (--init)")
        torch.manual_seed(settings.seed)
        self.codec = (Codec(config) if init is None else init).train()
        self.codec.encoder.requires_grad_(not settings.decoder_only)
        if not settings.decoder_only:  # both halves move, so the latents are normalised anew at the end
            self.codec.latent_mean.zero_()
            self.codec.latent_std.fill_(1.0)
        self.codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trained = [p for p in self.codec.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(trained, lr=settings.rate, betas=(0.9, 0.99))
        super().__init__(settings, json.dumps(asdict(self.codec.config)), out, optimiser)

    def take_step(self) -> dict[str, float]:
        """Reconstruct a batch of clips, backward, and step."""
        s = self.settings
        frames = training_batch(s, self.step)
        generator = torch.Generator().manual_seed((s.seed << 32) + self.step)
        self.set_rate(s.rate, s.warmup, floor=0.01)
        with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16):
            unit = self._unit_latents(frames)
            level = s.noise * torch.rand(len(unit), 1, 1, 1, 1, generator=generator)
            noisy = unit + level * torch.randn(unit.shape, generator=generator)
            decoded, _ = self.codec.decode(noisy)
        loss, l1 = reconstruction_loss(decoded.float(), frames, s)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        self.optimiser.step()
        return {"loss": loss.item(), "l1": l1.item(), "grad_norm": norm.item()}

    def _unit_latents(self, frames: Tensor) -> Tensor:
        if self.settings.decoder_only:
            with torch.no_grad():
                return self.codec.encode(frames)[0].float()
        raw = self.codec.encode_raw(frames)[0].float()
        # Unit variance by construction: the noise then has a meaning, and no KL weight is to be tuned.
        mean, var = raw.mean((0, 1, 3, 4)), raw.var((0, 1, 3, 4))
        return (raw - mean[:, None, None]) * torch.rsqrt(var + 1e-6)[:, None, None]

    @torch.no_grad()
    def normalise(self, clips: int = 96) -> None:
        """Fold the latents' normalisation into the codec: training used each batch's own statistics.

        The decoder has seen unit latents, so the encoder's head is scaled to unit output, up to what ``latent_mean``
        and ``latent_std`` then measure on fresh worlds (about 0 and 1).
        """
        codec = self.codec.eval()
        mean, std = self._statistics(range(clips))
        codec.encoder.head.weight.div_(std[:, None, None, None])
        bias = codec.encoder.head.bias
        assert bias is not None
        bias.sub_(mean).div_(std)
        mean, std = self._statistics(range(clips, 2 * clips))
        codec.latent_mean.copy_(mean)
        codec.latent_std.copy_(std)

    def _statistics(self, clips: range) -> tuple[Tensor, Tensor]:
        whole = replace(self.settings, batch=32, whole_share=1.0)  # 8 whole clips a batch
        first = self.settings.steps + clips.start
        batches = [training_batch(whole, step) for step in range(first, first + max(1, len(clips) // 8))]
        latents = torch.cat([self.codec.encode_raw(batch)[0] for batch in batches])
        return latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4))

    def tensors(self) -> dict[str, Tensor]:
        """The codec's weights and statistics."""
        return {f"codec.{name}": x for name, x in self.codec.state_dict().items()}

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` returned."""
        self.codec.load_state_dict({name.removeprefix("codec."): x for name, x in named.items()})


def training_batch(settings: CodecTraining, step: int) -> Tensor:
    """Return the clips of a step, ``(N, 4 latent_frames - 3, 3, S, S)`` float32 in [-1, 1], of all kinds.

    Crops (N = batch, S = crop) cost a quarter of whole frames and leave most of the empty ground out; their corners
    are multiples of 8, so that the latent grid lies on them as on whole frames (N = batch / 4, S = 64).
    """
    draw = torch.Generator().manual_seed((settings.seed << 32) + (1 << 31) + step)

    def integer(below: int) -> int:
        return int(torch.randint(below, (), generator=draw))

    whole = step >= (1 - settings.whole_share) * settings.steps
    number = max(1, settings.batch // 4) if whole else settings.batch
    count = 4 * settings.latent_frames - 3
    clips = []
    for i in range(number):
        kind, start = _KINDS[integer(len(_KINDS))], integer(400)
        if kind == "curtain" and integer(2):  # the curtain in motion is the hardest to learn: catch an opening
            start = block_start(1 + 4 * integer(8)) - integer(9)
        seed = HELD_OUT + (settings.seed * 7919 + step) * settings.batch + i
        blocks = _CURTAIN if kind == "curtain" else None
        world = World.from_seed(seed, kind, curtain_blocks=blocks, repeat_from=1 if blocks else None)
        frames = world.render(start, count)
        if not whole:
            corners = (SIZE - settings.crop) // SPACE_STRIDE + 1
            left, top = integer(corners), integer(corners)
            shown = world.in_sight(start, count).any(0).nonzero().flatten()
            if len(shown) and integer(4):  # three times in four around an object
                spec = world.objects[int(shown[integer(len(shown))])]
                x, y = centres(spec, kind, world.schedule, np.array([start + count // 2]))[0]
                wanted = [(c - settings.crop / 2 + integer(17) - 8) / SPACE_STRIDE for c in (x, y)]
                left, top = (min(max(round(w), 0), corners - 1) for w in wanted)
            rows, columns = (slice(SPACE_STRIDE * c, SPACE_STRIDE * c + settings.crop) for c in (top, left))
            frames = frames[:, :, rows, columns]
        clips.append(frames)
    return to_unit(torch.stack(clips))


def reconstruction_loss(decoded: Tensor, frames: Tensor, settings: CodecTraining) -> tuple[Tensor, Tensor]:
    """Return L1 + MSE, vivid pixels weighing more, plus L1 of spatial differences; and the plain L1."""
    error = decoded - frames
    vivid = (frames.amax(2, keepdim=True) - frames.amin(2, keepdim=True) > 0.6).float()
    weight = 1 + settings.colour_weight * vivid
    loss = (weight * (error.abs() + error.square())).mean()
    edges = F.l1_loss(decoded.diff(dim=-1), frames.diff(dim=-1)) + F.l1_loss(decoded.diff(dim=-2), frames.diff(dim=-2))
    return loss + settings.edge_weight * edges, error.detach().abs().mean()


@torch.no_grad()
def judge(codec: Codec, worlds: int = 24, latent_frames: int = 12, noise: float = 0.0) -> dict[str, float]:
    """Return the codec's scores on held-out worlds of all kinds.

    Args:
        codec: the codec.
        worlds: how many held-out worlds.
        latent_frames: latents a clip.
        noise: standard deviation of noise added to the latents before decoding.

    Returns:
        ``psnr`` in dB over all pixels, ``object_psnr`` over the objects' pixels, and ``colour_accuracy``, the
        share of object pixels whose nearest object colour is right.
    """
    generator = torch.Generator().manual_seed(0)
    count, square, pixels, object_square, object_pixels, right = 4 * latent_frames - 3, 0.0, 0, 0.0, 0, 0
    for seed in range(worlds):
        kind = ("open", "curtain", "path")[seed % 3]
        blocks = _CURTAIN if kind == "curtain" else None
        world = World.from_seed(seed, kind, curtain_blocks=blocks, repeat_from=1 if blocks else None)
        start = 37 * seed
        frames = world.render(start, count)
        latents, _ = codec.encode(to_unit(frames)[None])
        decoded, _ = codec.decode(latents + noise * torch.randn(latents.shape, generator=generator))
        got = to_uint8(decoded[0])
        error = (got.float() - frames.float()).square()
        square, pixels = square + error.sum().item(), pixels + error.numel()
        for i in range(0, count, 4):
            mask = world.masks(start + i).any(0)
            truth = nearest_colour(frames[i].permute(1, 2, 0)[mask])
            right += int((nearest_colour(got[i].permute(1, 2, 0)[mask]) == truth).sum())
            object_square += error[i][:, mask].sum().item()
            object_pixels += int(mask.sum())

    def decibels(mean_square: float) -> float:
        return 10 * math.log10(255**2 / max(mean_square, 1e-9))

    return {
        "psnr": decibels(square / pixels),
        "object_psnr": decibels(object_square / max(1, 3 * object_pixels)),
        "colour_accuracy": right / max(1, object_pixels),
    }
