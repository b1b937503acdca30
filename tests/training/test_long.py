"""Stage 2: streams carried from chunk to chunk, switches, adapters, runs that resume in mid-rollout."""

from dataclasses import replace

import pytest
import torch
from echo_infinity import cli
from echo_infinity.policies import POLICIES
from echo_infinity.training.long import LongTrainer, LongTuning
from echo_infinity.weights import load_checkpoint, read_tensors
from numerics import assert_golden, assert_same_bits

pytestmark = pytest.mark.usefixtures("no_plots")

SETTINGS = LongTuning(
    steps=5, ratio=2, batch=2, rate=1e-3, fake_rate=1e-3, bf16=False, frames=60, rank=2, alpha=2.0, switch_share=1.0
)


@pytest.fixture
def make(student, teacher, prompts, tmp_path):
    def build(settings=SETTINGS, name="run", policy="evolving"):
        config = POLICIES[policy].configure(student.config)
        memory = student.memory if config.memory is not None else None
        under = student._replace(config=config, memory=memory)
        return LongTrainer(settings, under, teacher, teacher, prompts, tmp_path / name)

    return build


def test_chunks_follow_each_other_and_the_history_is_cut(make):
    trainer, places = make(), []
    for _ in range(5):
        trainer.take_step()
        trainer.step += 1
        rollout = trainer.rollout
        places.append(rollout.stream.frame)
        tensors = [*rollout.stream.cache.tensors().values(), *rollout.stream.recall.tensors().values(), rollout.recent]
        assert not any(x.requires_grad for x in tensors)
        assert rollout.recent.shape[1] == 9
    assert places == [21, 39, 57, 21, 39]


def test_only_adapters_and_memory_are_trained(make):
    trainer = make()
    before = {name: x.detach().clone() for name, x in trainer.parameters()}
    fake = {name: x.detach().clone() for name, x in trainer.fake.named_parameters()}
    for _ in range(3):
        trainer.take_step()
        trainer.step += 1
    moved = {name for name, x in trainer.parameters() if not torch.equal(x, before[name])}
    assert {name for name in moved if "lora" not in name} == {n for n in before if n.startswith("memory.")}
    assert all(name in moved for name in before if name.endswith("lora_b"))
    moved = {name for name, x in trainer.fake.named_parameters() if not torch.equal(x, fake[name])}
    assert moved
    assert all("lora" in name for name in moved)


def test_a_switch_changes_the_prompts_between_two_chunks(make):
    trainer = make()
    switched = []
    for _ in range(8):
        before = list(trainer.rollout.prompts) if trainer.rollout else None
        trainer.take_step()
        trainer.step += 1
        r = trainer.rollout
        assert r.switch in (21, 39, 57)
        start = r.stream.frame - (21 if r.stream.frame == 21 else 18)
        if start == r.switch:
            switched.append(r.prompts == r.after)
        elif start:
            assert r.prompts == before
    assert switched
    assert all(switched)


def test_no_switch_where_none_is_wanted(make):
    trainer = make(replace(SETTINGS, switch_share=0.0))
    trainer.take_step()
    assert trainer.rollout.switch == 0


@pytest.mark.parametrize(("policy", "until"), [("evolving", 2), ("evolving", 3), ("ema", 2), ("sink", 2)])
def test_resume_in_the_middle_of_a_rollout(make, policy, until):
    whole = make(name="whole", policy=policy)
    assert whole.train()
    make(name="broken", policy=policy).train(until=until)
    again = make(name="broken", policy=policy)
    assert again.resume()
    assert again.train()
    assert_same_bits(dict(again.parameters()), dict(whole.parameters()))
    assert_same_bits(again.tensors(), whole.tensors())
    for name in ("fake", "dmd", "frame"):
        assert [row.get(name) for row in again.log] == [row.get(name) for row in whole.log]


def test_the_exported_student_is_merged_and_its_adapters_stand_beside_it(make, student):
    trainer = make()
    trainer.train(until=3)
    trainer.finish()
    merged = load_checkpoint(trainer.out / "model").model.state_dict()
    adapters = read_tensors(trainer.out / "lora.safetensors")
    assert len(adapters) == 2 * 2 * 10
    for name, base in student.model.state_dict().items():
        stem = "base_model.model." + name.removesuffix(".weight")
        expected = base
        if f"{stem}.lora_A.weight" in adapters:
            expected = base + adapters[f"{stem}.lora_B.weight"] @ adapters[f"{stem}.lora_A.weight"]
        assert_golden(merged[name], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 4}, "overlap 4 must be a multiple of frames_per_block 3"),
        ({"overlap": 21}, "overlap 21 must be"),
        ({"frames": 18}, "rollouts of 18 frames have no room for a chunk of 21"),
    ],
)
def test_impossible_chunks_are_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(replace(SETTINGS, **change))


def test_the_command(folders, tmp_path):
    words = ["train", "long", "--student", folders / "student", "--teacher", folders / "teacher", "--out", tmp_path]
    words += ["--fake", folders / "teacher", "--prompts", folders / "prompts.txt", "--steps", 2, "--batch", 2]
    words += ["--config", "tiny", "--rank", 2, "--alpha", 2, "--accumulate", 2, "--probe-every", 0]
    assert cli.main([*map(str, words)]) == 0
    assert load_checkpoint(tmp_path / "model").memory is not None
