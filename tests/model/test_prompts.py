"""Prompt schedules and cuts: what a file says, when it takes effect, and what a new shot knows of the old one."""

import itertools

import pytest
from echo_infinity.noise import counter_noise
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.prompts import TimedPrompt, parse_schedule, read_schedule
from echo_infinity.state import read_state
from numerics import assert_same_bits
from small import CIRCLE, SQUARE, small_pipe

CROSS = "a green cross drifts over a dark field"


def take(stream, blocks):
    return list(itertools.islice(stream, blocks))


def test_a_schedule_is_read_line_by_line():
    text = f"# a comment\n{CIRCLE}\n\n[30s] {SQUARE}\n  [1m30s]| {CROSS}\n[2h] {CIRCLE}\n[3h 5m 0.5s] {SQUARE}\n"
    assert parse_schedule(text) == (
        TimedPrompt(0, CIRCLE),
        TimedPrompt(30, SQUARE),
        TimedPrompt(90, CROSS, cut=True),
        TimedPrompt(7200, CIRCLE),
        TimedPrompt(11100.5, SQUARE),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it holds no prompt"),
        ("# nothing\n", "it holds no prompt"),
        ("[5s] a", "line 1: the first prompt must start at 0s, not 5s"),
        ("a\nb", "line 2: 'b' has no time"),
        ("a\n[4s] b\n[4s] c", "line 3: 4s is not after the line before, 4s"),
        ("a\n[soon] b", "line 2: can't read the time 'soon'"),
        ("a\n[] b", "line 2: can't read the time ''"),
        ("a\n[1h30] b", "line 2: can't read the time '1h30'"),
        ("a\n[4s]", "line 2: '[4s]' holds no prompt"),
        ("a\n[4s] | ", "holds no prompt"),
        ("a\n[4s] b | c", "more than one |"),
    ],
)
def test_a_bad_line_is_named(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_schedule(text)
    assert message in str(caught.value)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        read_schedule(tmp_path / "a")


def test_a_scheduled_prompt_takes_effect_at_the_first_block_that_starts_at_its_time_or_later():
    pipe = small_pipe()
    planned = pipe.stream(CIRCLE, schedule=[TimedPrompt(21 / 16, SQUARE), TimedPrompt(34 / 16, CROSS)])
    switched = pipe.stream(CIRCLE)
    expected = take(switched, 2)  # 21 frames
    switched.switch(SQUARE)
    expected += take(switched, 2)  # 33 of them are a frame too few, 45 are enough
    switched.switch(CROSS)
    expected += take(switched, 2)
    assert_same_bits(take(planned, 6), expected)
    assert planned.prompts == switched.prompts


def test_prompts_that_fall_due_together_leave_the_last_and_any_cut():
    pipe = small_pipe()
    stream = pipe.stream(CIRCLE, schedule=[TimedPrompt(0.1, SQUARE, cut=True), TimedPrompt(0.2, CROSS)])
    take(stream, 2)
    assert [(p.prompt, p.block, p.cut) for p in stream.prompts] == [(CIRCLE, 0, False), (CROSS, 1, True)]


def test_a_scheduled_prompt_that_the_model_cant_read_is_refused_at_the_start():
    with pytest.raises(ValueError, match="no word of the prompt"):
        small_pipe().stream(CIRCLE, schedule=[TimedPrompt(5, "zzz")])


@pytest.mark.parametrize("blocks", [1, 7])
def test_a_cut_begins_a_stream_of_its_own_with_the_noise_of_its_place(blocks):
    pipe = small_pipe()
    stream, noise = pipe.stream(CIRCLE, seed=4), counter_noise(4)
    take(stream, blocks)
    stream.switch(SQUARE, cut=True)
    alone = pipe.stream(SQUARE, noise=lambda block, step, shape: noise(block + blocks, step, shape))
    assert_same_bits(take(stream, 7), take(alone, 7))
    assert stream.block == blocks + 7
    assert stream.frames == 12 * (blocks + 7) - 6  # each shot's first block has nine frames


def test_a_cut_before_the_first_block_is_a_switch():
    pipe = small_pipe()
    stream = pipe.stream(CIRCLE)
    stream.switch(SQUARE, cut=True)
    assert_same_bits(take(stream, 2), take(pipe.stream(SQUARE), 2))
    assert stream.frames == 21


@pytest.mark.parametrize("blocks", [2, 3, 6])
def test_a_saved_stream_keeps_its_shots_and_what_is_still_to_come(tmp_path, blocks):
    pipe = small_pipe()
    plan = [TimedPrompt(33 / 16, SQUARE, cut=True), TimedPrompt(5, CROSS)]
    stream = pipe.stream(CIRCLE, seed=9, schedule=plan)
    take(stream, blocks)
    stream.save(tmp_path / "s.safetensors")
    resumed, twin = pipe.resume(tmp_path / "s.safetensors"), stream.fork()
    assert resumed.frames == stream.frames
    assert_same_bits(take(resumed, 7), rest := take(stream, 7))
    assert_same_bits(take(twin, 7), rest)
    assert resumed.prompts == twin.prompts == stream.prompts
    assert resumed.frames == twin.frames == stream.frames == 12 * (blocks + 7) - 6


def test_blocks_that_wait_for_the_decoder_are_decoded_by_their_own_shot():
    pipe = small_pipe()
    late, prompt = pipe.stream(CIRCLE), pipe.stream(CIRCLE)
    expected, latents = take(prompt, 2), [late.next_latents(), late.next_latents()]
    for stream in (late, prompt):
        stream.switch(SQUARE, cut=True)
    latents.append(late.next_latents())
    assert_same_bits([late.decode(x) for x in latents], expected + take(prompt, 1))


def test_generate_follows_a_prompt_file_and_resumes_in_the_middle_of_it(echo, folder):
    (folder / "p.txt").write_text(f"{CIRCLE}\n[1s] {SQUARE}\n[2s] | {CROSS}\n")
    words = ["--prompt-file", "p.txt", "-o"]
    assert echo(*words, "a.mp4", "--frames", 60, "--raw-hashes", "a.txt")[0] == 0
    assert echo(*words, "b.mp4", "--frames", 20, "--raw-hashes", "b.txt", "--save", "b.safetensors")[0] == 0
    assert echo("--resume", "b.safetensors", "--frames", 60, "--raw-hashes", "b.txt")[0] == 0
    assert (folder / "a.txt").read_text() == (folder / "b.txt").read_text()


def test_a_resumed_stream_can_be_given_another_schedule(echo, folder):
    (folder / "p.txt").write_text(f"{SQUARE}\n[2s] {CROSS}\n")
    assert echo(CIRCLE, "--frames", 9, "--no-video", "--save", "a.safetensors")[0] == 0
    resume = ["--resume", "a.safetensors", "--prompt-file", "p.txt", "--frames", 60, "--no-video"]
    assert echo(*resume, "--save", "b.safetensors")[0] == 0
    changes = small_pipe().resume(folder / "b.safetensors").prompts
    assert [(p.prompt, p.block) for p in changes] == [(CIRCLE, 0), (SQUARE, 1), (CROSS, 3)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([CIRCLE, "--prompt-file", "p.txt"], "give a prompt or --prompt-file, not both"),
        (["--prompt-file", "none.txt"], "No such file"),
        (["--prompt-file", "p.txt"], "p.txt, line 2: 'x' has no time"),
    ],
)
def test_a_bad_prompt_file_is_refused_before_anything_is_made(echo, folder, words, message):
    (folder / "p.txt").write_text(f"{CIRCLE}\nx\n")
    code, _, err = echo(*words, "--frames", 9, "-o", "out.mp4")
    assert (code, message in err) == (2, True), err
    assert not (folder / "out.mp4").exists()


def test_a_scheduled_prompt_that_cant_be_encoded_yet_is_still_to_come(tmp_path, monkeypatch):
    pipe, plan = small_pipe(), [TimedPrompt(1, SQUARE, cut=True)]
    expected = take(pipe.stream(CIRCLE, schedule=plan), 4)
    stream = pipe.stream(CIRCLE, schedule=plan)
    made = take(stream, 2)
    with monkeypatch.context() as patch:
        patch.setattr(stream.shots.script, "_encode", refuse)
        with pytest.raises(OSError, match="the encoder is gone"):
            next(stream)
    stream.save(tmp_path / "s.safetensors")
    assert_same_bits(made + take(stream, 2), expected)
    assert_same_bits(made + take(pipe.resume(tmp_path / "s.safetensors"), 2), expected)


def refuse(prompt):
    raise OSError("the encoder is gone")


def test_a_cut_that_was_asked_for_cuts_though_a_scheduled_prompt_takes_its_place():
    stream = small_pipe().stream(CIRCLE, schedule=[TimedPrompt(1, CROSS)])
    take(stream, 2)
    stream.switch(SQUARE, cut=True)
    take(stream, 1)
    assert [(p.prompt, p.block, p.cut) for p in stream.prompts][1:] == [(CROSS, 2, True)]


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 4, 5])
def test_the_same_schedule_given_again_changes_nothing(tmp_path, blocks):
    pipe, plan = small_pipe(), (TimedPrompt(0, CIRCLE), TimedPrompt(1, SQUARE, cut=True), TimedPrompt(2, CROSS))
    stream, again = (pipe.stream(CIRCLE, schedule=plan[1:]) for _ in range(2))
    expected = take(stream, 7)
    take(again, blocks)
    again.reschedule(plan)
    assert_same_bits(take(again, 7 - blocks), expected[blocks:])
    assert again.prompts == stream.prompts


def test_another_schedule_replaces_what_waits_and_what_was_to_come():
    stream = small_pipe().stream(CIRCLE, schedule=[TimedPrompt(3, CROSS)])
    take(stream, 2)
    stream.switch(SQUARE, cut=True)
    stream.reschedule([TimedPrompt(0, CIRCLE), TimedPrompt(2, SQUARE)])
    take(stream, 4)
    assert [(p.prompt, p.block, p.cut) for p in stream.prompts] == [(CIRCLE, 0, False), (SQUARE, 3, False)]


def test_a_prompt_beside_resume_replaces_one_that_waits(echo, folder, small_folder):
    stream = EchoPipeline.from_pretrained(small_folder).stream(CIRCLE)
    take(stream, 2)
    stream.switch(SQUARE)
    stream.save("s.safetensors")
    assert echo(CIRCLE, "--resume", "s.safetensors", "--frames", 9, "--no-video", "--save", "t.safetensors")[0] == 0
    assert {change["prompt"] for change in read_state("t.safetensors").meta["prompts"]} == {CIRCLE}


def test_generate_given_its_prompt_file_again_still_cuts(echo, folder):
    (folder / "p.txt").write_text(f"{CIRCLE}\n[1s] | {SQUARE}\n")
    words = ["--prompt-file", "p.txt", "--no-video"]
    assert echo(*words, "--frames", 60, "--raw-hashes", "a.txt")[0] == 0
    assert echo(*words, "--frames", 20, "--raw-hashes", "b.txt", "--save", "b.safetensors")[0] == 0
    assert echo(*words, "--resume", "b.safetensors", "--frames", 60, "--raw-hashes", "b.txt")[0] == 0
    assert (folder / "a.txt").read_text() == (folder / "b.txt").read_text()


def test_a_mark_at_the_beginning_of_the_file_is_no_word(tmp_path):
    (tmp_path / "a").write_text(CIRCLE, encoding="utf-8-sig")
    assert read_schedule(tmp_path / "a") == (TimedPrompt(0, CIRCLE),)
