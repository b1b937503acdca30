"""The recall judge on videos whose score is known by hand, and on a model that has learned nothing."""

from dataclasses import replace

import av
import pytest
import torch
from echo_infinity.codec import Codec
from echo_infinity.config import preset
from echo_infinity.evaluation.recall import RecallTest, object_scores, recall, scene, wilson
from echo_infinity.evaluation.rollout import contact_sheet, default_prompts, rollout
from echo_infinity.memory import EvolvingMemory
from echo_infinity.model import CausalDiT
from echo_infinity.text import GrammarText
from echo_infinity.weights import Checkpoint
from echo_infinity.worlds import COLOUR_NAMES, OBJECT_COLOURS, VOCABULARY, block_start

TEST = RecallTest(scenes=2, batch=2)


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    tiny = preset("tiny")
    config = replace(tiny, model=replace(tiny.model, layers=2), sampler=replace(tiny.sampler, steps=(1000, 500)), fps=1)
    parts = CausalDiT(config.model), EvolvingMemory(config.memory), GrammarText(VOCABULARY, 24, 64)
    return Checkpoint(config, *(part.eval().requires_grad_(False) for part in parts), Codec().eval(), "untrained")


def truth(seed):
    world = scene(TEST, seed)
    return world, world.render(block_start(TEST.reopening), 12)


@pytest.mark.parametrize("seed", range(8))
def test_the_true_video_scores_one(seed):
    world, video = truth(seed)
    scores = object_scores(world, video, block_start(TEST.reopening))
    assert len(scores) >= 1
    assert all(score == (True, 1.0) for score in scores)


def test_a_video_without_the_objects_scores_no_more_than_chance():
    hits = []
    for seed in range(40):
        world, video = truth(seed)
        empty = video.clone()
        empty[:] = torch.tensor([128, 128, 128], dtype=torch.uint8)[None, :, None, None]
        hits += [hit for hit, _ in object_scores(world, empty, block_start(TEST.reopening))]
    assert sum(hits) / len(hits) < 0.3


def test_objects_painted_in_the_next_colour_score_zero():
    world, video = truth(3)
    start = block_start(TEST.reopening)
    for i in range(len(video)):
        for spec, mask in zip(world.objects, world.masks(start + i), strict=True):
            wrong = COLOUR_NAMES[(COLOUR_NAMES.index(spec.colour) + 1) % len(COLOUR_NAMES)]
            video[i][:, mask] = torch.tensor(OBJECT_COLOURS[wrong], dtype=torch.uint8)[:, None]
    assert all(score == (False, 0.0) for score in object_scores(world, video, start))


def test_scenes_hide_their_objects_longer_than_the_window_and_do_not_name_them():
    world = scene(TEST, 5)
    closed = [world.curtain(f) == 1 for f in range(block_start(TEST.reopening))]
    longest = max(len(run) for run in "".join("x" if c else " " for c in closed).split())
    assert longest >= 4 * 12  # the window, in pixel frames
    assert not any(colour in world.prompt for colour in COLOUR_NAMES)


def test_wilson_interval_of_half_of_a_hundred():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize("mode", ["on", "off", "swapped", "frozen"])
def test_every_mode_runs_and_counts_every_object(untrained, mode):
    score = recall(untrained, TEST, mode)
    assert score.objects == sum(len(scene(TEST, i).objects) for i in range(2))
    assert 0 <= score.low <= score.colour <= score.high <= 1


def test_short_absence_and_unknown_mode_are_refused(untrained):
    with pytest.raises(ValueError, match="12 frames is not longer than the window of 12"):
        recall(untrained, replace(TEST, absence=4))
    with pytest.raises(ValueError, match="mode must be one of on, off, swapped, frozen"):
        recall(untrained, TEST, "sideways")


def test_rollout_has_a_row_a_minute_and_a_sheet_of_every_stream(untrained, tmp_path):
    result = rollout(untrained, default_prompts(2), minutes=2, rows=3)
    assert len(result.distance) == len(result.motion) == 2
    assert result.real_motion > 0
    assert result.sheet.shape == (3, 2, 3, 64, 64)
    contact_sheet(result.sheet, tmp_path / "sheet.png")
    with av.open(str(tmp_path / "sheet.png")) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert picture.shape == (3 * 66, 2 * 66, 3)
    assert (picture[:64, :64] == result.sheet[0, 0].permute(1, 2, 0).numpy()).all()


def test_rollout_of_no_minutes_is_refused(untrained):
    with pytest.raises(ValueError, match="at least one minute, got 0"):
        rollout(untrained, default_prompts(1), minutes=0)
