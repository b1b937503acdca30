"""The prompt judge: times after a switch known by hand, and rollouts of a model that has learned nothing."""

import pytest
from echo_infinity.evaluation.journal import Journal
from echo_infinity.evaluation.prompt import Prompt, PromptTest, adherence, judge_frame, settled, switching
from echo_infinity.evaluation.stats import Share
from echo_infinity.worlds import World

TEST = PromptTest(rollouts=4, seconds=5.6, seed=1, batch=2)  # in scene 0 one object covers a corner of another
TIMES = [0.5 * i for i in range(10)]


@pytest.mark.parametrize(
    ("right", "seconds"),
    [
        ("xxxxxxxxxx", 0.0),
        ("...xxxxxxx", 1.5),
        ("x..x.xxx.x", 1.5),  # three of four from there on
        ("x.x.x.x.x.", None),
        ("..........", None),
        ("........xx", None),  # too late to tell
    ],
)
def test_a_switch_is_done_where_three_of_four_frames_are_right_from_then(right, seconds):
    assert settled(TIMES, [c == "x" for c in right]) == seconds


def test_a_frame_is_judged_by_colour_shape_company_and_scene():
    world = World.from_prompt("a red circle drifts over a dark field", seed=4)
    frame = world.render(200, 1)[0]
    assert judge_frame(world.prompt, frame).all
    wrong = {
        "a blue circle drifts over a dark field": (False, False, False, True),
        "a red square drifts over a dark field": (True, False, True, True),
        "a red circle and a blue square drift over a dark field": (False, False, True, True),
        "a red circle drifts over a snowy plain": (True, True, True, False),
    }
    for prompt, expected in wrong.items():
        seen = judge_frame(prompt, frame)
        assert (seen.colours, seen.shapes, seen.alone, seen.scene) == expected, prompt


def test_quartiles_count_rollouts_that_never_switch():
    rows = [
        {"kind": "switch", "number": i, "objects": t, "scene": 0.5, "all": None} for i, t in enumerate([1, 2, 3, None])
    ]
    found = {x.attribute: x for x in switching(rows)}
    assert found["objects"].quartiles == (2, 3, None)
    assert found["objects"].done == Share(3, 4)
    assert found["scene"].quartiles == (0.5, 0.5, 0.5)
    assert found["all"].quartiles == (None, None, None)


def test_truth_scores_one_chance_far_less_and_every_rollout_counts(untrained, tmp_path):
    judge, done = Prompt(untrained, "evolving", TEST), []
    journal = Journal(tmp_path / "prompt.jsonl", TEST.settings())
    judge.run(journal, done.append)
    assert sum(done) == judge.steps() == 12
    found = {x.kind: x for x in adherence(journal.rows)}
    assert found["truth"].all == Share(4, 4)
    assert found["chance"].all.right == 0
    assert found["steady"].all.n == 4
    assert [x.done.n for x in switching(journal.rows)] == [4, 4, 4]


def test_resumed_after_a_kill_gives_the_same_rows(untrained, tmp_path):
    whole = Journal(tmp_path / "whole.jsonl", TEST.settings())
    Prompt(untrained, "evolving", TEST).run(whole, lambda steps: None)
    lines = whole.path.read_bytes().splitlines(keepends=True)
    for count in (1, 3, 10):  # in the controls and in the middle of the first batch
        (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:count]) + b'{"kind": "st')
        cut = Journal(tmp_path / "cut.jsonl", TEST.settings())
        Prompt(untrained, "evolving", TEST).run(cut, lambda steps: None)
        assert cut.latest("kind", "number") == whole.latest("kind", "number")


def test_videos_too_short_to_judge_are_refused():
    with pytest.raises(ValueError, match="more than 5, by when objects have come in, got 5"):
        PromptTest(seconds=5)
    with pytest.raises(ValueError, match="at least 1 rollout"):
        PromptTest(rollouts=0)
