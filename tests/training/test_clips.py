"""The cache of clips tells the truth, also of clips that are shown with their objects lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from echo_infinity.codec import Codec, CodecConfig, to_unit
from echo_infinity.training.clips import annotate, build_clips, load_clips
from echo_infinity.training.mixes import LOCAL_BLOCKS, LONG_ABSENCE, RECOVER, ClipMix, clip_world, draw_clip
from echo_infinity.worlds import block_start

from tests.numerics import assert_same_bits

CONFIG = CodecConfig(4, 8, 8, 8, 8, 4)


@pytest.mark.parametrize("mix", [ClipMix(), LONG_ABSENCE])
def test_aligned_clips_reappear_exactly_where_the_curtain_opens_again(mix: ClipMix) -> None:
    aligned = 0
    for seed in range(60):
        recipe = draw_clip(seed, 15, mix)
        marks = {name: mark.tolist() for name, mark in annotate(clip_world(recipe), 15).items()}
        assert marks["sighted"][0] == (recipe["kind"] == "open")  # what will leave comes after the sink
        assert not any(a and b for a, b in zip(marks["closed"], marks["sighted"], strict=True))
        schedule = recipe["curtain_blocks"]
        if schedule is None:
            continue
        aligned += 1
        closed = schedule[:15]
        opens = [b for b in range(1, 15) if closed[b - 1] and not closed[b]]
        assert marks["closed"] == closed
        assert marks["sighted"] == [not c for c in closed]
        assert [b for b in range(15) if marks["first_open"][b]] == opens[:1]
        assert [b for b in range(15) if marks["reappear"][b]] == opens[1:]
        assert all(closed[b - 2 : b] == [True, True] for b in opens[1:])
    assert aligned > 20


def test_path_clips_reappear_after_the_objects_left_the_local_window() -> None:
    mix = ClipMix(curtain=0, random_curtain=0, path=1, open=0)
    found = 0
    for seed in range(20):
        marks = annotate(clip_world(draw_clip(seed, 15, mix)), 15)
        found += int(marks["reappear"].sum())
        assert not marks["closed"].any()
    assert found > 10


def test_a_cache_holds_the_latents_and_marks_of_its_worlds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = Codec(CONFIG).eval()
    build_clips(codec, tmp_path, 5, 9, seed=3, shard=2, batch=2, progress=False)
    clips = load_clips(tmp_path)
    assert clips.latents.shape == (5, 9, 4, 8, 8)
    assert clips.latents.dtype == torch.float16
    assert clips.reappear.shape == (5, 3)
    assert len(clips) == 5
    for i, recipe in enumerate(clips.clips):
        world = clip_world(recipe)
        assert clips.prompts[i] == world.prompt
        for name, mark in annotate(world, 3).items():
            assert_same_bits(getattr(clips, name)[i], mark)
    assert len(load_clips(tmp_path, limit=3)) == 3

    # A broken run goes on: the lost shard comes back as it was, and the others are left alone.
    (tmp_path / "shard-00001.safetensors").unlink()
    stamp = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    build_clips(codec, tmp_path, 5, 9, seed=3, shard=2, batch=2, progress=False)
    assert_same_bits(load_clips(tmp_path).latents, clips.latents)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == stamp


def test_a_cache_of_other_settings_or_none_is_refused(tmp_path: Path) -> None:
    codec = Codec(CONFIG).eval()
    with pytest.raises(ValueError, match="no clips in"):
        load_clips(tmp_path)
    with pytest.raises(ValueError, match="multiple of 3, got 10"):
        build_clips(codec, tmp_path, 1, 10)
    build_clips(codec, tmp_path, 1, 3, progress=False)
    with pytest.raises(ValueError, match="use another folder"):
        build_clips(codec, tmp_path, 1, 3, seed=9, progress=False)
    with pytest.raises(ValueError, match="still be in the local window"):
        ClipMix(absence=((1, 1.0),))


def test_a_lost_clip_is_shown_without_its_objects_there_and_nowhere_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = Codec(CONFIG).eval()
    build_clips(codec, tmp_path, 8, 12, seed=5, mix=replace(RECOVER, lost=1.0), batch=1, progress=False)
    clips = load_clips(tmp_path)
    found = 0
    for i, recipe in enumerate(clips.clips):
        world = clip_world(recipe)
        frames = world.render(0, block_start(4))
        assert_same_bits(clips.latents[i], codec.encode(to_unit(frames[None]))[0][0].half())
        if recipe["lost"] is None:
            assert recipe["kind"] == "path"
            assert_same_bits(clips.shown[i], clips.latents[i])
            continue
        start, end = (block_start(block) for block in recipe["lost"])
        empty = replace(world, objects=()).render(0, block_start(4))
        found += int((frames[start:end] != empty[start:end]).any())
        frames[start:end] = empty[start:end]
        assert_same_bits(clips.shown[i], codec.encode(to_unit(frames[None]))[0][0].half())
    assert found >= 4


def test_lost_objects_are_missed_where_they_show_and_the_window_does_not_hold_them() -> None:
    found = 0
    for seed in range(200):
        recipe = draw_clip(seed, 14, RECOVER)
        lost, world = recipe["lost"], clip_world(recipe)
        marks, plain = annotate(world, 14, lost), annotate(world, 14)
        if lost is None:
            continue
        first, end = lost
        assert 0 <= first < end <= 14
        assert_same_bits(marks["reappear"][:first], plain["reappear"][:first])
        assert not marks["reappear"][first:].any()
        missed = [b for b in range(14) if marks["first_open"][b] and not plain["first_open"][b]]
        assert len(missed) <= 1
        for b in missed:
            assert first <= b < end
            assert plain["sighted"][b]
            shown = [plain["sighted"][c] and not first <= c < end for c in range(max(0, b - LOCAL_BLOCKS + 1), b)]
            assert not any(shown)
        found += len(missed)
    assert found > 30


def test_a_mix_without_lost_objects_shows_what_it_asks_for(tmp_path: Path) -> None:
    build_clips(Codec(CONFIG).eval(), tmp_path, 2, 6, progress=False)
    clips = load_clips(tmp_path)
    assert all(recipe["lost"] is None for recipe in clips.clips)
    assert_same_bits(clips.shown, clips.latents)
