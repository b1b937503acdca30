"""The prompts: a closed language that says what a world shows."""

import pytest
from echo_infinity.worlds import (
    COLOUR_NAMES,
    LOOKS,
    SHAPES,
    VOCABULARY,
    Description,
    NamedObject,
    World,
    compose,
    parse,
)
from echo_infinity.worlds.grammar import KINDS, SIZES, SPEEDS
from hypothesis import given
from hypothesis import strategies as st


def maybe(choices: tuple[str, ...]) -> st.SearchStrategy[str | None]:
    return st.none() | st.sampled_from(choices)


descriptions = st.builds(
    Description,
    look=st.sampled_from(tuple(LOOKS)),
    kind=st.sampled_from(KINDS),
    objects=st.none()
    | st.lists(st.builds(NamedObject, maybe(COLOUR_NAMES), maybe(SHAPES), maybe(SIZES)), min_size=1, max_size=3).map(
        tuple
    ),
    speed=maybe(SPEEDS),
)


@given(description=descriptions)
def test_a_prompt_says_exactly_what_its_description_says(description: Description) -> None:
    prompt = compose(description)
    assert parse(prompt) == description
    assert set(prompt.split()) <= set(VOCABULARY)


@given(description=descriptions, seed=st.integers(0, 1 << 40))
def test_a_world_keeps_every_attribute_its_prompt_names(description: Description, seed: int) -> None:
    world = World.from_prompt(compose(description), seed)
    assert (world.look, world.kind, world.prompt) == (description.look, description.kind, compose(description))
    for named, spec in zip(description.objects or (), world.objects, strict=bool(description.objects)):
        for name in ("colour", "shape", "size"):
            assert getattr(named, name) in (None, getattr(spec, name))


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
def test_a_seeds_prompt_gives_back_the_looks_it_names(seed: int, kind: str) -> None:
    world = World.from_seed(seed, kind)
    again = World.from_prompt(world.prompt, seed)
    assert [(s.colour, s.shape) for s in again.objects] == [(s.colour, s.shape) for s in world.objects]


def test_unnamed_attributes_differ_between_seeds() -> None:
    worlds = [World.from_prompt("shapes drift over a dark field", seed) for seed in range(20)]
    assert len({w.objects[0].colour for w in worlds}) > 4
    assert {len(w.objects) for w in worlds} == {1, 2, 3}


def test_the_default_prompt_is_a_red_circle_over_a_dark_field() -> None:
    world = World.from_prompt("A red circle drifts over a dark field.", 7)
    assert (world.look, world.kind, len(world.objects)) == ("dark field", "open", 1)
    assert (world.objects[0].colour, world.objects[0].shape) == ("red", "circle")


def test_the_vocabulary_is_small_and_sorted() -> None:
    assert len(VOCABULARY) <= 80
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a crimson circle floats over a dark field", "unknown words: crimson, floats"),
        ("", "empty"),
        ("a red circle drifts over a dark meadow", "'dark meadow' is no scene"),
        ("a red circle drift over a dark field", "expected 'drifts' but found 'drift'"),
        ("a red circle and a blue square drifts over a dark field", "expected 'drift'"),
        ("a red circle drifts over a dark field behind", "expected 'a' but found the end"),
        ("a red circle drifts in and out over a dark field behind a curtain", "exclude each other"),
        ("a red circle drifts over a dark field behind a curtain quickly", "after the end: 'quickly'"),
        ("a red a blue circle drifts over a dark field", "expected 'shape' but found 'a'"),
        (" and ".join(["a shape"] * 4) + " drift over a dark field", "1 to 3 objects, got 4"),
    ],
)
def test_says_what_is_wrong_with_a_prompt(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World.from_prompt(prompt)


def test_compose_rejects_what_the_vocabulary_lacks() -> None:
    with pytest.raises(ValueError, match="colour 'mauve'"):
        compose(Description("dark field", objects=(NamedObject("mauve"),)))
