"""Saved streams: they go on bit for bit, and files that can't are refused with the reason."""

import itertools
import json
import os
import shutil

import pytest
import torch
from echo_infinity import state as state_module
from echo_infinity.noise import counter_noise
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.state import FORMAT, ResumeWarning, SavedVideo, check_writable, read_state, write_state
from echo_infinity.video import VideoPosition
from numerics import assert_same_bits
from safetensors import safe_open
from safetensors.torch import save_file
from small import CIRCLE, SQUARE, save_small, small_pipe


def take(stream, blocks):
    return list(itertools.islice(stream, blocks))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stream.safetensors"


# 0: nothing yet; 1: the sink; 3: window not full; 4: the last block before the first write; 5, 8: memory written.
@pytest.mark.parametrize("blocks", [0, 1, 3, 4, 5, 8])
@pytest.mark.parametrize("memory", ["on", "off", "frozen"])
def test_a_resumed_stream_goes_on_bit_for_bit(path, blocks, memory):
    stream = small_pipe().stream(CIRCLE, seed=7, memory=memory)
    take(stream, blocks)
    stream.save(path)
    resumed = small_pipe().resume(path)
    assert (resumed.block, resumed.frames, resumed.prompts) == (stream.block, stream.frames, stream.prompts)
    assert resumed.settings.memory == memory
    assert_same_bits(take(resumed, 6), take(stream, 6))


@pytest.mark.parametrize("solver", ["renoise", "euler"])
@pytest.mark.parametrize("blocks", range(4, 9))
def test_evictions_that_wait_for_their_write_are_saved(path, blocks, solver):
    pipe = small_pipe(write_every=3, solver=solver)
    stream = pipe.stream(CIRCLE)
    take(stream, blocks)
    stream.save(path)
    pending = sum(name.startswith("sampler.memory.pending.") for name in read_state(path).tensors) // 2
    assert pending == (blocks - 4) % 3
    assert_same_bits(take(pipe.resume(path), 6), take(stream, 6))


@pytest.mark.parametrize("saved_at", [3, 5, 6, 8])
@pytest.mark.parametrize("options", [{}, {"global_sink": False}, {"memory_recache": True}])
def test_a_switch_before_or_after_the_save_makes_no_difference(path, saved_at, options):
    def run(stream, blocks):
        out = []
        for _ in range(blocks):
            if stream.block == 5:
                stream.switch(SQUARE, **options)
            out.append(next(stream))
        return out

    expected = run(small_pipe().stream(CIRCLE), 11)
    stream = small_pipe().stream(CIRCLE)
    first = run(stream, saved_at)
    stream.save(path)
    resumed = small_pipe().resume(path)
    assert_same_bits(first + run(resumed, 11 - saved_at), expected)
    assert [(p.prompt, p.block) for p in resumed.prompts] == [(CIRCLE, 0), (SQUARE, 5)]


def test_a_switch_that_waits_is_saved(path):
    stream = small_pipe().stream(CIRCLE)
    take(stream, 6)
    stream.switch(SQUARE, memory_recache=True)
    stream.save(path)
    resumed = small_pipe().resume(path)
    assert resumed.prompt == CIRCLE
    assert_same_bits(take(resumed, 2), take(stream, 2))
    assert resumed.prompts == stream.prompts


def test_saving_changes_nothing_and_resuming_twice_gives_the_same(path):
    plain, saved = small_pipe().stream(CIRCLE), small_pipe().stream(CIRCLE)
    for _ in range(7):
        saved.save(path)
        assert_same_bits(next(saved), next(plain))
    assert_same_bits(take(small_pipe().resume(path), 2), take(small_pipe().resume(path), 2))


def test_resumed_streams_share_nothing_with_the_file_or_each_other(path):
    stream = small_pipe().stream(CIRCLE)
    take(stream, 6)
    stream.save(path)
    saved = read_state(path)
    expected = take(stream, 3)
    for _ in range(2):
        assert_same_bits(take(small_pipe().resume(saved), 3), expected)


def test_latents_resume_and_pixels_may_go_on_as_latents(path):
    stream = small_pipe().stream(CIRCLE, output_type="latents")
    take(stream, 3)
    stream.save(path)
    assert_same_bits(take(small_pipe().resume(path), 3), take(stream, 3))
    with pytest.raises(ValueError, match="holds no decoder state"):
        small_pipe().resume(path, output_type="pixels")
    pixels = small_pipe().stream(CIRCLE)
    take(pixels, 3)
    pixels.save(path)
    again = small_pipe().resume(path, output_type="latents")
    assert_same_bits(take(again, 2), take(small_pipe().stream(CIRCLE, output_type="latents"), 5)[3:])


def test_the_callers_noise_is_asked_for_again(path):
    stream = small_pipe().stream(CIRCLE, noise=counter_noise(9))
    take(stream, 2)
    stream.save(path)
    with pytest.raises(ValueError, match="pass the same noise= to resume it"):
        small_pipe().resume(path)
    assert_same_bits(take(small_pipe().resume(path, noise=counter_noise(9)), 2), take(stream, 2))


def test_noise_is_refused_where_the_seed_decides(path):
    small_pipe().stream(CIRCLE, seed=4).save(path)
    with pytest.raises(ValueError, match="ran with the noise of seed 4"):
        small_pipe().resume(path, noise=counter_noise(4))


@pytest.mark.parametrize("waiting", [1, 2])
@pytest.mark.parametrize("decoded", [0, 5])
def test_blocks_that_wait_for_the_decoder_are_saved_and_come_first(path, decoded, waiting):
    expected = take(small_pipe().stream(CIRCLE), decoded + waiting + 2)[decoded:]
    stream = small_pipe().stream(CIRCLE)
    take(stream, decoded)
    latents = [stream.next_latents() for _ in range(waiting)]
    assert_same_bits(stream.waiting, latents)
    stream.save(path)
    blocks = []
    for other in (stream, stream.fork(), small_pipe().resume(path, callback=lambda s, i, x: blocks.append(i))):
        assert_same_bits(take(other, waiting + 2), expected)
        assert not other.waiting
    assert blocks == list(range(decoded, decoded + waiting + 2))
    again = small_pipe().resume(path, output_type="latents")
    assert_same_bits(take(again, waiting), latents)


def test_the_videos_position_and_its_unwritten_frames_come_back(path):
    stream = small_pipe().stream(CIRCLE)
    frames = next(stream)
    video = SavedVideo(VideoPosition(4, 1000, 700), "out.mp4", 160, frames[4:])
    stream.save(path, video=video)
    resumed = small_pipe().resume(path).video
    assert (resumed.position, resumed.path, resumed.target) == (video.position, video.path, video.target)
    assert_same_bits(resumed.rest, frames[4:])


def rewrite(path, **changes):
    """Write the state again with other settings."""
    saved = read_state(path)
    write_state(path, {**saved.meta, **changes}, saved.tensors)


def test_another_environment_is_named_in_a_warning(path):
    small_pipe().stream(CIRCLE).save(path)
    meta = read_state(path).meta["environment"]
    rewrite(path, environment={**meta, "torch": "1.0", "threads": 99})
    with pytest.warns(ResumeWarning, match=r"torch was 1\.0, is .*; threads was 99, is \d"):
        small_pipe().resume(path)


def test_other_cpu_kernels_are_named_in_a_warning(path, monkeypatch):
    small_pipe().stream(CIRCLE).save(path)
    monkeypatch.setattr("echo_infinity.state.build_info", lambda: {"cpu": {"bfloat16": "PyTorch: never built"}})
    with pytest.warns(ResumeWarning, match=r"device was cpu .*, is cpu .*, kernels PyTorch"):
        small_pipe().resume(path)


def test_another_dtype_is_named_in_a_warning(path, tmp_path):
    folder = save_small(tmp_path / "model")
    stream = EchoPipeline.from_pretrained(folder).stream(CIRCLE)
    take(stream, 6)
    stream.save(path)
    narrow = EchoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.warns(ResumeWarning, match="dtype was float32, is bfloat16"):
        resumed = narrow.resume(path)
    assert next(resumed).shape == (12, 32, 32, 3)


def test_bfloat16_streams_resume_bit_for_bit(path, tmp_path):
    pipe = EchoPipeline.from_pretrained(save_small(tmp_path / "model"), dtype=torch.bfloat16)
    stream = pipe.stream(CIRCLE, memory_dtype=torch.float32)
    take(stream, 6)
    stream.save(path)
    resumed = pipe.resume(path)
    assert read_state(path).tensors["sampler.memory.state"].dtype == torch.float32
    assert_same_bits(take(resumed, 3), take(stream, 3))


def test_other_weights_are_refused(path, tmp_path):
    small_pipe().stream(CIRCLE).save(path)
    other = EchoPipeline.from_pretrained(save_small(tmp_path / "model", seed=1))
    with pytest.raises(ValueError, match="saved with other weights"):
        other.resume(path)


def test_another_configuration_is_refused_with_the_settings_that_differ(path, tmp_path):
    folder = save_small(tmp_path / "model")
    EchoPipeline.from_pretrained(folder).stream(CIRCLE).save(path)
    with pytest.raises(ValueError, match=r"window\.relative \(saved True, model False\)"):
        EchoPipeline.from_pretrained(folder, relative_ids=False).resume(path)
    with pytest.raises(ValueError, match=r"sampler\.solver \(saved renoise, model euler\)"):
        small_pipe(solver="euler").resume(path)


def test_a_newer_format_is_refused(path):
    small_pipe().stream(CIRCLE).save(path)
    rewrite(path, format=FORMAT + 1)
    with pytest.raises(ValueError, match=rf"has format {FORMAT + 1}, this version reads up to {FORMAT}: upgrade"):
        small_pipe().resume(path)


def test_a_missing_file_is_said_to_be_missing(path):
    with pytest.raises(FileNotFoundError, match="no saved stream at"):
        small_pipe().resume(path)


def test_truncation_anywhere_is_noticed(path):
    stream = small_pipe().stream(CIRCLE)
    next(stream)
    stream.save(path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="corrupt or truncated"):
            small_pipe().resume(path)


def test_a_flipped_bit_anywhere_is_noticed(path):
    stream = small_pipe().stream(CIRCLE)
    next(stream)
    stream.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    text = whole.index(b"red circle")
    for at in (0, 9, text, header, (header + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"corrupt|no saved stream"):
            small_pipe().resume(path)


def test_other_safetensors_files_are_no_saved_streams(path):
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="a safetensors file but no saved stream: it holds weight"):
        small_pipe().resume(path)


def test_a_state_lacks_no_tensor_in_silence(path):
    stream = small_pipe().stream(CIRCLE)
    take(stream, 6)
    stream.save(path)
    saved = read_state(path)
    for name in saved.tensors:
        if name.startswith("sampler."):
            less = {n: x for n, x in saved.tensors.items() if n != name}
            write_state(path, saved.meta, less)
            with pytest.raises(ValueError, match=name.removeprefix("sampler.").removeprefix("memory.")):
                small_pipe().resume(path)


def test_the_file_is_safetensors_with_readable_settings(path):
    small_pipe().stream(CIRCLE, seed=11).save(path)
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["echo_stream"])
    assert (meta["seed"], meta["prompts"][0]["prompt"], meta["format"]) == (11, CIRCLE, FORMAT)


def test_a_failed_save_leaves_the_old_state_and_no_litter(path, monkeypatch):
    stream = small_pipe().stream(CIRCLE)
    stream.save(path)
    good = path.read_bytes()
    next(stream)

    def torn(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_module, "save_file", torn)
    with pytest.raises(OSError, match="No space left"):
        stream.save(path)
    assert path.read_bytes() == good
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_an_oserror_with_its_number(path, full_disk):
    stream = small_pipe().stream(CIRCLE)
    stream.save(path)
    good = path.read_bytes()
    with full_disk(len(good) // 2), pytest.raises(OSError, match="File too large"):
        stream.save(path)
    assert path.read_bytes() == good


@pytest.fixture
def full_disk():
    """A context in which no file may grow past some bytes."""
    import contextlib
    import resource

    @contextlib.contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def test_unwritable_places_are_noticed_beforehand(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        check_writable(tmp_path / "missing" / "s.safetensors")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "s.safetensors")
    check_writable(tmp_path / "s.safetensors")
    assert os.listdir(tmp_path) == ["file"]


def test_a_copied_file_resumes_the_same(path, tmp_path):
    stream = small_pipe().stream(CIRCLE)
    take(stream, 6)
    stream.save(path)
    copy = shutil.copy(path, tmp_path / "copy.safetensors")
    assert_same_bits(take(small_pipe().resume(copy), 2), take(stream, 2))
