"""Flow training: gradients reach the memory across blocks, and a resumed run is the unbroken one."""

from dataclasses import replace

import pytest
import torch
from echo_infinity.config import preset
from echo_infinity.training.clips import Clips, join_clips
from echo_infinity.training.flow import FlowTrainer, FlowTraining, object_share
from numerics import assert_same_bits

MARKS = ("closed", "sighted", "first_open", "reappear")
SETTINGS = FlowTraining(steps=4, batch=2, blocks=6, warmup=1, bf16=False, own_context=0.5)


@pytest.fixture
def clips():
    n, blocks = 4, 6
    marks = torch.zeros(n, blocks, dtype=torch.bool)
    marks[:, 5] = True
    return Clips(
        torch.randn(n, 3 * blocks, 8, 8, 8).half(),
        *([marks] * 4),
        prompts=["a red circle drifts over a dark field"] * n,
        clips=[{}] * n,
    )


@pytest.fixture
def config():
    tiny = preset("tiny")
    return replace(tiny, model=replace(tiny.model, layers=2))


def test_loss_of_a_late_block_reaches_the_memory_through_its_writes(clips, config, tmp_path):
    trainer = FlowTrainer(SETTINGS, config, clips, tmp_path)
    torch.nn.init.normal_(trainer.model.head.head.weight)
    loss, parts = trainer.loss(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    loss.backward()
    assert set(parts) == {"reappear", "first_open", "sighted", "closed"}
    for name, x in trainer.memory.named_parameters():
        assert x.grad is not None, name
        assert x.grad.abs().sum() > 0, name


@pytest.mark.parametrize("bf16", [False, True])
def test_every_weight_learns_where_only_the_last_block_is_graded(clips, config, tmp_path, bf16):
    trainer = FlowTrainer(replace(SETTINGS, graded=1, reappear_share=1.0, bf16=bf16), config, clips, tmp_path)
    torch.nn.init.normal_(trainer.model.head.head.weight)
    trainer.take_step()
    idle = [name for name, x in trainer.parameters() if x.grad is None or not x.grad.abs().sum() > 0]
    assert idle == []


def test_resume_equals_an_unbroken_run(clips, config, tmp_path):
    whole = FlowTrainer(SETTINGS, config, clips, tmp_path / "whole")
    assert whole.train()
    broken = FlowTrainer(SETTINGS, config, clips, tmp_path / "broken")
    broken.train(until=2)
    again = FlowTrainer(SETTINGS, config, clips, tmp_path / "broken")
    assert again.resume()
    assert again.train()
    assert_same_bits(dict(again.parameters()), dict(whole.parameters()))
    assert_same_bits({name: again.averaged[name] for name in whole.averaged}, whole.averaged)
    assert [row["loss"] for row in again.log] == [row["loss"] for row in whole.log]


def test_resume_refuses_other_settings(clips, config, tmp_path):
    FlowTrainer(SETTINGS, config, clips, tmp_path).save()
    other = FlowTrainer(replace(SETTINGS, rate=1.0), config, clips, tmp_path)
    with pytest.raises(ValueError, match="use the same options, another --out, or --restart"):
        other.resume()


def test_reappearing_blocks_weigh_more(clips, config, tmp_path):
    trainer = FlowTrainer(replace(SETTINGS, reappear_weight=1e6), config, clips, tmp_path)
    loss, parts = trainer.loss(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(parts["reappear"], rel=1e-4)


def test_joined_clips_are_cut_to_the_blocks_asked_for(clips):
    short = replace(clips, latents=clips.latents[:, :15], **{name: getattr(clips, name)[:, :5] for name in MARKS})
    joined = join_clips([clips, short], blocks=4)
    assert joined.latents.shape == (8, 12, 8, 8, 8)
    assert joined.reappear.shape == (8, 4)
    assert len(joined) == len(joined.clips) == 8
    with pytest.raises(ValueError, match="5 blocks, 6 are asked for"):
        join_clips([clips, short], blocks=6)


def test_what_stands_out_of_its_row_is_an_object():
    latents = torch.randn(2, 3, 8, 8, 1).expand(2, 3, 8, 8, 8).clone()  # a scene: the same all along each row
    assert object_share(latents).abs().max() == 0
    latents[:, :, :, 2, 5] += 3.0
    share = object_share(latents)
    assert share.shape == (2, 3, 1, 8, 8)
    assert (share[..., 2, 5] == 1).all()
    assert share.sum() == 6


def test_batches_of_entries_share_the_block_of_a_first_sight(clips, config, tmp_path):
    marks = torch.zeros(4, 6, dtype=torch.bool)
    marks[1, 2] = marks[3, 2] = True
    entering = replace(clips, first_open=marks)
    settings = replace(SETTINGS, graded=2, reappear_share=0.0, entry_share=1.0)
    trainer = FlowTrainer(settings, config, entering, tmp_path)
    for seed in range(8):
        index, graded = trainer._draw(torch.Generator().manual_seed(seed))
        assert set(index.tolist()) <= {1, 3}
        assert 2 in graded
        assert len(graded) == 2
