"""Streams that start from an image: it is the first frame, the first block is made from it, and who can't says so."""

import dataclasses
import functools
import itertools
import tempfile

import numpy as np
import pytest
import torch
from echo_infinity import cli
from echo_infinity.image import load_image
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.weights import load_checkpoint
from numerics import assert_same_bits
from PIL import Image
from small import CIRCLE, save_small, small_pipe


def take(stream, blocks):
    return list(itertools.islice(stream, blocks))


@functools.cache
def pipe(solver="renoise"):
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_checkpoint(save_small(folder, solver=solver))
    return EchoPipeline(loaded._replace(config=dataclasses.replace(loaded.config, image_start=True)))


def picture(seed=0):
    return torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solver", ["renoise", "euler"])
def test_the_first_latent_frame_is_the_images_and_the_rest_is_made_from_it(solver):
    one, two = (pipe(solver).stream(CIRCLE, image=picture(i), output_type="latents") for i in (0, 1))
    plain = take(pipe(solver).stream(CIRCLE, output_type="latents"), 2)
    encoded, _ = pipe(solver).codec.encode((picture(0).float() / 127.5 - 1).permute(2, 0, 1)[None, None])
    first = next(one)
    assert_same_bits(first[:1], encoded[0])
    assert not torch.equal(first[1:], next(two)[1:])
    assert not torch.equal(first[1:], plain[0][1:])
    assert not torch.equal(next(one), plain[1])


def test_every_call_sees_the_image_at_the_level_of_clean_frames(monkeypatch):
    seen, model = [], pipe().model
    real = type(model).forward

    def watch(self, x, conditioning, *rest, **more):
        seen.append((x.clone(), conditioning.layers[0][0].clone()))
        return real(self, x, conditioning, *rest, **more)

    monkeypatch.setattr(type(model), "forward", watch)
    stream = pipe().stream(CIRCLE, image=picture(), output_type="latents")
    first = next(stream)
    clean = model.condition(torch.zeros(1, 1)).layers[0][0]
    for x, level in seen[:4]:
        assert_same_bits(x[0, :1], first[:1])
        assert level.shape[1] == 3
        torch.testing.assert_close(level[:, :1], clean, rtol=0, atol=1e-6)
        assert not torch.allclose(level[:, 1:2], clean)
    seen.clear()
    next(stream)
    assert seen[0][1].shape[1] == 1  # later blocks are like any


def test_a_stream_saved_before_its_first_block_keeps_the_image(tmp_path):
    stream = pipe().stream(CIRCLE, image=picture())
    stream.save(tmp_path / "s.safetensors")
    assert_same_bits(take(pipe().resume(tmp_path / "s.safetensors"), 3), take(stream, 3))


def test_a_batch_starts_from_an_image_each():
    p = pipe()
    batch = p.batch([CIRCLE] * 2, [1, 2], images=[picture(0), picture(1)], output_type="latents")
    together = [torch.cat(x) for x in zip(*take(batch, 3), strict=True)]
    for i, seed in enumerate((1, 2)):
        alone = take(p.stream(CIRCLE, seed=seed, image=picture(i), output_type="latents"), 3)
        torch.testing.assert_close(together[i], torch.cat(alone), rtol=0, atol=2e-5)


def test_a_model_that_was_not_trained_for_it_refuses():
    with pytest.raises(ValueError, match="was not trained to go on from an image"):
        small_pipe().stream(CIRCLE, image=picture())


def test_an_image_of_another_size_or_too_late_is_refused():
    with pytest.raises(ValueError, match=r"an image is \(32, 32, 3\) uint8 here, got \(8, 8, 3\)"):
        pipe().stream(CIRCLE, image=picture()[:8, :8])
    stream = pipe().stream(CIRCLE)
    next(stream)
    with pytest.raises(ValueError, match="the shot has begun"):
        stream.start_from(picture())


def test_a_picture_is_scaled_to_cover_the_frame_and_cut_at_the_middle(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (200, 100, 50)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = load_image(tmp_path / "wide.png", (40, 40))
    assert found.shape == (40, 40, 3)
    assert found[:, 4:36].float().sub(torch.tensor([200.0, 100.0, 50.0])).abs().max() <= 1


def test_generate_starts_from_a_picture_file(echo, folder):
    Image.fromarray(picture().numpy()).save(folder / "p.png")
    code, _, err = echo(CIRCLE, "--image", "p.png", "--frames", 9, "-o", "out.mp4")
    assert code == 2
    assert "was not trained to go on from an image" in err
    able = save_small(folder / "able")
    config = able / "config.json"
    config.write_text(config.read_text().replace("{", '{"image_start": true,', 1))
    words = ["generate", CIRCLE, "--image", "p.png", "--frames", "9", "-o", "out.mp4", "--model", str(able)]
    assert cli.main(words) == 0


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_a_file_that_is_no_picture_is_refused(echo, folder, content):
    (folder / "p.png").write_bytes(content)
    code, _, err = echo(CIRCLE, "--image", "p.png", "--frames", 9, "-o", "out.mp4")
    assert (code, "p.png" in err) == (2, True), err
    assert not (folder / "out.mp4").exists()


def test_a_stream_of_a_batch_refuses_an_image_at_once_and_goes_on():
    batch, untouched = (small_pipe().batch([CIRCLE] * 2, [1, 2], output_type="latents") for _ in range(2))
    with pytest.raises(ValueError, match="was not trained to go on from an image"):
        batch.streams[0].start_from(picture())
    assert_same_bits(take(batch, 1), take(untouched, 1))
    begun, plain = (pipe().batch([CIRCLE] * 2, [1, 2], output_type="latents") for _ in range(2))
    take(begun, 1), take(plain, 1)
    with pytest.raises(ValueError, match="the shot has begun"):
        begun.streams[0].start_from(picture())
    assert_same_bits(take(begun, 1), take(plain, 1))


def test_generate_leaves_no_video_where_a_batch_cant_start_from_its_image(echo, folder):
    Image.fromarray(picture().numpy()).save(folder / "p.png")
    code, _, err = echo(CIRCLE, "--seed", "1,2", "--image", "p.png", "--frames", 9, "-o", "out.mp4")
    assert (code, "was not trained to go on from an image" in err) == (2, True)
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize("at", [16, 33])
def test_a_picture_broken_in_the_middle_is_refused(tmp_path, at):
    Image.fromarray(picture().numpy()).save(tmp_path / "p.png")
    data = bytearray((tmp_path / "p.png").read_bytes())
    data[at : at + 8] = bytes(range(140, 148))  # of the header's sizes, or the next chunk's length and name
    (tmp_path / "p.png").write_bytes(data)
    with pytest.raises(OSError, match=r"p\.png can't be read as a picture"):
        load_image(tmp_path / "p.png", (32, 32))


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path):
    Image.fromarray(np.full((32, 32), 65535 // 2, np.uint16)).save(tmp_path / "p.png")
    assert load_image(tmp_path / "p.png", (32, 32)).unique().tolist() == [127]
