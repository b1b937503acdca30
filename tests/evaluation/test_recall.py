"""The recall judge on a model that has learned nothing: every mode, killed and resumed."""

from dataclasses import replace

import pytest
import torch
from echo_infinity.codec import to_unit
from echo_infinity.evaluation.journal import Journal
from echo_infinity.evaluation.recall import MODES, Recall, RecallTest, cells, check_worlds, keeps_memory
from echo_infinity.policies import POLICIES, find_policy
from numerics import assert_stream_equal

TEST = RecallTest(rollouts=4, absences=(1,), modes=MODES, batch=2)


def nothing(steps):
    pass


class Killed(Exception):
    pass


def test_every_mode_counts_every_rollout_and_the_controls_are_what_they_say(untrained, tmp_path):
    judge, done = Recall(untrained, "evolving", TEST), []
    journal = Journal(tmp_path / "recall.jsonl", TEST.settings())
    judge.run(journal, done.append)
    assert sum(done) == judge.steps() == 7 * 4
    found = {cell.mode: cell for cell in cells(journal.rows)}
    assert {*found} >= {"truth", "codec", "chance", "shown", "swapped"}
    assert all(cell.rollouts == 4 for cell in found.values())
    assert found["truth"].all.share == 1
    assert found["shown"].asked == 4
    assert found["shown"].strict == found["shown"].colour
    assert found["shown"].absence == 1
    assert found["shown"].colour.share <= 0.5  # it has learned nothing


def test_killed_anywhere_and_resumed_gives_the_same_cells(untrained, tmp_path):
    test = replace(TEST, modes=("shown", "staged"))
    whole = Journal(tmp_path / "whole.jsonl", test.settings())
    Recall(untrained, "evolving", test).run(whole, nothing)
    path = tmp_path / "killed.jsonl"
    for after in (1, 3, 6):
        judge, calls = Recall(untrained, "evolving", test), []

        def stop(steps, after=after, calls=calls):
            calls.append(steps)
            if len(calls) > after:
                raise Killed

        with pytest.raises(Killed):
            judge.run(Journal(path, test.settings()), stop)
        path.write_bytes(path.read_bytes()[:-7])  # the kill came in the middle of a line
    resumed = Journal(path, test.settings())
    Recall(untrained, "evolving", test).run(resumed, nothing)
    keys = ("mode", "absence", "number")
    assert resumed.latest(*keys) == whole.latest(*keys)
    assert cells(resumed.latest(*keys)) == cells(whole.rows)


def test_more_rollouts_keep_those_that_are_there(untrained, tmp_path):
    test = replace(TEST, modes=("shown",))
    journal = Journal(tmp_path / "recall.jsonl", test.settings())
    Recall(untrained, "evolving", test).run(journal, nothing)
    first = list(journal.rows)
    Recall(untrained, "evolving", replace(test, rollouts=6)).run(journal, nothing)
    assert journal.rows[: len(first)] == first
    assert [cell.rollouts for cell in cells(journal.latest("mode", "absence", "number"))] == [6] * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_judged(untrained, tmp_path, policy):
    test = RecallTest(rollouts=2, absences=(1,), modes=("shown", "staged"), batch=2)
    journal = Journal(tmp_path / "recall.jsonl", test.settings())
    Recall(untrained, policy, test).run(journal, nothing)
    assert [cell.rollouts for cell in cells(journal.rows)] == [2] * 5


@pytest.mark.parametrize("absence", [1, 2, 5])
def test_shared_closed_blocks_are_what_each_world_encodes_to(untrained, absence):
    judge = Recall(untrained, "evolving", TEST)
    worlds = [judge._scene(i).world(absence) for i in range(3)]
    whole = torch.stack([world.render(0, 12 * (1 + TEST.sight + absence) - 3) for world in worlds])
    assert_stream_equal(judge._encode(worlds, absence), untrained.codec.encode(to_unit(whole))[0])


def test_memories_of_a_policy_without_one_can_not_be_swapped(untrained, tmp_path):
    test = replace(TEST, modes=("swapped",))
    kept = {policy: keeps_memory(untrained, policy) for policy in POLICIES}
    assert [policy for policy in POLICIES if not kept[policy]] == ["window", "sink", "full"]
    with pytest.raises(ValueError, match="this policy has none: leave it out"):
        Recall(untrained, "sink", test).run(Journal(tmp_path / "recall.jsonl", {}), nothing)


def test_free_rollouts_are_sorted_by_how_long_objects_were_out_of_sight():
    def row(number, windows, right, asked=True):
        answer = dict.fromkeys(("colour", "shape", "place", "all"), right)
        return {"mode": "free", "absence": None, "number": number, "asked": asked, "windows": windows, **answer}

    rows = [row(0, 0.5, True), row(1, 1.2, True), row(2, 1.9, False), row(3, 4.5, True), row(4, 0, False, asked=False)]
    found = cells(rows)
    assert [(c.absence, c.rollouts, c.asked, c.colour.right) for c in found] == [
        (0, 5, 1, 1),
        (1, 5, 2, 1),
        (4, 5, 1, 1),
    ]


def test_other_tests_and_other_models_are_refused(untrained):
    with pytest.raises(ValueError, match="recall modes are shown, swapped, staged, free, got sideways"):
        RecallTest(modes=("sideways",))
    with pytest.raises(ValueError, match="at least 1, got"):
        RecallTest(absences=(0.5,))
    with pytest.raises(ValueError, match="2 rollouts"):
        RecallTest(rollouts=1)
    other = untrained._replace(config=replace(untrained.config, latent_rows=16, name="tall"))
    with pytest.raises(ValueError, match="model tall makes 64 x 128 in blocks of 3: leave recall out"):
        check_worlds(other, "recall")


def test_rollouts_that_show_nothing_to_ask_for_count_in_the_strict_share():
    answer = dict.fromkeys(("colour", "shape", "place", "all"), True)
    silent = dict.fromkeys(answer, False)
    some = {"mode": "staged", "absence": 2.0}
    rows = [{**some, "number": 0, "asked": True, **answer}, {**some, "number": 1, "asked": False, **silent}]
    (cell,) = cells(rows)
    assert (cell.rollouts, cell.asked, cell.colour.share, cell.strict.share) == (2, 1, 1.0, 0.5)


def test_absences_are_as_long_for_a_model_that_was_trained_to_see_everything(untrained):
    test = replace(TEST, absences=(1, 2))
    config = find_policy("full").configure(untrained.config)
    trained = untrained._replace(config=config, memory=None)
    assert Recall(trained, "full", test).blocks() == Recall(untrained, "evolving", test).blocks()
