"""Stage 1: who gets whose gradient, turns, averages, early stop, runs that resume."""

from dataclasses import replace

import pytest
import torch
from echo_infinity import cli
from echo_infinity.training.distill import Distillation, DistillTrainer
from echo_infinity.training.losses import add_noise, dmd_gradient
from echo_infinity.training.plots import plot_lines
from echo_infinity.weights import load_checkpoint
from numerics import assert_golden, assert_same_bits

pytestmark = pytest.mark.usefixtures("no_plots")

SETTINGS = Distillation(steps=4, ratio=2, batch=2, rate=1e-3, fake_rate=1e-3, bf16=False)


@pytest.fixture
def make(student, teacher, prompts, tmp_path):
    def build(settings=SETTINGS, name="run", measure=None, **parts):
        models = {"student": student, "teacher": teacher, "fake": teacher} | parts
        return DistillTrainer(settings, **models, prompts=prompts, out=tmp_path / name, measure=measure)

    return build


def grads(named):
    return {name: x.grad for name, x in named if x.grad is not None and x.grad.abs().sum() > 0}


def generator():
    return torch.Generator().manual_seed(3)


def test_the_generators_loss_reaches_the_generator_and_its_memory_alone(make):
    trainer = make()
    trainer.fake_loss = lambda clip, *rest: clip.new_zeros((), requires_grad=True) * 1
    trainer.batch(generator(), turn=True)
    found = grads(trainer.parameters())
    assert {name for name, _ in trainer.parameters() if name.startswith("memory.")} <= set(found)
    assert {f"model.{name}" for name, _ in trainer.model.named_parameters()} <= set(found)
    assert not grads(trainer.fake.named_parameters())
    assert not grads(trainer.teacher.named_parameters())


def test_the_fake_scores_loss_reaches_the_fake_score_alone(make):
    trainer = make()
    trainer.batch(generator(), turn=False)
    assert not grads(trainer.parameters())
    assert not grads(trainer.teacher.named_parameters())
    assert {name for name, x in trainer.fake.named_parameters() if "words" not in name} <= set(
        grads(trainer.fake.named_parameters())
    )


def test_the_gradient_at_the_clip_is_the_papers(make, prompts):
    trainer = make(replace(SETTINGS, guidance=3.0))
    with torch.no_grad():  # else fake and teacher agree at the start but for guidance
        for _, x in trainer.fake.named_parameters():
            x.add_(0.02 * torch.randn_like(x))
    clip = torch.randn(2, 21, 4, 4, 4, requires_grad=True)
    loss, size = trainer.match(clip, 21, prompts[:2], generator())
    loss.backward()
    g = generator()
    noise, sigma = trainer.draw_noise(g, 21), trainer.draw_levels(g)
    with torch.no_grad():
        x_t = add_noise(clip, noise, sigma)
        level = sigma.view(-1, 1, 1, 1, 1)
        named, empty = (
            trainer.teacher.flow(x_t, sigma, trainer.teacher.encode(p)) for p in (prompts[:2], [None, None])
        )
        real = x_t - level * (empty + 3 * (named - empty))
        fake = x_t - level * trainer.fake.flow(x_t, sigma, trainer.fake.encode(prompts[:2]))
        expected = dmd_gradient(clip, real, fake)
    assert_golden(clip.grad * clip[0].numel() * 2, expected)  # the mean over a batch of two
    assert size == pytest.approx(expected.abs().mean().item(), rel=1e-4)


def test_frames_of_another_chunk_do_not_count(make, prompts):
    trainer = make()
    clip = torch.randn(2, 21, 4, 4, 4, requires_grad=True)
    trainer.match(clip, 18, prompts[:2], generator())[0].backward()
    assert not clip.grad[:, :3].any()
    assert clip.grad[:, 3:].any()


def test_turns(make):
    trainer = make(replace(SETTINGS, steps=4, ratio=3))
    start = {name: x.detach().clone() for name, x in trainer.parameters()}
    frozen = {name: x.detach().clone() for name, x in trainer.teacher.named_parameters()}
    moved = []
    for _ in range(4):
        before = {name: x.detach().clone() for name, x in trainer.parameters()}
        fake = [x.detach().clone() for _, x in trainer.fake.named_parameters()]
        row = trainer.take_step()
        trainer.step += 1
        moved.append(any(not torch.equal(before[name], x) for name, x in trainer.parameters()))
        assert any(not torch.equal(a, b) for a, (_, b) in zip(fake, trainer.fake.named_parameters(), strict=True))
        assert ("dmd" in row) == ("gate_mean" in row) == ("memory_grad_norm" in row) == moved[-1]
        assert {"fake", "fake_grad_norm", "exit"} <= set(row)
    assert moved == [True, False, False, True]
    assert_same_bits(dict(trainer.teacher.named_parameters()), frozen)
    assert any((trainer.averaged[name] - x).abs().max() > 0 for name, x in start.items())


def test_the_memory_learns_at_its_own_rate(make):
    trainer = make(replace(SETTINGS, memory_rate=5.0, rate=1e-4))
    before = {name: x.detach().clone() for name, x in trainer.parameters()}
    trainer.take_step()
    # The first step of Adam without momentum is the rate, whatever the gradient.
    steps = {name: (x - before[name]).abs().max().item() for name, x in trainer.trained()}
    assert steps["memory.to_v.weight"] == pytest.approx(5e-4, rel=0.05)
    assert steps["model.blocks.0.self_attn.v.weight"] == pytest.approx(1e-4, rel=0.05)


def test_resume_equals_an_unbroken_run(make):
    whole = make(name="whole")
    assert whole.train()
    make(name="broken").train(until=3)
    again = make(name="broken")
    assert again.resume()
    assert again.train()
    assert_same_bits(dict(again.parameters()), dict(whole.parameters()))
    assert_same_bits(dict(again.fake.named_parameters()), dict(whole.fake.named_parameters()))
    assert_same_bits({name: again.averaged[name] for name in whole.averaged}, whole.averaged)
    for name in ("fake", "dmd"):
        assert [row.get(name) for row in again.log] == [row.get(name) for row in whole.log]


def test_a_checkpoint_of_another_teacher_is_refused(make, teacher):
    make().save()
    with pytest.raises(ValueError, match="made with config"):
        make(teacher=teacher._replace(fingerprint="another")).resume()


def test_drift_ends_the_run_and_the_best_model_is_kept(make):
    drifts = iter([0.5, 0.2, 0.3, 0.3])
    measure = lambda checkpoint: {"drift": next(drifts), "motion": 1.0}  # noqa: E731  two lines for a def
    trainer = make(replace(SETTINGS, steps=9, probe_every=1, patience=2), measure=measure)
    assert trainer.train()
    assert trainer.step == 4
    assert "drift is 0.3000 of the level a minute, was 0.2000 at best" in trainer.why_ended
    assert [row["drift"] for row in trainer.log] == [0.5, 0.2, 0.3, 0.3]
    best = load_checkpoint(trainer.out / "best")
    assert best.config.sampler.solver == "renoise"


def test_curves_are_drawn(make, monkeypatch):
    monkeypatch.setattr("echo_infinity.training.loop.plot_lines", plot_lines)
    trainer = make(replace(SETTINGS, steps=1, probe_every=1), measure=lambda checkpoint: {"drift": 0.1})
    trainer.train()
    for name in ("log.csv", "loss.png", "gates.png", "drift.png"):
        assert (trainer.out / name).stat().st_size > 0


def test_models_that_do_not_fit_are_refused(make, student, teacher):
    with pytest.raises(ValueError, match="is a causal model"):
        make(teacher=student)
    with pytest.raises(ValueError, match="the teacher reads clips of 21 frames, chunk is 18"):
        make(replace(SETTINGS, chunk=18))
    with pytest.raises(ValueError, match="chunk 20 is no multiple of frames_per_block 3"):
        make(replace(SETTINGS, chunk=20))


def test_the_command_makes_a_student_and_a_fake_score(folders, tmp_path):
    words = ["train", "distill", "--student", folders / "student", "--teacher", folders / "teacher", "--out", tmp_path]
    words += ["--prompts", folders / "prompts.txt", "--steps", 2, "--batch", 2, "--config", "tiny", "--accumulate", 2]
    assert cli.main([*map(str, words), "--checkpointing", "--probe-every", "0"]) == 0
    assert load_checkpoint(tmp_path / "model").config.sampler.steps == (1000, 750, 500, 250)
    assert load_checkpoint(tmp_path / "fake").config.window.frames_per_block == 21
