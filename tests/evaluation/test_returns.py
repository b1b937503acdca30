"""The judge of returns on videos whose score is known by hand."""

from dataclasses import replace

import pytest
import torch
from echo_infinity.evaluation.free import Watch
from echo_infinity.evaluation.objects import find_objects
from echo_infinity.evaluation.recall import JUDGED, Scene, hidden_world
from echo_infinity.evaluation.returns import NEAR, Question, ask, judge_return, match
from echo_infinity.evaluation.scenes import CLOSED, OPEN, curtain_share, scene_of
from echo_infinity.worlds import COLOUR_NAMES, LOOKS, OBJECT_COLOURS, World, block_start

COUNT = 40


@pytest.fixture(scope="module")
def scenes():
    found = (Scene.of(seed, 2) for seed in range(2 * COUNT))
    return [scene for scene in found if scene is not None][:COUNT]


def judged(scene, video):
    return judge_return(scene.question, [video[i] for i in JUDGED])


def repainted(scene, video, colours):
    """The video with its objects in other colours."""
    video = video.clone()
    for i in range(len(video)):
        for mask, colour in zip(scene.world(1).masks(block_start(2 + scene.sight) + i), colours, strict=True):
            video[i][:, mask] = torch.tensor(OBJECT_COLOURS[colour], dtype=torch.uint8)[:, None]
    return video


def test_the_true_video_scores_one(scenes):
    assert len(scenes) == COUNT
    for scene in scenes:
        answer = judged(scene, scene.reopening())
        assert answer.all
        assert (answer.colour, answer.shape, answer.place) == (True, True, True)


def test_shuffled_colours_score_chance(scenes):
    right, total = 0, 0
    generator = torch.Generator().manual_seed(0)
    for scene in scenes:
        for _ in range(5):
            order = torch.randperm(len(COLOUR_NAMES), generator=generator).tolist()
            colours = [COLOUR_NAMES[order[i]] for i in range(len(scene.world(1).objects))]
            answer = judged(scene, repainted(scene, scene.reopening(), colours))
            assert answer.place
            right, total = right + answer.colour, total + 1
    assert total == 5 * COUNT
    assert 0.05 < right / total < 0.22  # 1 in 8; three standard deviations of 200 draws


def test_a_video_full_of_colours_scores_chance():
    """Objects of all colours in a grid: the one asked for is matched by place, whatever else shows."""
    places = [(x, y) for y in (12, 32, 52) for x in (12, 32, 52)][: len(COLOUR_NAMES)]
    frame = torch.full((3, 64, 64), 120, dtype=torch.uint8)
    for (x, y), colour in zip(places, OBJECT_COLOURS.values(), strict=True):
        frame[:, y - 6 : y + 6, x - 6 : x + 6] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    objects = find_objects(frame)
    assert len(objects) == 8
    wanted = [replace(objects[i], colour=colour) for i in range(8) for colour in COLOUR_NAMES]
    right = [judge_return(Question((one,), 0), [frame]) for one in wanted]
    assert sum(answer.colour for answer in right) == len(right) / 8
    assert all(answer.place for answer in right)


def test_an_object_that_does_not_return_is_wrong_in_everything(scenes):
    for scene in scenes[:8]:
        empty = scene.world(1).render(0, 1)[0]  # closed curtain
        answer = judge_return(scene.question, [empty] * 3)
        assert (answer.colour, answer.shape, answer.place, answer.all) == (False,) * 4


def test_a_return_elsewhere_keeps_colour_and_shape_but_not_place(scenes):
    alone = [scene for scene in scenes if len(scene.question.objects) == 1]
    assert len(alone) > 5
    for scene in alone:
        x, y = scene.question.objects[0].centre
        moved = replace(scene.question.objects[0], centre=(x + NEAR + 1, y))
        answer = judge_return(Question((moved,), 0), [scene.reopening()[i] for i in JUDGED])
        assert (answer.colour, answer.shape, answer.place) == (True, True, False)


def test_right_in_one_frame_of_three_is_not_enough(scenes):
    scene = scenes[0]
    video, closed = scene.reopening(), scene.world(1).render(0, 1)[0]
    assert not judge_return(scene.question, [video[5], closed, closed]).colour
    assert judge_return(scene.question, [video[5], video[8], closed]).all


def test_matching_takes_the_nearest_pair_first_and_each_object_once(scenes):
    one = scenes[0].question.objects[0]
    a, b = (replace(one, centre=(x, 10.0)) for x in (10.0, 20.0))
    c, d = (replace(one, centre=(x, 10.0)) for x in (19.0, 40.0))
    assert match([a, b], [c, d]) == [d, c]
    assert match([a, b], [c]) == [None, c]
    assert match([a], []) == [None]


def test_no_question_where_nothing_is_clear(scenes):
    one = scenes[0].question.objects[0]
    assert ask([], 3) is None
    assert ask([replace(one, fit=0.2)], 3) is None
    chosen = {ask([one, one, replace(one, fit=0.2)], seed).target for seed in range(20)}
    assert chosen == {0, 1}


def test_scenes_hide_their_objects_as_long_as_asked_and_return_alike(scenes):
    for scene in scenes[:6]:
        for absence in (4, 8, 16):
            world = scene.world(absence)
            start = block_start(1 + scene.sight)
            assert (world.curtains(start, 12 * absence) == 1).all()
            again = world.render(block_start(1 + scene.sight + absence), max(JUDGED) + 1)
            assert torch.equal(again, scene.reopening())
            assert not any(colour in world.prompt for colour in COLOUR_NAMES)
            assert find_objects(world.render(0, 1)[0]) == []


@pytest.mark.parametrize("look", list(LOOKS))
def test_curtain_and_scene_are_read_off_the_true_video(look):
    world = World.from_prompt(f"shapes drift over a {look} behind a curtain", seed=3)
    frames, closed = world.render(0, 300), world.curtains(0, 300)
    share = curtain_share(frames)
    assert (share[closed == 1] >= CLOSED).all()
    assert (share[closed == 0] <= OPEN).all()
    between = (closed > 0) & (closed < 1)
    assert ((share[between] > OPEN) & (share[between] < CLOSED)).all()
    assert {scene_of(frame) for frame in frames[closed == 0][::20]} == {look}


def test_watching_a_true_video_finds_that_everything_came_back():
    answers, hidden = [], []
    for seed in range(12):
        world = World.from_seed(seed, "curtain", name_objects=False)
        watch = Watch(seed)
        for first in range(0, 480, 12):
            watch.push(world.render(first, 12))
        assert watch.done
        answers.append(watch.answer.all)
        closed = "".join("x" if c == 1 else " " for c in world.curtains(0, 480).tolist()).split()
        hidden.append((watch.hidden, len(closed[1])))
    assert sum(answers) >= 11  # an object may hide behind another
    assert all(found == true for found, true in hidden)


def test_watching_a_video_that_shows_objects_in_the_sink_asks_nothing():
    world = hidden_world(5, 4, 4)
    watch = Watch(5)
    for first in range(block_start(1) + 4, 150, 12):
        watch.push(world.render(first, 12))
    assert watch.done
    assert watch.answer is None
