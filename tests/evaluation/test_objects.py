"""The finder of objects on pictures whose objects are known."""

import pytest
import torch
from echo_infinity.evaluation.objects import find_objects, patches
from echo_infinity.evaluation.prompt import judge_frame
from echo_infinity.worlds import World

SEEDS = range(60)


def truth(seed):
    world = World.from_seed(seed, "open")
    return world, world.render(240, 1)[0], [x for x in world.truth(240) if x.visible > 0.97]


def test_objects_in_full_sight_are_found_with_colour_shape_and_place():
    total = colours = shapes = 0
    for seed in SEEDS:
        _, frame, objects = truth(seed)
        found = {x.colour: x for x in find_objects(frame)}
        for spec in objects:
            total += 1
            if spec.colour in found:
                colours += 1
                shapes += found[spec.colour].shape == spec.shape
                x, y = found[spec.colour].centre
                assert abs(x - spec.centre[0]) < 1.5
                assert abs(y - spec.centre[1]) < 2.5  # a triangle's centre of mass lies below its middle
    assert total > 60
    assert colours == total
    assert shapes >= 0.97 * total


def test_an_empty_scene_has_no_objects():
    for seed in SEEDS:
        frame = World.from_seed(seed, "path").render(0, 1)[0]  # nothing shows in the sink frames
        assert find_objects(frame) == []


def test_touching_pixels_are_one_patch_and_others_are_not():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = mask[2, 0] = True
    mask[5:7, 5:7] = True
    assert sorted(int(x.sum()) for x in patches(mask)) == [3, 4]
    assert patches(torch.zeros(4, 4, dtype=torch.bool)) == []


def test_other_sizes_of_frame_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 64, 64\), got \(3, 32, 32\)"):
        find_objects(torch.zeros(3, 32, 32, dtype=torch.uint8))


def test_the_true_video_keeps_its_prompt_and_another_prompt_is_not_kept():
    kept = other = 0
    for seed in SEEDS:
        world, frame, objects = truth(seed)
        if len(objects) == len(world.objects):
            assert judge_frame(world.prompt, frame).all
            kept += 1
            colour = objects[0].colour
            swapped = world.prompt.replace(colour, "pink" if colour != "pink" else "cyan")
            other += judge_frame(swapped, frame).colours
    assert kept > 20
    assert other <= 0.2 * kept  # a scene may hold the other colour too


def test_a_prompt_that_names_nothing_can_not_be_judged():
    with pytest.raises(ValueError, match="leaves objects unnamed"):
        judge_frame("shapes drift over a dark field", torch.zeros(3, 64, 64, dtype=torch.uint8))
