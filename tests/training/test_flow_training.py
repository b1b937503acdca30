"""Flow training: gradients reach the memory across blocks, and a resumed run is the unbroken one."""

import json
from dataclasses import replace

import pytest
import torch
from echo_infinity.codec import Codec, CodecConfig
from echo_infinity.config import preset
from echo_infinity.ranks import Ranks
from echo_infinity.training.clips import MARKS, Clips, join_clips
from echo_infinity.training.denoiser import Denoiser, clip_flow
from echo_infinity.training.flow import FlowTrainer, FlowTraining, configure, object_share
from echo_infinity.training.passes import StreamPasses
from echo_infinity.weights import load_checkpoint, read_tensors, text_metadata, write_tensors
from numerics import assert_same_bits

pytestmark = pytest.mark.usefixtures("no_plots")

SETTINGS = FlowTraining(steps=4, batch=2, blocks=6, warmup=1, bf16=False, own_context=0.5)


@pytest.fixture
def clips():
    n, blocks = 4, 6
    marks = torch.zeros(n, blocks, dtype=torch.bool)
    marks[:, 5] = True
    latents = torch.randn(n, 3 * blocks, 8, 8, 8).half()
    return Clips(
        latents,
        latents,
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
    assert set(parts) == {"loss", "reappear", "first_open", "sighted", "closed", "gate_mean", "gate_std"}
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


def test_the_model_is_shown_what_the_clip_shows_and_asked_for_what_is_true(clips, config, tmp_path, monkeypatch):
    shown = replace(clips, shown=torch.zeros_like(clips.latents))
    settings = replace(SETTINGS, context_noise=0.0, own_context=0.0)
    trainer = FlowTrainer(settings, config, shown, tmp_path)
    seen = []
    streams = trainer.streams

    def watched(*args):
        stream = streams(*args)
        show = stream.show
        monkeypatch.setattr(stream, "show", lambda latents, clean: (seen.append(latents), show(latents, clean)))
        return stream

    monkeypatch.setattr(trainer, "streams", watched)
    loss, _ = trainer.loss(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert len(seen) == 5
    assert not torch.stack(seen).any()
    other = FlowTrainer(settings, config, replace(shown, latents=2 * shown.latents), tmp_path)
    asked, _ = other.loss(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert asked > 1.5 * loss  # a new model answers zero: the loss is the variance of noise and truth


def test_joined_clips_are_cut_to_the_blocks_asked_for(clips):
    short = replace(
        clips,
        latents=clips.latents[:, :15],
        shown=clips.shown[:, :15],
        **{name: getattr(clips, name)[:, :5] for name in MARKS},
    )
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


@pytest.mark.parametrize("policy", ["window", "ema", "pooled", "rolling", "frozen", "full"])
def test_every_policy_is_trained_by_the_same_command(clips, config, tmp_path, policy):
    settings = replace(SETTINGS, policy=policy)
    trainer = FlowTrainer(settings, configure(config, settings), clips, tmp_path)
    torch.nn.init.normal_(trainer.model.head.head.weight)
    assert trainer.config.policy == policy
    trainer.take_step()
    for name, x in trainer.model.named_parameters():
        assert x.grad.abs().sum() > 0, name
    assert (trainer.memory is not None) == (policy == "frozen")


@pytest.fixture
def teaching(clips, config, tmp_path):
    """A teacher of 4 blocks, with weights that show what depends on what."""
    settings = replace(SETTINGS, bidirectional=True, blocks=4, text_dropout=0.5, cut_share=0.5)
    trainer = FlowTrainer(settings, configure(config, settings), clips, tmp_path)
    torch.nn.init.normal_(trainer.model.head.head.weight)
    return trainer


def test_in_a_teacher_every_frame_attends_to_every_frame(teaching):
    x = torch.randn(1, 12, 8, 8, 8, requires_grad=True)
    text = teaching.model.encode_text(teaching.text.embed([[1]]))
    flow = clip_flow(teaching.model, teaching.geometry, x, torch.tensor([0.5]), text)
    for frame in (0, 11):
        (gradient,) = torch.autograd.grad(flow[:, frame].sum(), x, retain_graph=True)
        assert all(gradient[:, other].abs().sum() > 0 for other in range(12))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_teacher_trains_exports_and_teaches(teaching, bf16):
    teaching.settings = replace(teaching.settings, bf16=bf16)
    assert {"loss", "grad_norm"} <= set(teaching.take_step())
    assert all(x.grad is not None for _, x in teaching.trained())
    assert teaching.memory is None
    folder = teaching.export(Codec(CodecConfig(8, 4, 4, 4, 4, 4)))
    assert Denoiser(load_checkpoint(folder), Ranks(), trained=False).frames == 12


def test_prompts_are_left_out_at_the_rate_asked_for(teaching, monkeypatch):
    seen = []
    embed = teaching.text.embed
    monkeypatch.setattr(teaching.text, "embed", lambda words: seen.extend(words) or embed(words))
    teaching.clip_loss(torch.zeros(60, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert 20 <= sum(not words for words in seen) <= 40


def test_clips_are_cut_at_blocks_of_their_own(teaching, monkeypatch):
    """Latents that say their own frame number: cut clips start at any block that leaves room, whole ones at 0."""
    teaching.clips.latents[:] = torch.arange(18.0).half()[:, None, None, None]
    starts = []

    def watched(x0, noise, sigma):
        starts.extend(x0[:, 0, 0, 0, 0].int().tolist())
        assert all((x0[i, :, 0, 0, 0] == torch.arange(12) + start).all() for i, start in enumerate(starts))
        return x0

    monkeypatch.setattr("echo_infinity.training.flow.add_noise", watched)
    teaching.clip_loss(torch.zeros(40, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert set(starts) == {0, 3, 6}
    assert starts.count(0) > 15


def test_steps_can_be_accumulated_and_recomputed(clips, config, tmp_path):
    plain = FlowTrainer(replace(SETTINGS, accumulate=2), config, clips, tmp_path)
    again = FlowTrainer(replace(SETTINGS, accumulate=2, checkpointing=True), config, clips, tmp_path)
    rows = [trainer.take_step() for trainer in (plain, again)]
    assert rows[0] == rows[1]
    assert_same_bits(dict(again.parameters()), dict(plain.parameters()))


def test_a_setting_that_did_not_exist_yet_was_at_its_default(clips, config, tmp_path):
    trainer = FlowTrainer(SETTINGS, config, clips, tmp_path)
    trainer.save()
    metadata = text_metadata(trainer.checkpoint)
    settings = {k: v for k, v in json.loads(metadata["settings"]).items() if k not in ("policy", "accumulate")}
    write_tensors(trainer.checkpoint, read_tensors(trainer.checkpoint), metadata | {"settings": json.dumps(settings)})
    assert FlowTrainer(SETTINGS, config, clips, tmp_path).resume()
    with pytest.raises(ValueError, match="made with settings"):
        FlowTrainer(replace(SETTINGS, accumulate=2), config, clips, tmp_path).resume()


def test_a_given_image_is_seen_clean_and_counts_for_nothing(clips, config, tmp_path, monkeypatch):
    seen = []

    def flow_of(self, x_t, conditioning):
        seen.append((x_t, conditioning.layers[0][0].shape[1]))
        return torch.zeros_like(x_t)

    monkeypatch.setattr(StreamPasses, "flow", flow_of)
    settings = replace(SETTINGS, image_share=1.0, graded=6, own_context=0.0)
    losses = []
    for scale in (1.0, 100.0):  # of what the given frame holds
        changed = replace(clips, latents=clips.latents.clone())
        changed.latents[:, 0] *= scale
        trainer = FlowTrainer(settings, configure(config, settings), changed, tmp_path)
        losses.append(trainer.loss(torch.tensor([0, 1]), torch.Generator().manual_seed(0), graded=[0])[0].item())
        x_t, levels = seen[-1]
        assert_same_bits(x_t[:, 0], changed.latents[[0, 1], 0].float())
        assert not torch.equal(x_t[:, 1], changed.latents[[0, 1], 1].float())
        assert levels == 3
    assert losses[0] == losses[1]


def test_a_model_that_learned_to_start_from_an_image_says_so(clips, config, tmp_path):
    for share in (0.0, 0.5):
        settings = replace(SETTINGS, image_share=share, steps=1)
        trainer = FlowTrainer(settings, configure(config, settings), clips, tmp_path / str(share))
        assert trainer.train()
        trainer.export(Codec(CodecConfig(8, 8, 8, 8, 8, 8)))
        assert load_checkpoint(tmp_path / str(share) / "model").config.image_start == (share > 0)
