"""A few steps of every stage, on one process or, under torchrun, on several: ``every_stage.py MODELS OUT``."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from echo_infinity.ranks import Ranks, join_ranks, leave_ranks
from echo_infinity.training.clips import Clips
from echo_infinity.training.denoiser import whole_clip
from echo_infinity.training.distill import Distillation, DistillTrainer
from echo_infinity.training.flow import FlowTrainer, FlowTraining
from echo_infinity.training.init import Initialisation, InitTrainer
from echo_infinity.training.long import LongTrainer, LongTuning
from echo_infinity.training.rollout import few_steps
from echo_infinity.training.trajectories import Trajectories
from echo_infinity.weights import load_checkpoint

STAGES = ("flow", "teacher", "init", "distill", "long")
# Adam's first step is the rate with the gradient's sign, also where that is rounding: a small rate keeps it small.
COMMON = {"steps": 2, "batch": 2, "bf16": False, "rate": 1e-5, "checkpointing": True}
MATCHING = {**COMMON, "ratio": 1, "fake_rate": 1e-5}
PROMPTS = ["a red circle drifts over a dark field", "a blue square drifts over a dark field"]


def run_stages(models: Path, out: Path, ranks: Ranks) -> None:
    """Train every stage in a folder of its own; what is left there is the checkpoint and the exported model."""
    student, teacher = load_checkpoint(models / "student"), load_checkpoint(models / "teacher")
    generator = torch.Generator().manual_seed(0)
    marks = [torch.rand(6, 7, generator=generator) < 0.4 for _ in range(4)]
    latents = torch.randn(6, 21, 4, 4, 4, generator=generator).half()
    clips = Clips(latents, latents, *marks, prompts=[PROMPTS[i % 2] for i in range(6)], clips=[{}] * 6)
    paths = Trajectories(torch.randn(6, 5, 21, 4, 4, 4, generator=generator).half(), clips.prompts)
    flow = FlowTraining(**COMMON, warmup=1, blocks=7, graded=4, own_context=0.5, text_dropout=0.3)
    init = Initialisation(**COMMON, warmup=1, context_noise=0.1)
    stage2 = LongTuning(**MATCHING, accumulate=2, frames=60, rank=2, alpha=2.0, switch_share=1.0)
    parts = student, teacher, teacher, PROMPTS
    makers = {
        "flow": lambda: FlowTrainer(flow, student.config, clips, out / "flow", ranks),
        "teacher": lambda: FlowTrainer(
            replace(flow, bidirectional=True), whole_clip(student.config, 21), clips, out / "teacher", ranks
        ),
        "init": lambda: InitTrainer(init, few_steps(student.config, init.student_steps), paths, out / "init", ranks),
        "distill": lambda: DistillTrainer(Distillation(**MATCHING), *parts, out / "distill", ranks),
        "long": lambda: LongTrainer(stage2, *parts, out / "long", ranks),
    }
    for name in STAGES:
        trainer = makers[name]()
        if name in ("flow", "teacher", "init"):
            trainer.start_from_checkpoint(student)
        trainer.train(until=1)
        trainer = makers[name]()  # the rest from the checkpoint: sharded tensors must come back to their places
        trainer.resume()
        trainer.train()
        trainer.export(student.codec)


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = join_ranks()
    try:
        run_stages(Path(sys.argv[1]), Path(sys.argv[2]), own)
    finally:
        leave_ranks()
