"""Bad requests on the command line: one line that says why, exit code 2, and nothing lost."""

import os

import pytest
from echo_infinity import cli
from running import frames_of
from small import CIRCLE, save_small

BAD = [
    ([CIRCLE, "--seconds", 0, "--no-video"], "the length must be a positive number of seconds, got 0.0"),
    ([CIRCLE, "--seconds", -3, "--no-video"], "the length must be a positive number of seconds, got -3.0"),
    ([CIRCLE, "--seconds", "nan", "--no-video"], "the length must be a positive number of seconds, got nan"),
    ([CIRCLE, "--frames", 0, "--no-video"], "the length must be at least one frame, got 0"),
    ([CIRCLE, "--no-video"], "how long? Give --seconds"),
    ([CIRCLE, "--seconds", 1], "where should the video go? Give -o"),
    (["--seconds", 1, "--no-video"], "what should it show? Give a prompt"),
    (["", "--seconds", 1, "-o", "x.mp4"], "the prompt is empty"),
    (["red " * 13, "--seconds", 1, "-o", "x.mp4"], "the prompt has 13 words, this model reads at most 12"),
    ([CIRCLE, "--seconds", 1, "-o", "x.mp4", "--seed", -1], "seed must be a whole number in 0 .. 9223372036854775807"),
    ([CIRCLE, "--seconds", 1, "-o", "x.mp4", "--seed", 2**63], "seed must be a whole number"),
    ([CIRCLE, "--seconds", 1, "-o", "x.avi"], "suffix .avi, expected .mp4"),
    ([CIRCLE, "--seconds", 1, "-o", "no/x.mp4"], "no"),
    (
        [CIRCLE, "--seconds", 1, "-o", "x.mp4", "--save", "no/s.safetensors"],
        "can't save the stream to no/s.safetensors",
    ),
    ([CIRCLE, "--seconds", 1, "-o", "x.mp4", "--raw-hashes", "no/h"], "No such file or directory: 'no/h'"),
    ([CIRCLE, "--seconds", 1, "-o", "x.mp4", "--threads", 0], "--threads must be at least 1, got 0"),
    ([CIRCLE, "--seconds", 1, "-o", "x.mp4", "--autosave", -1], "--autosave is seconds >= 0, got -1.0"),
    (["--resume", "none.safetensors"], "no saved stream at none.safetensors"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_bad_request_is_one_line_and_leaves_no_file(echo, folder, words, message):
    code, out, err = echo(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("echo-infinity: error: ")
    assert err.count("\n") == 1
    assert os.listdir(folder) == ["home"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--memory", "half"], "invalid choice: 'half'"),
        (["--seconds", "1", "--frames", "16"], "not allowed with argument"),
    ],
)
def test_what_the_parser_refuses_is_one_line_too(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", CIRCLE, *words])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_unknown_models_and_broken_weights_are_user_errors(folder, capsys):
    for name, message in [("no-such", "no model 'no-such'"), ("wan2.1-1.3b", "ships without weights")]:
        assert cli.main(["generate", CIRCLE, "--seconds", "1", "-o", "x.mp4", "--model", name]) == 2
        assert message in capsys.readouterr().err
    broken = save_small(folder / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert cli.main(["generate", CIRCLE, "--seconds", "1", "-o", "x.mp4", "--model", str(broken)]) == 2
    assert "corrupt or truncated" in capsys.readouterr().err
    assert not os.path.exists("x.mp4")


def test_a_video_that_is_there_is_never_touched_without_overwrite(echo, folder):
    (folder / "out.mp4").write_bytes(b"a film of mine")
    code, _, err = echo(CIRCLE, "--frames", 9, "-o", "out.mp4")
    assert code == 2
    assert "it exists already" in err
    assert (folder / "out.mp4").read_bytes() == b"a film of mine"
    assert echo(CIRCLE, "--frames", 9, "-o", "out.mp4", "--overwrite")[0] == 0
    assert len(frames_of("out.mp4")) == 9


def test_a_state_that_is_there_is_never_replaced_without_overwrite(echo, folder):
    echo(CIRCLE, "--frames", 33, "-o", "out.mp4", "--autosave", 60)
    good = (folder / "out.state.safetensors").read_bytes()
    os.remove("out.mp4")
    code, _, err = echo(CIRCLE, "--frames", 9, "-o", "out.mp4")
    assert code == 2
    assert "go on with --resume" in err
    assert (folder / "out.state.safetensors").read_bytes() == good
    assert echo(CIRCLE, "--frames", 9, "-o", "out.mp4", "--overwrite")[0] == 0
    assert not (folder / "out.state.safetensors").exists()


def test_a_damaged_state_leaves_the_video_alone(echo, folder):
    echo(CIRCLE, "--frames", 33, "-o", "out.mp4", "--save", "s.safetensors")
    video, state = (folder / "out.mp4").read_bytes(), folder / "s.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    code, _, err = echo("--resume", "s.safetensors", "--frames", 60)
    assert code == 2
    assert "corrupt or truncated" in err
    assert (folder / "out.mp4").read_bytes() == video


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frames", 33], "the video has 33 frames (2.06 s) already: ask for more"),
        ([], "the video has 33 frames"),
        (["--frames", 50, "--seed", 3], "--seed of a resumed stream can't change: it is 0"),
        (["--frames", 50, "--memory", "off"], "--memory of a resumed stream can't change: it is on"),
    ],
)
def test_what_a_resumed_stream_can_not_do_is_said(echo, words, message):
    echo(CIRCLE, "--frames", 33, "-o", "out.mp4", "--save", "s.safetensors")
    code, _, err = echo("--resume", "s.safetensors", *words)
    assert code == 2
    assert message in err
