"""Causal initialisation: the teacher's paths, regression that learns, runs that resume."""

from dataclasses import replace

import pytest
import torch
from echo_infinity import cli
from echo_infinity.memory import EvolvingMemory
from echo_infinity.parts import NoText
from echo_infinity.ranks import Ranks
from echo_infinity.training.denoiser import Denoiser
from echo_infinity.training.init import Initialisation, InitTrainer
from echo_infinity.training.rollout import Levels, few_steps
from echo_infinity.training.trajectories import Paths, Trajectories, build_trajectories, follow
from echo_infinity.weights import load_checkpoint
from numerics import assert_golden, assert_same_bits

pytestmark = pytest.mark.usefixtures("no_plots")

SETTINGS = Initialisation(steps=4, batch=2, rate=1e-3, warmup=1, bf16=False, context_noise=0.1)


@pytest.fixture
def denoiser(teacher):
    return Denoiser(teacher, Ranks(), trained=False)


@pytest.fixture
def data(prompts):
    return Trajectories(torch.randn(4, 5, 21, 4, 4, 4).half(), [prompts[i % 3] for i in range(4)])


@pytest.fixture
def config(student):
    return few_steps(student.config, SETTINGS.student_steps)


def test_paths_are_eulers_under_guidance(denoiser, prompts):
    noise, paths = torch.randn(2, 21, 4, 4, 4), Paths((1.0, 0.6), substeps=2, guidance=3.0)
    states = follow(denoiser, noise, prompts[:2], paths)
    assert states.shape == (2, 3, 21, 4, 4, 4)
    x, found = noise, [noise]
    with torch.no_grad():
        for now, then in ((1.0, 0.8), (0.8, 0.6), (0.6, 0.3), (0.3, 0.0)):
            level = torch.full((2,), now)
            named = denoiser.flow(x, level, denoiser.encode(prompts[:2]))
            empty = denoiser.flow(x, level, denoiser.encode([None, None]))
            x = x + (then - now) * (empty + 3 * (named - empty))
            found += [x] if then in (0.6, 0.0) else []
    assert_golden(states, torch.stack(found, dim=1))


def test_a_cache_is_kept_and_a_lost_part_made_again(denoiser, prompts, tmp_path):
    paths = Paths((1.0, 0.5), substeps=1, batch=2)
    made = build_trajectories(denoiser, "f", prompts, paths, tmp_path, 3, Ranks())
    assert made.states.shape == (4, 3, 21, 4, 4, 4)
    assert len(made) == len(made.prompts) == 4
    (tmp_path / "batch-00001.safetensors").unlink()
    stamp = (tmp_path / "batch-00000.safetensors").stat().st_mtime_ns
    again = build_trajectories(denoiser, "f", prompts, paths, tmp_path, 3, Ranks())
    assert_same_bits(again.states, made.states)
    assert again.prompts == made.prompts
    assert (tmp_path / "batch-00000.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="use another folder"):
        build_trajectories(denoiser, "other", prompts, paths, tmp_path, 3, Ranks())


def test_a_causal_model_is_no_teacher(student):
    with pytest.raises(ValueError, match=r"small is a causal model \(3 frames a block\)"):
        Denoiser(student, Ranks(), trained=False)


def test_a_model_without_words_of_its_own_is_neither_teacher_nor_start(config, data, student, teacher, tmp_path):
    trainer = InitTrainer(SETTINGS, config, data, tmp_path)
    message = "reads prompts with NoText; these stages train models that have learned their own words"
    with pytest.raises(ValueError, match=f"small {message}"):
        trainer.start_from_checkpoint(student._replace(text=NoText("")))
    with pytest.raises(ValueError, match=f"small-whole {message}"):
        Denoiser(teacher._replace(text=NoText("")), Ranks(), trained=False)


@pytest.mark.parametrize("states", [5, 1], ids=["trajectories", "clips"])
def test_resume_equals_an_unbroken_run(config, data, student, tmp_path, states):
    data = replace(data, states=data.states[:, -states:])
    whole = InitTrainer(SETTINGS, config, data, tmp_path / "whole")
    whole.start_from_checkpoint(student)
    assert whole.train()
    broken = InitTrainer(SETTINGS, config, data, tmp_path / "broken")
    broken.start_from_checkpoint(student)
    broken.train(until=2)
    again = InitTrainer(SETTINGS, config, data, tmp_path / "broken")
    assert again.resume()
    again.train()
    assert_same_bits(dict(again.parameters()), dict(whole.parameters()))
    assert_same_bits({name: again.averaged[name] for name in whole.averaged}, whole.averaged)
    assert [row["loss"] for row in again.log] == [row["loss"] for row in whole.log]


def test_a_student_learns_one_path_by_heart(config, data, student, tmp_path):
    smooth = torch.randn(1, 1, 1, 4, 1, 1).expand(4, 5, 21, 4, 4, 4).clone()
    smooth[:, 0] = torch.randn(4, 21, 4, 4, 4)
    settings = replace(SETTINGS, steps=25, rate=1e-2, context_noise=0.0)
    trainer = InitTrainer(settings, config, replace(data, states=smooth), tmp_path)
    trainer.train()
    losses = [row["loss"] for row in trainer.log]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    trained = dict(trainer.trained())
    assert all(x.grad is not None for name, x in trained.items() if name.startswith("memory."))


def test_checkpointing_changes_nothing(config, data, student, tmp_path):
    losses = []
    for again in (False, True):
        trainer = InitTrainer(replace(SETTINGS, checkpointing=again), config, data, tmp_path / str(again))
        trainer.start_from_checkpoint(student)
        loss = trainer.losses(torch.Generator().manual_seed(0)).mean()
        loss.backward()
        losses.append([loss.detach(), *(x.grad for _, x in trainer.trained())])
    assert_same_bits(losses[1], losses[0])


def test_accumulated_batches_are_one_larger_batch(config, data, student, tmp_path):
    """Not the same draws, but the same scale: gradients of a doubled batch and of two batches agree in size."""
    norms = []
    for settings in (replace(SETTINGS, batch=8), replace(SETTINGS, batch=2, accumulate=4)):
        trainer = InitTrainer(settings, config, data, tmp_path / str(settings.accumulate))
        trainer.start_from_checkpoint(student)
        norms.append(trainer.take_step()["grad_norm"])
    assert 0.3 < norms[0] / norms[1] < 3


def test_states_that_are_not_the_students_are_refused(config, data, tmp_path):
    with pytest.raises(ValueError, match="trajectories have 3 states, a student of 4 steps needs one more"):
        InitTrainer(SETTINGS, config, replace(data, states=data.states[:, :3]), tmp_path)


def test_a_model_of_other_shapes_is_no_start(config, data, student, tmp_path):
    trainer = InitTrainer(SETTINGS, config, data, tmp_path)
    wider = student._replace(memory=EvolvingMemory(replace(student.config.memory, frames=2)))
    with pytest.raises(ValueError, match=r"other shapes: memory.query_init \(1, 8, 24\), not \(1, 12, 24\)"):
        trainer.start_from_checkpoint(wider)
    other = replace(student.config, model=replace(student.config.model, layers=3))
    with pytest.raises(ValueError, match="can't start from ModelConfig"):
        trainer.start_from_checkpoint(student._replace(config=other))


def test_the_command_makes_a_student_that_loads(folders, student, tmp_path, monkeypatch):
    monkeypatch.setattr("echo_infinity.training.init.preset", lambda name: student.config)
    words = ["train", "init", "--init", folders / "teacher", "--teacher", folders / "teacher", "--out", tmp_path]
    words += ["--prompts", folders / "prompts.txt", "--steps", 1, "--trajectories", 2, "--substeps", 1, "--batch", 2]
    assert cli.main([*map(str, words)]) == 0
    made = load_checkpoint(tmp_path / "model")
    assert made.config.sampler.steps == (1000, 750, 500, 250)
    assert made.config.sampler.solver == "renoise"
    assert made.memory is not None
    assert len(Levels(made.config)) == 4
