"""The drift judge: verdicts on series known by hand, and rollouts that are killed and go on."""

from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from echo_infinity.evaluation.drift import Drift, DriftTest, score, verdicts
from echo_infinity.evaluation.features import LEVELS, block_features
from echo_infinity.evaluation.journal import Journal
from echo_infinity.evaluation.pictures import contact_sheet, read_png, write_png
from echo_infinity.evaluation.plots import write_plots
from echo_infinity.evaluation.real import Real, load_reference, real_clips, real_worlds
from echo_infinity.evaluation.report import Run
from echo_infinity.finite import NonFiniteError
from echo_infinity.state import read_state
from echo_infinity.video import open_writer
from echo_infinity.worlds import World

HOUR = 60
LEVEL = {"saturation": 30.0, "contrast": 25.0, "sharpness": 3.0, "motion": 1.0}
PROMPTS = ("a red circle drifts over a dark field", "shapes drift over a night sea behind a curtain")


def nothing(steps):
    pass


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def real():
    features = torch.randn(4, 80, 24, generator=torch.Generator().manual_seed(0))
    return Real(features, dict(LEVEL), dict(LEVEL))


def series(real, seed=0, **planted):
    """Steady series of an hour, but for what is planted: a function of the hours."""
    hours = (np.arange(HOUR) + 0.5) / 60
    rng = np.random.default_rng(seed)
    steady = {**LEVEL, "distance": max(real.own_distances())}
    return {
        name: planted.get(name, lambda t, level=level: level * np.ones_like(t))(hours)
        * (1 + 0.02 * rng.normal(size=HOUR))
        for name, level in steady.items()
    }


def rows(streams, **planted):
    real_ = Real(torch.randn(3, 20, 24), dict(LEVEL), dict(LEVEL))
    found = []
    for i in range(streams):
        one = series(real_, i, **planted)
        found += [
            {"stream": i, "minute": m, **{name: x[m] for name, x in one.items()}, "period": None} for m in range(HOUR)
        ]
    return found


def test_a_steady_stream_is_not_blamed(real):
    assert verdicts(series(real), real) == []


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("saturation", lambda t: 30 * np.exp(t)),
        ("contrast", lambda t: 25 * np.exp(-t)),
        ("sharpness", lambda t: 3 + 4 * (t > 0.8)),
        ("motion", lambda t: 1 + 9 * t),
        ("distance", lambda t: 5 + 40 * t),
    ],
)
def test_a_planted_runaway_is_found(real, name, planted):
    found = verdicts(series(real, **{name: planted}), real)
    assert len(found) == 1
    assert found[0].startswith(f"ran away: {name}")


def test_a_dip_that_recovers_is_no_runaway(real):
    assert verdicts(series(real, saturation=lambda t: 30 * (1 - 0.8 * (abs(t - 0.5) < 0.1))), real) == []


def test_a_frozen_video_is_called_frozen_and_can_not_pass_for_stable(real):
    found = score(rows(8, motion=lambda t: np.full_like(t, 0.01)), PROMPTS, dict.fromkeys(PROMPTS, real))
    assert (found.frozen.right, found.frozen.n) == (8, 8)
    assert found.motion == pytest.approx(0.01, rel=0.05)
    assert all(reasons[0].startswith("frozen: motion 0.0") for reasons in found.reasons.values())


def test_planted_drift_has_the_right_slope_and_the_other_measures_none(real):
    found = score(rows(8, saturation=lambda t: 30 + 4 * t), PROMPTS, dict.fromkeys(PROMPTS, real))
    assert found.trends["saturation"].slope.low <= 4 <= found.trends["saturation"].slope.high
    assert not found.trends["saturation"].slope.flat
    assert all(found.trends[name].slope.flat for name in ("contrast", "sharpness", "motion", "distance"))
    assert found.runaway.right == found.frozen.right == found.looping.right == 0
    assert found.motion == pytest.approx(1, rel=0.02)
    assert found.trends["saturation"].real == 30


def test_a_stream_that_loops_for_the_last_minutes_is_said_to(real):
    looping = rows(2)
    for row in looping:
        if row["stream"] == 1 and row["minute"] >= 56:
            row["period"] = 37
    found = score(looping, PROMPTS, dict.fromkeys(PROMPTS, real))
    assert (found.looping.right, found.reasons) == (1, {1: ["loops: every 37 blocks"]})


def test_two_hours_have_a_slope_for_the_first_and_the_last(real):
    bend = lambda t: 30 + np.where(t < 1, 6 * t, 6.0)  # noqa: E731
    long = [{**row, "minute": row["minute"] + 60 * h} for h in (0, 1) for row in rows(4, saturation=bend)]
    for row in long:
        row["saturation"] = bend((row["minute"] + 0.5) / 60)
    trend = score(long, PROMPTS, dict.fromkeys(PROMPTS, real)).trends["saturation"]
    assert trend.first_hour.value == pytest.approx(6)
    assert trend.last_hour.value == pytest.approx(0, abs=1e-9)


def test_streams_that_failed_count_as_runaways_and_without_real_clips_there_is_no_distance():
    some = [{**row, "distance": None} for row in rows(2)] + [{"stream": 2, "minute": 0, "failed": "block 3 holds NaN"}]
    found = score(some, PROMPTS, None)
    assert (found.runaway.right, found.runaway.n) == (1, 3)
    assert found.reasons == {2: ["not finite: block 3 holds NaN"]}
    assert np.isnan(found.trends["distance"].slope.value)
    assert np.isnan(found.motion)
    with pytest.raises(ValueError, match="no minute"):
        score([], PROMPTS, None)


def run(checkpoint, folder, test, progress=nothing):
    path = real_worlds(checkpoint.codec, test.all_prompts(), 2, 3, folder, nothing)
    journal = Journal(folder / "drift.jsonl", test.settings())
    judge = Drift(checkpoint, "evolving", test, load_reference(path), folder)
    judge.run(journal, progress)
    return judge, journal


def test_killed_between_and_within_minutes_and_resumed_gives_the_same_rows(hasty, tmp_path):
    test = DriftTest(minutes=4, streams=3, prompts=PROMPTS, batch=2)
    judge, whole = run(hasty, tmp_path / "whole", test)
    assert judge.per_minute == 5
    blocks = []
    for after in (2, 8, 17):
        calls = []

        def stop(steps, after=after, calls=calls):
            calls.append(steps)
            if sum(calls) > after:
                raise Killed

        with pytest.raises(Killed):
            run(hasty, tmp_path / "killed", test, stop)
        blocks.append(sum(calls))
    _, resumed = run(hasty, tmp_path / "killed", test)
    same = [{k: v for k, v in row.items() if k != "resident"} for row in resumed.latest("stream", "minute")]
    assert same == [{k: v for k, v in row.items() if k != "resident"} for row in whole.rows]
    assert len(same) == 3 * 4
    assert (tmp_path / "killed" / "frames-0" / "000003.png").is_file()


def test_a_longer_run_goes_on_where_a_shorter_one_stopped(hasty, tmp_path):
    test = DriftTest(minutes=2, streams=2, prompts=PROMPTS, batch=2)
    _, short = run(hasty, tmp_path, test)
    done = []
    _, journal = run(hasty, tmp_path, replace(test, minutes=3), done.append)
    assert journal.rows[:4] == short.rows
    assert (len(journal.rows), done[0], sum(done)) == (6, 10, 15)


def test_what_is_kept_of_a_run_does_not_grow_with_it(hasty, tmp_path):
    test, sizes = DriftTest(minutes=2, streams=2, prompts=PROMPTS, batch=2), []
    for minutes in (2, 4):
        run(hasty, tmp_path, replace(test, minutes=minutes))
        saved = read_state(tmp_path / "streams-0.state.safetensors")
        sizes.append({name: x.numel() for name, x in saved.tensors.items()})
    assert sizes[0] == sizes[1]


def test_a_state_whose_minutes_are_not_in_the_journal_is_not_trusted(hasty, tmp_path):
    test = DriftTest(minutes=2, streams=2, prompts=PROMPTS, batch=2)
    _, first = run(hasty, tmp_path, test)
    first.path.unlink()
    _, again = run(hasty, tmp_path, test)
    assert [row["minute"] for row in again.rows] == [0, 0, 1, 1]


def test_a_stream_is_the_same_whatever_runs_beside_it(hasty, tmp_path):
    """The noise is each stream's own; only the rounding of larger products may differ."""
    _, two = run(hasty, tmp_path / "two", DriftTest(minutes=1, streams=2, prompts=PROMPTS, batch=2))
    _, one = run(hasty, tmp_path / "one", DriftTest(minutes=1, streams=2, prompts=PROMPTS, batch=1))
    for a, b in zip(two.rows, one.rows, strict=True):
        assert [a[name] for name in LEVELS] == pytest.approx([b[name] for name in LEVELS], rel=1e-2)


def test_nan_ends_a_run_with_a_row_that_says_so(hasty, tmp_path, monkeypatch):
    test = DriftTest(minutes=2, streams=2, prompts=PROMPTS, batch=2)
    judge = Drift(hasty, "evolving", test, None, tmp_path)

    def fail(*args):
        raise NonFiniteError("block 3 holds NaN")

    monkeypatch.setattr(judge, "_minute", fail)
    journal, done = Journal(tmp_path / "drift.jsonl", {}), []
    judge.run(journal, done.append)
    assert [row["failed"] for row in journal.rows] == ["block 3 holds NaN"] * 2
    again = []
    Drift(hasty, "evolving", test, None, tmp_path).run(journal, again.append)
    assert len(journal.rows) == 2
    assert sum(again) == judge.steps()


def test_a_run_that_fails_in_its_first_minute_leaves_the_others_their_plot(tmp_path):
    settings = {"drift": {"prompts": list(PROMPTS)}}
    failed = Run("spoilt", settings, {"drift": [{"stream": 0, "minute": 0, "failed": "block 3 holds NaN"}]})
    good = Run("good", settings, {"drift": [{**row, "distance": None, "resident": 2**28} for row in rows(1)]})
    write_plots([failed], tmp_path)
    assert not (tmp_path / "drift.png").exists()
    write_plots([good, failed], tmp_path)
    assert (tmp_path / "drift.png").is_file()


def test_real_worlds_are_near_each_other_and_kept(untrained, tmp_path):
    asked = []
    first = real_worlds(untrained.codec, PROMPTS[:1], 3, 4, tmp_path, asked.append)
    stamp = first.stat().st_mtime_ns
    assert real_worlds(untrained.codec, PROMPTS[:1], 3, 4, tmp_path, asked.append) == first
    assert first.stat().st_mtime_ns == stamp
    real_worlds(untrained.codec, PROMPTS, 3, 4, tmp_path, asked.append)
    known = load_reference(first)
    assert list(known) == list(PROMPTS)
    assert known[PROMPTS[0]].features.shape == (3, 4, 24)
    assert len(known[PROMPTS[0]].own_distances()) == 3
    assert known[PROMPTS[0]].raw["contrast"] > 0


def test_real_clips_are_read_from_videos_of_any_size(untrained, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(2):
        frames = World.from_prompt(PROMPTS[0], seed=i).render(0, 30).permute(0, 2, 3, 1)
        wide = frames.repeat_interleave(2, 1).repeat_interleave(3, 2)
        with open_writer(clips / f"{i}.mp4", width=192, height=128) as writer:
            writer.write(wide)
    path = real_clips(untrained.codec, clips, (64, 64), 3, tmp_path)
    assert load_reference(path)[""].features.shape == (2, 2, 24)
    (clips / "1.mp4").unlink()
    with pytest.raises(ValueError, match="holds 1 videos"):
        real_clips(untrained.codec, clips, (64, 64), 3, tmp_path)
    with open_writer(clips / "1.mp4", width=64, height=64) as writer:
        writer.write(torch.zeros(9, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="has 9 frames: too short, two blocks are 21"):
        real_clips(untrained.codec, clips, (64, 64), 3, tmp_path)


def test_contact_sheet_and_pictures_hold_the_frames(tmp_path):
    frames = torch.randint(0, 256, (3, 2, 3, 8, 8), dtype=torch.uint8)
    write_png(tmp_path / "deep" / "sheet.png", contact_sheet([list(row) for row in frames]))
    picture = read_png(tmp_path / "deep" / "sheet.png")
    assert picture.shape == (3, 30, 20)
    assert torch.equal(picture[:, 10:18, 10:18], frames[1, 1])
    with av.open(str(tmp_path / "deep" / "sheet.png")) as container:
        assert next(container.decode(video=0)).format.name == "rgb24"


def test_nothing_to_generate_is_refused():
    with pytest.raises(ValueError, match="at least 1 minute"):
        DriftTest(minutes=0)
    assert block_features(torch.zeros(1, 3, 8, 8, 8)).shape == (1, 24)
