"""The codec: streaming equals the whole clip, files are checked, the shipped weights keep colours."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from echo_infinity.codec import Codec, CodecConfig, latent_count, to_uint8, to_unit
from echo_infinity.training.codec import judge
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.numerics import assert_same_bits, assert_stream_equal

SMALL = CodecConfig(4, 8, 12, 12, 8, 4)
SHIPPED = Path(str(files("echo_infinity"))) / "weights" / "tiny" / "codec.safetensors"


def small_codec(seed: int = 0) -> Codec:
    torch.manual_seed(seed)
    codec = Codec(SMALL)
    for parameter in codec.parameters():  # residual branches start at zero: give them something to say
        torch.nn.init.normal_(parameter, std=0.1)
    codec.latent_mean.normal_()
    codec.latent_std.uniform_(0.5, 2.0)
    return codec.eval()


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4), rows=st.sampled_from([8, 16]))
@torch.no_grad()
def test_any_chunking_equals_the_whole_clip(cuts: list[int], rows: int) -> None:
    codec = small_codec()
    frames = torch.rand(2, 4 * sum(cuts) - 3, 3, rows, 24) * 2 - 1
    latents, end = codec.encode(frames)
    decoded, decoded_end = codec.decode(latents)
    assert latents.shape == (2, sum(cuts), 4, rows // 8, 3)
    assert decoded.shape == frames.shape
    encoder_state = decoder_state = None
    parts, pictures, at, at_latent = [], [], 0, 0
    for latent_frames in cuts:
        count = 4 * latent_frames - (0 if at else 3)
        part, encoder_state = codec.encode(frames[:, at : at + count], encoder_state)
        picture, decoder_state = codec.decode(latents[:, at_latent : at_latent + latent_frames], decoder_state)
        parts, pictures, at, at_latent = [*parts, part], [*pictures, picture], at + count, at_latent + latent_frames
    assert_stream_equal(torch.cat(parts, 1), latents)
    assert_stream_equal(torch.cat(pictures, 1), decoded)
    assert_stream_equal(encoder_state["encoder"], end["encoder"])
    assert_stream_equal(decoder_state["decoder"], decoded_end["decoder"])


@torch.no_grad()
def test_later_frames_do_not_change_earlier_latents() -> None:
    codec = small_codec()
    frames = torch.rand(1, 13, 3, 16, 16)
    changed = frames.clone()
    changed[:, 9:] = 0
    a, b = codec.encode(frames)[0], codec.encode(changed)[0]
    assert_stream_equal(a[:, :3], b[:, :3])
    assert (a[:, 3] - b[:, 3]).abs().max() > 0.01
    assert_stream_equal(codec.decode(a)[0][:, :9], codec.decode(b)[0][:, :9])


@torch.no_grad()
def test_a_saved_codec_computes_the_same_bits(tmp_path: Path) -> None:
    codec = small_codec()
    codec.save(tmp_path / "deep" / "codec.safetensors")
    loaded = Codec.load(tmp_path / "deep" / "codec.safetensors")
    assert loaded.config == SMALL
    assert not loaded.training
    assert_same_bits(dict(loaded.state_dict()), dict(codec.state_dict()))
    frames = torch.rand(1, 5, 3, 16, 16)
    assert_same_bits(loaded.encode(frames)[0], codec.encode(frames)[0])
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["codec.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "codec.safetensors"
    small_codec().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut short or corrupt"):
        Codec.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no usable codec_config"),
        ({"codec_config": "{"}, "no usable codec_config"),
        ({"codec_config": json.dumps({"latent_channels": -1})}, "latent_channels must be a positive int"),
        ({"codec_config": json.dumps({"depth": 3})}, "unexpected keyword"),
        ({"codec_config": json.dumps({"latent_channels": 4})}, "does not fit its config"),
    ],
)
def test_a_file_with_the_wrong_config_is_refused(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "codec.safetensors"
    save_file(dict(small_codec().state_dict()), path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        Codec.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Codec.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.encode(torch.zeros(1, 4, 3, 16, 16)), "4 F - 3 at the start of a stream, got 4"),
        (lambda c: c.encode(torch.zeros(1, 5, 3, 16, 12)), "multiples of 8"),
        (lambda c: c.encode(torch.zeros(1, 0, 3, 16, 16)), "got 0"),
        (lambda c: c.decode(torch.zeros(1, 2, 5, 2, 2)), r"latents must be \(B, F >= 1, 4, h, w\)"),
        (lambda c: c.decode(torch.zeros(1, 1, 4, 2, 2), {"decoder": torch.zeros(1, 12, 3, 2)}), "state 'decoder'"),
        (lambda c: c.decode(torch.zeros(1, 1, 4, 2, 2), {"encoder": torch.zeros(1)}), "state 'decoder'"),
        (lambda c: latent_count(8), "4 F - 3, got 8"),
    ],
)
def test_rejects(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(small_codec())


def test_uint8_frames_survive_the_unit_range() -> None:
    frames = torch.arange(256, dtype=torch.uint8)
    assert_same_bits(to_uint8(to_unit(frames)), frames)


@pytest.mark.parametrize(("noise", "least_psnr"), [(0.0, 30.0), (0.1, 28.0)])
def test_shipped_weights_reconstruct_held_out_worlds(noise: float, least_psnr: float) -> None:
    scores = judge(Codec.load(SHIPPED), worlds=9, latent_frames=9, noise=noise)
    assert scores["psnr"] > least_psnr
    assert scores["colour_accuracy"] >= 0.99


@torch.no_grad()
def test_shipped_latents_have_about_zero_mean_and_unit_variance() -> None:
    from echo_infinity.training.codec import CodecTraining, training_batch

    latents, _ = Codec.load(SHIPPED).encode(training_batch(CodecTraining(batch=24, seed=77), 0))
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.35
    assert latents.std((0, 1, 3, 4)).min() > 0.6
    assert latents.std((0, 1, 3, 4)).max() < 1.4


def test_shipped_weights_are_small() -> None:
    assert SHIPPED.stat().st_size <= 4_000_000
