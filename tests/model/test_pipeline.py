"""Streams: sizes, switches, forks, many at once, and what happens when a block goes wrong."""

import itertools

import pytest
import torch
from echo_infinity.finite import NonFiniteError
from echo_infinity.noise import counter_noise
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.stream import AutosaveWarning
from echo_infinity.weights import load_checkpoint
from elsewhere import stream_elsewhere
from numerics import assert_same_bits
from small import CIRCLE, SQUARE, save_small, small_pipe


def take(stream, blocks):
    return list(itertools.islice(stream, blocks))


def test_first_block_is_nine_frames_and_every_later_one_twelve():
    stream = small_pipe().stream(CIRCLE)
    assert [tuple(x.shape) for x in take(stream, 3)] == [(9, 32, 32, 3), (12, 32, 32, 3), (12, 32, 32, 3)]
    assert (stream.block, stream.frames) == (3, 33)
    assert stream.seconds == pytest.approx(33 / 16)


def test_frames_are_uint8_that_the_caller_may_draw_on():
    frames = next(small_pipe().stream(CIRCLE))
    assert frames.dtype == torch.uint8
    assert frames.is_contiguous()
    frames[:, 0] = 255
    assert not frames.is_inference()


def test_latents_are_those_the_pixels_are_decoded_from():
    pipe = small_pipe()
    latents = take(pipe.stream(CIRCLE, output_type="latents"), 3)
    assert [tuple(x.shape) for x in latents] == [(3, 4, 4, 4)] * 3
    stream = pipe.stream(CIRCLE)
    pixels = [stream.decode(stream.next_latents()) for _ in range(3)]
    assert_same_bits(pixels, take(pipe.stream(CIRCLE), 3))
    decoder = pipe.stream(CIRCLE)
    assert_same_bits([decoder.decode(x) for x in latents], pixels)


@pytest.mark.parametrize(("seconds", "frames"), [(0.0625, 1), (0.5, 8), (1.0, 16), (2.03, 32)])
def test_generate_gives_the_exact_length(seconds, frames):
    video = small_pipe().generate(CIRCLE, seconds=seconds)
    assert video.shape == (frames, 32, 32, 3)
    assert_same_bits(video, torch.cat(take(small_pipe().stream(CIRCLE), 3))[:frames])


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 2), (5, 2), (6, 3), (9, 3), (10, 4)])
def test_generated_latents_cover_the_length(frames, latents):
    assert len(small_pipe().generate(CIRCLE, frames=frames, output_type="latents")) == latents


def test_the_seed_decides_the_noise_and_the_callers_noise_replaces_it():
    pipe = small_pipe()
    one = torch.cat(take(pipe.stream(CIRCLE, seed=1, output_type="latents"), 2))
    two = torch.cat(take(pipe.stream(CIRCLE, seed=2, output_type="latents"), 2))
    own = torch.cat(take(pipe.stream(CIRCLE, noise=counter_noise(2), output_type="latents"), 2))
    assert not torch.equal(one, two)
    assert_same_bits(own, two)


def test_interleaved_streams_equal_separate_ones():
    pipe = small_pipe()
    settings = [(CIRCLE, 1, "on"), (SQUARE, 2, "on"), (CIRCLE, 1, "off"), (SQUARE, 3, "frozen")]
    separate = [take(pipe.stream(p, seed=s, memory=m), 6) for p, s, m in settings]
    streams = [pipe.stream(p, seed=s, memory=m) for p, s, m in settings]
    together = [list(x) for x in zip(*([next(s) for s in streams] for _ in range(6)), strict=True)]
    assert_same_bits(together, separate)


def test_memory_ablations_agree_until_the_first_eviction_and_differ_after_it():
    pipe = small_pipe()
    on, off, frozen = (
        take(pipe.stream(CIRCLE, memory=m, output_type="latents"), 7) for m in ("on", "off", "frozen")
    )  # frames 3 to 5 leave the window at block 4, and its second call is the first to read memory
    assert_same_bits(on[:4], off[:4])
    assert_same_bits(on[:4], frozen[:4])
    for a, b in itertools.combinations((on, off, frozen), 2):
        assert not torch.equal(a[4], b[4])


def test_absolute_ids_are_a_configuration_of_their_own(tmp_path):
    folder = save_small(tmp_path / "model")
    relative, absolute = (EchoPipeline.from_pretrained(folder, relative_ids=ids) for ids in (None, False))
    one, two = (take(pipe.stream(CIRCLE, output_type="latents"), 6) for pipe in (relative, absolute))
    assert_same_bits(one[:4], two[:4])
    assert not torch.equal(one[5], two[5])


def test_a_switch_takes_effect_at_the_next_boundary_only():
    pipe = small_pipe()
    plain, switched = pipe.stream(CIRCLE, seed=3), pipe.stream(CIRCLE, seed=3)
    assert_same_bits(take(switched, 2), take(plain, 2))
    switched.switch(SQUARE)
    assert switched.prompt == CIRCLE
    assert not torch.equal(next(switched), next(plain))
    assert [(p.prompt, p.block) for p in switched.prompts] == [(CIRCLE, 0), (SQUARE, 2)]


def test_the_last_switch_before_a_boundary_wins_and_a_bad_one_changes_nothing():
    pipe = small_pipe()
    once, twice = pipe.stream(CIRCLE), pipe.stream(CIRCLE)
    take(once, 1), take(twice, 1)
    once.switch(SQUARE)
    twice.switch("a green cross drifts over a dark field")
    twice.switch(SQUARE)
    with pytest.raises(ValueError, match="the prompt is empty"):
        twice.switch("  ")
    assert_same_bits(next(twice), next(once))


@pytest.mark.parametrize("options", [{"global_sink": False}, {"memory_recache": True}])
def test_switch_options_reach_the_sampler(options):
    pipe = small_pipe()
    streams = [pipe.stream(CIRCLE), pipe.stream(CIRCLE)]
    for stream, given in zip(streams, ({}, options), strict=True):
        take(stream, 6)
        stream.switch(SQUARE, **given)
    assert not torch.equal(*(torch.cat(take(stream, 2)) for stream in streams))


@pytest.mark.parametrize("blocks", [0, 1, 6])
def test_a_fork_goes_on_with_the_same_bits_and_on_its_own(blocks):
    stream = small_pipe().stream(CIRCLE, seed=5)
    take(stream, blocks)
    twin = stream.fork()
    expected = take(stream, 4)
    other = twin.fork()
    other.switch(SQUARE)
    take(other, 4)
    assert_same_bits(take(twin, 4), expected)


def test_a_fork_takes_a_waiting_switch_along():
    stream = small_pipe().stream(CIRCLE)
    take(stream, 2)
    stream.switch(SQUARE)
    twin = stream.fork()
    assert_same_bits(next(twin), next(stream))
    assert twin.prompts == stream.prompts


def test_the_callback_sees_every_block_and_may_close_the_stream():
    seen = []

    def callback(stream, block, frames):
        seen.append((block, len(frames)))
        if block == 2:
            stream.close()

    stream = small_pipe().stream(CIRCLE, callback=callback)
    assert [len(x) for x in stream] == [9, 12, 12]
    assert seen == [(0, 9), (1, 12), (2, 12)]


def test_a_closed_stream_ends_and_refuses_the_rest(tmp_path):
    with small_pipe().stream(CIRCLE) as stream:
        next(stream)
    assert stream.closed
    assert list(stream) == []
    for use in (stream.fork, stream.next_latents, lambda: stream.switch(SQUARE), lambda: stream.save(tmp_path / "s")):
        with pytest.raises(ValueError, match="the stream is closed"):
            use()


def broken_noise(block, step, shape):
    x = counter_noise(0)(block, step, shape)
    return x * float("nan") if block == 3 else x


def test_nan_stops_the_stream_for_good_and_leaves_the_last_good_state(tmp_path):
    state = tmp_path / "stream.safetensors"
    stream = small_pipe().stream(CIRCLE, noise=broken_noise, autosave=state, autosave_every=0)
    assert len(take(stream, 3)) == 3
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="block 3"):
            next(stream)
    good = state.read_bytes()
    with pytest.raises(NonFiniteError):
        stream.save(state)
    assert state.read_bytes() == good
    resumed = small_pipe().resume(state, noise=counter_noise(0))
    assert resumed.block == 3
    assert_same_bits(take(resumed, 2), take(small_pipe().stream(CIRCLE), 5)[3:])


def test_nan_that_hides_in_the_cache_is_never_saved(tmp_path):
    state = tmp_path / "stream.safetensors"
    stream = small_pipe().stream(CIRCLE)
    next(stream)
    stream.save(state)
    good = state.read_bytes()
    stream._sampler.cache.v[1][0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"cache\.v\.1"):
        stream.save(state)
    assert state.read_bytes() == good


def test_nan_from_the_decoder_stops_the_stream():
    stream = small_pipe().stream(CIRCLE)
    next(stream)
    stream.shots.decoder.state = {"decoder": torch.full_like(stream.shots.decoder.state["decoder"], float("nan"))}
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="decoder"):
            next(stream)


def test_autosave_keeps_time_and_survives_a_full_disk(tmp_path, monkeypatch):
    state, clock = tmp_path / "stream.safetensors", [0.0]
    monkeypatch.setattr("echo_infinity.stream.time.monotonic", lambda: clock[0])
    stream = small_pipe().stream(CIRCLE, autosave=state, autosave_every=10)
    take(stream, 2)
    assert not state.exists()
    clock[0] = 11.0
    next(stream)
    assert small_pipe().resume(state).block == 2
    clock[0] = 22.0
    monkeypatch.setattr("echo_infinity.state.save_file", _full_disk)
    with pytest.warns(AutosaveWarning, match="No space left"):
        next(stream)
    next(stream)
    assert small_pipe().resume(state).block == 2


def _full_disk(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "red " * 13}, "13 words, this model reads at most 12"),
        ({"prompt": "zebra"}, "no word of the prompt 'zebra' is known"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**63}, "seed must be a whole number"),
        ({"memory": "half"}, "memory must be one of on, off, frozen, got 'half'"),
        ({"output_type": "pil"}, "output_type must be one of pixels, latents, got 'pil'"),
        ({"autosave_every": -1}, "autosave_every is seconds >= 0, got -1"),
    ],
)
def test_bad_requests_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        small_pipe().stream(**{"prompt": CIRCLE, **options})


@pytest.mark.parametrize("length", [{}, {"seconds": 1, "frames": 16}, {"seconds": 0}, {"seconds": -1}, {"frames": 0}])
def test_a_length_must_be_one_positive_number(length):
    with pytest.raises(ValueError, match=r"seconds|frames"):
        small_pipe().generate(CIRCLE, **length)


def test_a_model_without_memory_streams_without_and_refuses_to_pretend():
    pipe = small_pipe(memory=False)
    assert len(next(pipe.stream(CIRCLE))) == 9
    with pytest.raises(ValueError, match="memory is 'on' but the model small has none"):
        pipe.stream(CIRCLE, memory="on")


@pytest.mark.parametrize("options", [{}, {"kv": "fp8"}, {"weights": "fp8"}])
def test_the_model_may_be_on_another_device_than_its_text_encoder(tmp_path, options):
    checkpoint = load_checkpoint(save_small(tmp_path / "model"))
    assert stream_elsewhere(checkpoint, [CIRCLE, SQUARE], **options) == {"meta"}
