"""The worlds: pure functions of the frame number, with truth that the pixels bear out."""

import itertools
import time

import pytest
import torch
from echo_infinity.worlds import COLOUR_NAMES, LOOKS, OBJECT_COLOURS, World, block_start, nearest_colour, object_colour
from echo_infinity.worlds.motion import SINK_FRAMES
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import assert_same_bits

LOCAL_PIXEL_FRAMES = 36
KINDS = ["open", "path", "curtain"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_pixels_every_time(kind: str) -> None:
    a, b = (World.from_seed(11, kind).render(20, 40) for _ in range(2))
    assert_same_bits(a, b)
    assert not torch.equal(a, World.from_seed(12, kind).render(20, 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 10_000_000])
def test_random_access_equals_sequential_rendering(kind: str, start: int) -> None:
    world = World.from_seed(5, kind)
    whole = world.render(start, 200)
    assert_same_bits(torch.cat([world.render(start + i, 1) for i in range(0, 200, 7)]), whole[::7])


def test_frame_ten_million_costs_about_what_frame_zero_costs() -> None:
    world = World.from_seed(3, "curtain")

    def seconds(start: int) -> float:
        def once() -> float:
            began = time.perf_counter()
            world.render(start, 24)
            return time.perf_counter() - began

        return min(once() for _ in range(5))

    assert seconds(10_000_000) < 20 * seconds(0)


@pytest.mark.parametrize("kind", ["path", "curtain"])
def test_the_sink_frames_show_no_object_that_will_leave(kind: str) -> None:
    for seed in range(30):
        world = World.from_seed(seed, kind)
        assert not world.in_sight(0, SINK_FRAMES).any()
        assert not any(world.masks(f).any() for f in range(SINK_FRAMES))
        assert world.in_sight(0, 2000).any(0).all()  # and every object shows later


def test_in_the_open_the_first_object_shows_all_along_and_the_others_once_they_have_come() -> None:
    late = 0
    for seed in range(40):
        shown = World.from_seed(seed, "open").in_sight(0, 2000)
        assert shown[:, 0].all()
        assert shown[SINK_FRAMES + 49 :].all()  # within 48 frames of the sink
        late += int((~shown[0]).sum())
    assert late  # some do come late


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["path", "curtain"]), far=st.sampled_from([0, 10_000_000]))
def test_every_absence_outlasts_the_local_window(seed: int, kind: str, far: int) -> None:
    shown = World.from_seed(seed, kind).in_sight(far, 600)
    for column in shown.T.tolist():
        sights = [i for i, seen in enumerate(column) if seen]
        gaps = [b - a - 1 for a, b in itertools.pairwise(sights) if b - a > 1]
        assert gaps, "no absence in 600 frames"
        # An edge column shows while the curtain slides; that is no absence.
        assert min(gaps) >= LOCAL_PIXEL_FRAMES + 12 or kind == "curtain"
        assert max(gaps) >= LOCAL_PIXEL_FRAMES + 12


@pytest.mark.parametrize("kind", KINDS)
def test_masks_cover_the_pixels_of_the_objects_colour(kind: str) -> None:
    checked = 0
    for seed in range(12):
        world = World.from_seed(seed, kind)
        for frame in range(10, 250, 24):
            image = world.render(frame, 1)[0].permute(1, 2, 0)
            masks = world.masks(frame)
            for spec, mask in zip(world.objects, masks, strict=True):
                assert (nearest_colour(image[mask]) == COLOUR_NAMES.index(spec.colour)).all()
                checked += int(mask.sum())
            assert (object_colour(image[~masks.any(0)], 6.0) == -1).all()  # a soft edge is farther from pure colour
    assert checked > 1000


def test_visible_share_is_one_in_the_open_and_zero_behind_the_curtain() -> None:
    world = World.from_prompt("a red circle drifts over a dark field behind a curtain", 4, [True, False, False, True])
    assert world.truth(block_start(1) + 8)[0].visible == pytest.approx(1.0, abs=0.1)
    assert world.truth(block_start(3))[0].visible == 0.0
    assert world.truth(block_start(3))[0].colour == "red"


def test_the_curtain_follows_its_block_schedule() -> None:
    closed = [True, False, False, True, True, False]
    world = World.from_seed(1, "curtain", curtain_blocks=closed)
    for block, is_closed in enumerate(closed):
        values = world.curtains(block_start(block), block_start(block + 1) - block_start(block))
        assert bool((values >= 1).all()) == is_closed
        assert bool((values >= 1).any()) == is_closed
    assert world.curtain(100_000) == 0.0  # the last block repeats
    assert world.curtain(block_start(1)) == 0.75
    assert world.curtain(block_start(1) + 3) == 0.0
    assert world.curtain(block_start(3) - 1) == 0.75


@given(
    closed=st.lists(st.booleans(), min_size=1, max_size=8).map(lambda tail: [True, *tail]),
    data=st.data(),
)
def test_a_repeating_schedule_equals_its_unrolled_form(closed: list[bool], data: st.DataObject) -> None:
    repeat = data.draw(st.integers(1, len(closed) - 1))
    turning = World.from_seed(2, "curtain", curtain_blocks=closed, repeat_from=repeat)
    long = closed + closed[repeat:] * 6
    flat = World.from_seed(2, "curtain", curtain_blocks=long)
    count = block_start(len(closed) + 4 * (len(closed) - repeat))
    assert_same_bits(turning.curtains(0, count), flat.curtains(0, count))
    assert_same_bits(turning.in_sight(0, count), flat.in_sight(0, count))
    for frame in (0, count // 2, count - 1):
        assert [t.centre for t in turning.truth(frame)] == [pytest.approx(t.centre) for t in flat.truth(frame)]


def test_objects_go_on_where_they_were_when_the_curtain_opens() -> None:
    world = World.from_seed(9, "curtain", curtain_blocks=[True, False, True, True, True, False])
    last, first = block_start(2) - 1, block_start(5)
    before, behind, after = (world.truth(f)[0].centre for f in (last, first - 20, first))
    step = sum((a - b) ** 2 for a, b in zip(before, after, strict=True)) ** 0.5
    assert 0 < step < 1.0
    assert behind == pytest.approx(after)


def test_the_timer_bar_shortens_by_half_a_pixel_a_frame_until_the_curtain_opens() -> None:
    world = World.from_seed(9, "curtain", curtain_blocks=[True, False, True, True, True, False])
    frames = world.render(block_start(2), 36)[:, :, 55].float()  # a row of the bar
    length = (frames.amin(1) > 180).sum(-1)
    assert length.tolist() == [(36 - i) // 2 for i in range(36)]


def test_a_path_brings_the_object_back_along_the_same_line() -> None:
    world = World.from_prompt("a blue square drifts in and out over a night sea", 3)
    shown = world.in_sight(0, 600)[:, 0].tolist()
    leave = next(i for i in range(599) if shown[i] and not shown[i + 1])
    back = next(i for i in range(leave + 1, 600) if shown[i])
    a, b = world.truth(leave)[0].centre, world.truth(back)[0].centre
    assert sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5 < 3.0


def test_colours_and_grounds_are_far_apart() -> None:
    palette = torch.tensor(list(OBJECT_COLOURS.values())).float()
    distance = torch.cdist(palette, palette) + 1e3 * torch.eye(len(palette))
    assert distance.min() > 100
    for look in LOOKS:
        world = World.from_prompt(f"shapes drift in and out over a {look}")
        scene = world.render(0, 1)[0].permute(1, 2, 0).reshape(-1, 3)
        assert torch.cdist(scene.float(), palette).min() > 80
    curtain = World.from_seed(0, "curtain").render(0, 1)[0].permute(1, 2, 0).reshape(-1, 3)
    assert (object_colour(curtain) == -1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: World.from_seed(0, "fog"), "kind 'fog'"),
        (lambda: World.from_seed(0, "open", curtain_blocks=[True, False]), "curtain_blocks given"),
        (lambda: World.from_seed(0, "curtain", curtain_blocks=[False, True]), "begin with a closed block"),
        (lambda: World.from_seed(0, "curtain", curtain_blocks=[True, False], repeat_from=0), "repeat_from 0"),
        (lambda: World.from_seed(0, "open").render(-1, 2), "start -1"),
        (lambda: nearest_colour(torch.zeros(3, 4)), "3 channels"),
    ],
)
def test_rejects(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
