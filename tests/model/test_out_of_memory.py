"""Running out of memory: the block is undone, the stream is saved and goes on with the same bits."""

import itertools

import pytest
import torch
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.stream import Stream
from numerics import assert_same_bits
from running import frames_of, hashes_of
from small import CIRCLE, SQUARE, save_small, small_pipe


class Full:
    """Stands in for the model and runs out of memory in one call, after its K/V are written in some layers."""

    def __init__(self, model, call, layer):
        self._model, self.left, self._layer = model, call, layer

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, x, conditioning, text, cache, call, memory=None, *, output=True):
        self.left -= 1
        if self.left == 0:
            block = self._model.layers()[self._layer]
            handle = block.register_forward_pre_hook(raise_out_of_memory)
            try:
                return self._model(x, conditioning, text, cache, call, memory, output=output)
            finally:
                handle.remove()
        return self._model(x, conditioning, text, cache, call, memory, output=output)


def raise_out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


@pytest.mark.parametrize("blocks", [0, 1, 4, 5, 9])
@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("write_every", [1, 2])
def test_a_block_that_ran_out_of_memory_is_tried_again_with_the_same_bits(blocks, call, write_every):
    pipe = small_pipe(write_every=write_every)
    expected = list(itertools.islice(pipe.stream(CIRCLE, output_type="latents"), blocks + 4))[blocks:]
    stream = pipe.stream(CIRCLE, output_type="latents")
    list(itertools.islice(stream, blocks))
    generator = stream._sampler.generator
    model = generator.model
    try:
        generator.model = Full(model, call, layer=1)
        with pytest.raises(torch.OutOfMemoryError):
            next(stream)
    finally:
        generator.model = model
    assert stream.block == blocks
    assert_same_bits(list(itertools.islice(stream, 4)), expected)


@pytest.mark.parametrize("blocks", [2, 4, 7])
@pytest.mark.parametrize("options", [{}, {"global_sink": False}, {"memory_recache": True}])
def test_a_switch_that_ran_out_of_memory_is_tried_again_with_the_same_bits(blocks, options):
    pipe, streams = small_pipe(), []
    for fails in (False, True):
        stream = pipe.stream(CIRCLE, output_type="latents")
        list(itertools.islice(stream, blocks))
        stream.switch(SQUARE, **options)
        if fails:
            generator = stream._sampler.generator
            model = generator.model
            try:
                generator.model = Full(model, 1, layer=1)
                with pytest.raises(torch.OutOfMemoryError):
                    next(stream)
            finally:
                generator.model = model
            assert [p.prompt for p in stream.prompts] == [CIRCLE]
        streams.append(list(itertools.islice(stream, 3)))
    assert_same_bits(streams[1], streams[0])


def test_a_block_that_could_not_be_decoded_is_saved_and_comes_first(tmp_path, monkeypatch):
    pipe = small_pipe()
    expected = list(itertools.islice(pipe.stream(CIRCLE), 6))
    stream = pipe.stream(CIRCLE)
    first = list(itertools.islice(stream, 3))
    with monkeypatch.context() as patch:
        patch.setattr(pipe.codec, "decode", raise_out_of_memory)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                next(stream)
            assert (stream.block, len(stream.waiting)) == (4, 1)
        stream.save(tmp_path / "s.safetensors")
    resumed = pipe.resume(tmp_path / "s.safetensors")
    assert_same_bits(first + list(itertools.islice(stream, 3)), expected)
    assert_same_bits(first + list(itertools.islice(resumed, 3)), expected)


def fails_at(plain, *calls):
    """``plain``, out of memory in these calls."""
    count = itertools.count()

    def sometimes(*args):
        if next(count) in calls:
            raise_out_of_memory()
        return plain(*args)

    return sometimes


@pytest.mark.parametrize("fails", [[6], [7], [8], [6, 7], [7, 8], range(6, 12)])
def test_a_batch_whose_rows_could_not_be_decoded_loses_no_block(tmp_path, monkeypatch, fails):
    pipe, prompts = small_pipe(), [CIRCLE, SQUARE, CIRCLE]
    expected = list(itertools.islice(pipe.batch(prompts, [1, 2, 3]), 5))
    batch = pipe.batch(prompts, [1, 2, 3])
    monkeypatch.setattr(pipe.codec, "decode", fails_at(pipe.codec.decode, *fails))
    made = list(itertools.islice(batch, 2))
    for _ in fails:
        with pytest.raises(torch.OutOfMemoryError):
            next(batch)
        assert batch.streams[0].block == 3
    assert_same_bits(made + list(itertools.islice(batch, 3)), expected)


def test_a_block_that_could_not_be_decoded_after_a_cut_begins_its_shot_when_resumed(tmp_path, monkeypatch):
    pipe, path = small_pipe(), tmp_path / "s.safetensors"
    streams = [pipe.stream(CIRCLE) for _ in range(2)]
    for stream in streams:
        list(itertools.islice(stream, 6))
        stream.switch(SQUARE, cut=True)
    with monkeypatch.context() as patch:
        patch.setattr(pipe.codec, "decode", raise_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            next(streams[0])
        streams[0].next_latents()
    streams[0].save(path)
    expected = list(itertools.islice(streams[1], 3))
    assert len(expected[0]) == 9
    assert_same_bits(list(itertools.islice(pipe.resume(path), 3)), expected)
    assert_same_bits(list(itertools.islice(streams[0].fork(), 3)), expected)


@pytest.mark.parametrize("fails", [[6], [7], [6, 7, 8, 9], [7, 8, 9, 10]])
def test_the_command_saves_a_batch_whose_rows_could_not_be_decoded(echo, folder, monkeypatch, fails):
    words = [CIRCLE, "--seed", "1,2", "--frames", 69]
    assert echo(*words, "--no-video", "--raw-hashes", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "decode", fails_at(Stream.decode, *fails))
        code, _, err = echo(*words, "-o", "out.mp4", "--raw-hashes", "halves")
    assert code == 1
    assert "ask for fewer streams at once" in err
    states = sorted(folder.glob("*.state.safetensors"))
    assert len(states) == 2
    resume = [word for state in states for word in ("--resume", state)]
    assert echo(*resume, "--raw-hashes", "halves")[0] == 0
    names = [path.name for path in folder.glob("whole*")]
    assert len(names) == 2
    for name in names:
        assert hashes_of(folder / name.replace("whole", "halves")) == hashes_of(folder / name)


@pytest.mark.parametrize(("place", "times"), [("generating", 1), ("decoding", 1), ("decoding", 2), ("decoding", 99)])
def test_the_command_saves_the_stream_and_says_what_to_lower(echo, folder, monkeypatch, place, times):
    plain = Stream.next_latents if place == "generating" else Stream.decode
    assert echo(CIRCLE, "--frames", 69, "--no-video", "--raw-hashes", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stream, plain.__name__, fails_at(plain, *range(3, 3 + times)))
        code, _, err = echo(CIRCLE, "--frames", 69, "-o", "out.mp4", "--raw-hashes", "halves")
    assert code == 1
    assert "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.\n" in err
    assert "--text-device cpu, --decoder-dtype bfloat16, --kv fp8 or --weights fp8" in err
    assert "the stream is saved; go on with:" in err
    with monkeypatch.context() as patch:  # out of memory again, before anything new is generated
        patch.setattr(Stream, "decode", raise_out_of_memory)
        patch.setattr(Stream, "next_latents", raise_out_of_memory)
        assert echo("--resume", "out.state.safetensors", "--raw-hashes", "halves")[0] == 1
    assert echo("--resume", "out.state.safetensors", "--raw-hashes", "halves")[0] == 0
    assert hashes_of(folder / "halves") == hashes_of(folder / "whole")
    assert frames_of(folder / "out.mp4") == list(range(69))


@pytest.mark.parametrize("place", ["from_pretrained", "stream"])
def test_a_model_that_does_not_fit_is_one_line_that_says_what_to_lower(echo, folder, monkeypatch, place):
    monkeypatch.setattr(EchoPipeline, place, raise_out_of_memory)
    code, _, err = echo(CIRCLE, "--seconds", 1, "-o", "out.mp4")
    assert code == 2
    assert "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.; to take less, add --text-device cpu" in err
    assert "echo-infinity plan" in err
    assert not (folder / "out.mp4").exists()


@pytest.mark.parametrize("lower", [{"kv": "fp8"}, {"weights": "fp8"}])
def test_a_stream_goes_on_with_less(tmp_path, lower):
    model = save_small(tmp_path / "model")
    stream = EchoPipeline.from_pretrained(model).stream(CIRCLE)
    list(itertools.islice(stream, 6))
    stream.save(tmp_path / "s.safetensors")
    pipe = EchoPipeline.from_pretrained(model, **lower)
    with pytest.warns(UserWarning, match="dtype was float32, is float32, fp8"):
        resumed = pipe.resume(tmp_path / "s.safetensors")
    assert (resumed.block, next(resumed).shape) == (6, (12, 32, 32, 3))


@pytest.mark.parametrize("blocks", [0, 4, 9])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_block_that_was_interrupted_is_made_again_with_the_same_bits(monkeypatch, blocks, call):
    pipe = small_pipe()
    expected = list(itertools.islice(pipe.stream(CIRCLE, output_type="latents"), blocks + 4))[blocks:]
    stream = pipe.stream(CIRCLE, output_type="latents")
    list(itertools.islice(stream, blocks))
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "raise_out_of_memory", interrupt)
        patch.setattr(stream._sampler.generator, "model", Full(pipe.model, call, layer=1))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert_same_bits(list(itertools.islice(stream, 4)), expected)


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("count", [1, 2])
def test_a_cut_that_ran_out_of_memory_is_tried_again_with_the_same_bits(tmp_path, monkeypatch, count):
    pipe = small_pipe()

    def streams():
        """Streams before a cut, and what makes their next blocks."""
        batch = pipe.batch([CIRCLE] * count, range(count)) if count > 1 else None
        found = [pipe.stream(CIRCLE)] if batch is None else batch.streams
        more = (lambda: [next(found[0])]) if batch is None else (lambda: next(batch))
        for _ in range(6):
            more()
        for stream in found:
            stream.switch(SQUARE, cut=True)
        return found, more

    (_, plain), (cut, again) = streams(), streams()
    expected = [plain() for _ in range(6)]
    generator = cut[0]._sampler.generator
    with monkeypatch.context() as patch:
        patch.setattr(generator, "recall", raise_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            again()
        paths = [tmp_path / f"{i}" for i in range(count)]
        for stream, path in zip(cut, paths, strict=True):
            assert (stream.frames, len(stream.prompts)) == (69, 1)
            stream.save(path)
    assert_same_bits([again() for _ in range(6)], expected)
    resumed = pipe.resume_batch(paths) if count > 1 else ([frames] for frames in pipe.resume(paths[0]))
    assert_same_bits(list(itertools.islice(resumed, 6)), expected)


def test_a_stream_is_saved_where_there_is_no_room_to_look_for_nan(tmp_path, monkeypatch):
    stream = small_pipe().stream(CIRCLE)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "isfinite", fails_at(torch.isfinite, 0))
        stream.save(tmp_path / "s.safetensors")
    assert_same_bits(next(small_pipe().resume(tmp_path / "s.safetensors")), next(stream))
