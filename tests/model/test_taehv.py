"""The tiny decoder: the TAEHV layout's own numbers, any chunking, and files that don't fit."""

import pytest
import torch
from echo_infinity.checkpoints.parts import write_tiny_decoder
from echo_infinity.taehv import TinyConfig, TinyDecoder
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_same_bits, assert_stream_equal
from safetensors.torch import load_file, save_file
from torch.nn import functional as nnf

SMALL = TinyConfig(latent_channels=4, widths=(12, 8, 6, 6))


def small(seed=0):
    torch.manual_seed(seed)
    return TinyDecoder(SMALL).eval().requires_grad_(False)


def whole_video(weights, latents):
    """The layout spelt out on all latents at once: stages of three memory blocks, a step up, growth in time, a conv.

    ``latents`` ``(F, C, h, w)``; the frame before the first is zeros; the first three of the frames are dropped.
    """

    def conv(x, name):
        bias = weights.get(f"decoder.{name}.bias")
        return nnf.conv2d(x, weights[f"decoder.{name}.weight"], bias, padding=1)

    x = conv(3 * torch.tanh(latents / 3), "1").relu()
    for stage, first in enumerate((3, 9, 15)):
        for i in range(first, first + 3):
            past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            y = conv(torch.cat([x, past], 1), f"{i}.conv.0").relu()
            x = (conv(conv(y, f"{i}.conv.2").relu(), f"{i}.conv.4") + x).relu()
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        grown = nnf.conv2d(x, weights[f"decoder.{first + 4}.conv.weight"])
        x = grown.view(len(x), (1, 2, 2)[stage], -1, *x.shape[2:]).flatten(0, 1)
        x = conv(x, str(first + 5))
    return conv(x.relu(), "22").clamp(0, 1)[3:] * 2 - 1


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4), batch=st.integers(1, 2))
@torch.no_grad()
def test_any_chunking_equals_the_layout_spelt_out(cuts, batch):
    decoder, latents = small(), torch.randn(batch, sum(cuts), 4, 3, 4)
    expected = torch.stack([whole_video(decoder.state_dict(), x) for x in latents])
    state, parts, at = None, [], 0
    for count in cuts:
        part, state = decoder.decode(latents[:, at : at + count], state)
        parts, at = [*parts, part], at + count
    assert expected.shape == (batch, 4 * sum(cuts) - 3, 3, 24, 32)
    assert_stream_equal(torch.cat(parts, 1), expected)
    assert_same_bits(torch.cat(parts, 1), decoder.decode(latents)[0])


def test_names_are_those_of_the_layout():
    full = {name: tuple(x.shape) for name, x in TinyDecoder(TinyConfig()).state_dict().items()}
    assert full["decoder.1.weight"] == (256, 16, 3, 3)
    assert full["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert full["decoder.7.conv.weight"] == (256, 256, 1, 1)
    assert full["decoder.8.weight"] == (128, 256, 3, 3)
    assert full["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert full["decoder.19.conv.weight"] == (128, 64, 1, 1)
    assert full["decoder.22.weight"] == (3, 64, 3, 3)
    assert "decoder.8.bias" not in full
    assert len(full) == 2 + 9 * 6 + 3 + 3 + 2


def file_of(path, change=lambda tensors: None):
    """A ``.pth`` of decoder and encoder, as published."""
    tensors = dict(small().state_dict()) | {"encoder.0.weight": torch.zeros(6, 3, 3, 3)}
    change(tensors)
    torch.save(tensors, path)
    return path


@torch.no_grad()
def test_a_published_file_converts_and_loads(tmp_path):
    write_tiny_decoder(file_of(tmp_path / "taew2_1.pth"), tmp_path / "tiny.safetensors")
    assert not any(name.startswith("encoder") for name in load_file(tmp_path / "tiny.safetensors"))
    loaded, latents = TinyDecoder.load(tmp_path / "tiny.safetensors"), torch.randn(1, 3, 4, 3, 4)
    assert loaded.config == SMALL
    assert_same_bits(loaded.decode(latents), small().decode(latents))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("decoder.4.conv.2.bias"), r"missing decoder\.4\.conv\.2\.bias"),
        (lambda x: x.update({"decoder.30.weight": torch.zeros(1)}), r"unexpected decoder\.30\.weight"),
        (lambda x: x.update({"decoder.8.bias": torch.zeros(8)}), r"unexpected decoder\.8\.bias"),
        (lambda x: x.pop("decoder.1.weight"), r"decoder\.1\.weight is missing, expected 4 dims"),
        (lambda x: x.update({"decoder.22.weight": torch.zeros(12, 6, 3, 3)}), "makes 4 frames and 16 x 16 pixels"),
        (lambda x: x.update({"decoder.7.conv.weight": torch.zeros(24, 12, 1, 1)}), "makes 8 frames and 8 x 8 pixels"),
    ],
)
def test_files_of_another_layout_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_tiny_decoder(file_of(tmp_path / "x.pth", change), tmp_path / "tiny.safetensors")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.decode(torch.zeros(1, 2, 5, 2, 2)), r"latents must be \(B, F >= 1, 4, h, w\)"),
        (lambda d: d.decode(torch.zeros(1, 1, 4, 2, 2), {"decoder.3": torch.zeros(1, 12, 3, 2)}), "start a new stream"),
        (lambda d: d.encode(torch.zeros(1, 1, 3, 16, 16)), "can't encode frames"),
        (lambda d: TinyDecoder.load("nowhere.safetensors"), "nowhere.safetensors is missing"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


def test_a_broken_file_is_refused(tmp_path):
    save_file(
        {name: x for name, x in small().state_dict().items() if "decoder.5" not in name}, tmp_path / "t.safetensors"
    )
    with pytest.raises(ValueError, match=r"missing, extra or misshapen: decoder\.5\.conv\.0\.bias"):
        TinyDecoder.load(tmp_path / "t.safetensors")


@torch.no_grad()
def test_half_precision_decodes_to_float32():
    frames, state = small().bfloat16().decode(torch.randn(1, 2, 4, 3, 4))
    assert frames.dtype == torch.float32
    assert {x.dtype for x in state.values()} == {torch.bfloat16}
