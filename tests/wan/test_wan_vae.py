"""The Wan VAE as a streaming codec against diffusers' whole decode, its files, and the tiny decoder beside it."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from echo_infinity.checkpoints import parts
from echo_infinity.checkpoints.names import wan_vae
from echo_infinity.checkpoints.parts import write_decoder
from echo_infinity.wanvae import WanVae
from numerics import assert_same_bits
from safetensors.torch import load_file, save_file
from test_hostile_files import Trap
from wan import vae

CUTS = [[7], [3, 3, 1], [1] * 7, [2, 5], [1, 6]]


def raw(codec, latents):
    """What diffusers decodes: not normalised, channels before frames."""
    return (latents * codec.latent_std + codec.latent_mean).transpose(1, 2)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_streaming_decode_has_the_bits_of_diffusers_whole_decode(cuts, batch):
    codec, latents = WanVae(vae()), torch.randn(batch, 7, 4, 6, 5)
    whole = vae().decode(raw(codec, latents)).sample.transpose(1, 2)
    state, parts, at = None, [], 0
    for count in cuts:
        part, state = codec.decode(latents[:, at : at + count], state)
        assert part.shape[1] == 4 * count - (0 if at else 3)
        parts, at = [*parts, part], at + count
    assert whole.std() > 0.01
    assert_same_bits(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@torch.no_grad()
def test_streaming_encode_has_the_bits_of_diffusers_whole_encode(cuts):
    codec, frames = WanVae(vae()), torch.rand(2, 25, 3, 48, 40) * 2 - 1
    mode = vae().encode(frames.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    state, parts, at = None, [], 0
    for count in cuts:
        end = at + 4 * count - (0 if at else 3)
        part, state = codec.encode(frames[:, at:end], state)
        parts, at = [*parts, part], end
    assert_same_bits(torch.cat(parts, 1), (mode - codec.latent_mean) / codec.latent_std)


@torch.no_grad()
def test_a_state_saved_at_any_latent_goes_on_with_the_same_bits(tmp_path):
    codec, latents = WanVae(vae()), torch.randn(1, 6, 4, 6, 5)
    whole = codec.decode(latents)[0]
    for cut in range(1, 6):
        first, state = codec.decode(latents[:, :cut])
        save_file(state, tmp_path / "state.safetensors")
        second, _ = codec.decode(latents[:, cut:], load_file(tmp_path / "state.safetensors"))
        assert_same_bits(torch.cat([first, second], 1), whole)


@torch.no_grad()
def test_a_state_serves_twice_and_interleaved_streams_do_not_meet():
    codec, a, b = WanVae(vae()), torch.randn(1, 4, 4, 6, 5), torch.randn(1, 4, 4, 6, 5)
    (first_a, state_a), (first_b, state_b) = codec.decode(a[:, :2]), codec.decode(b[:, :2])
    again = codec.decode(a[:, 2:], state_a)[0]
    rest_b = codec.decode(b[:, 2:], state_b)[0]
    assert_same_bits(codec.decode(a[:, 2:], state_a)[0], again)
    assert_same_bits(torch.cat([first_a, again], 1), codec.decode(a)[0])
    assert_same_bits(torch.cat([first_b, rest_b], 1), codec.decode(b)[0])


@torch.no_grad()
def test_the_state_does_not_grow():
    codec, state, sizes = WanVae(vae()), None, []
    for _ in range(6):
        _, state = codec.decode(torch.randn(1, 3, 4, 6, 5), state)
        sizes.append({name: x.shape for name, x in state.items()})
    assert sizes[1:] == sizes[:-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.decode(torch.zeros(1, 2, 5, 2, 2)), r"latents must be \(B, F >= 1, 4, h, w\)"),
        (lambda c: c.decode(torch.zeros(1, 0, 4, 2, 2)), r"latents must be \(B, F >= 1, 4, h, w\)"),
        (lambda c: c.decode(torch.zeros(1, 1, 4, 2, 2), {"other": torch.zeros(1)}), "state 'other' is no part"),
        (lambda c: c.decode(torch.zeros(1, 1, 4, 2, 2), {"decoder.99": torch.zeros(1)}), r"state 'decoder\.99' is no"),
        (lambda c: c.encode(torch.zeros(1, 4, 3, 16, 16)), "4 F - 3 at the start of a stream, got 4"),
        (lambda c: c.encode(torch.zeros(1, 5, 3, 16, 12)), "multiples of 8"),
        (lambda c: c.encode(torch.zeros(1, 0, 3, 16, 16)), "got 0"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call(WanVae(vae()))


def test_other_strides_are_refused():
    small = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    other = AutoencoderKLWan(dim_mult=[1, 2, 2], temperal_downsample=[True, True], **small)
    with pytest.raises(ValueError, match=r"strides \(4, 4\).* need 4, 8 and none"):
        WanVae(other)


def originals():
    """Original names of the Wan VAE at its full depth: as diffusers' own converter reads them."""
    names = {}
    with torch.device("meta"):
        whole = AutoencoderKLWan()
    backwards = {}
    rename = wan_vae(4, 2)
    parts = ["residual.0.gamma", "residual.2.weight", "residual.2.bias", "residual.3.gamma", "residual.6.weight"]
    parts += ["residual.6.bias", "shortcut.weight", "shortcut.bias", "resample.1.weight", "resample.1.bias"]
    parts += ["time_conv.weight", "time_conv.bias"]
    candidates = [f"{side}.{part}" for side in ("encoder", "decoder") for part in _stem_names()]
    candidates += [f"encoder.downsamples.{i}.{part}" for i in range(11) for part in parts]
    candidates += [f"decoder.upsamples.{i}.{part}" for i in range(15) for part in parts]
    candidates += [f"{side}.middle.{i}.{part}" for side in ("encoder", "decoder") for i in (0, 2) for part in parts]
    candidates += ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    for name in candidates:
        backwards[rename(name)] = name
    for name, x in whole.state_dict().items():
        names[backwards[name]] = x
    return names


def _stem_names():
    ends = ["conv1.weight", "conv1.bias", "head.0.gamma", "head.2.weight", "head.2.bias"]
    return ends + [f"middle.1.{x}" for x in ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")]


def test_original_names_map_as_diffusers_maps_them():
    named = originals()
    theirs = convert_wan_vae_to_diffusers(dict(named))
    rename = wan_vae(4, 2)
    assert {rename(name): x.shape for name, x in named.items()} == {name: x.shape for name, x in theirs.items()}
    marked = {name: torch.tensor(float(i)) for i, name in enumerate(named)}
    expected = {name: float(x) for name, x in convert_wan_vae_to_diffusers(dict(marked)).items()}
    assert {rename(name): float(x) for name, x in marked.items()} == expected


def test_the_original_file_converts(tmp_path, monkeypatch):
    named = originals()
    marked = {name: torch.tensor(float(i)).expand(x.shape) for i, (name, x) in enumerate(named.items())}
    torch.save(marked, tmp_path / "Wan2.1_VAE.pth")
    written = {}
    monkeypatch.setattr(parts, "write_shards", lambda folder, stem, entries, **_: written.update(entries))
    write_decoder(tmp_path / "Wan2.1_VAE.pth", tmp_path / "vae")
    expected = convert_wan_vae_to_diffusers(dict(marked))
    assert written.keys() == expected.keys()
    for name, entry in written.items():
        assert (entry.shape, entry.dtype) == (tuple(expected[name].shape), torch.float32)
        assert entry.read().flatten()[0] == expected[name].flatten()[0]
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert (config["z_dim"], config["base_dim"]) == (16, 96)
    del marked["conv2.bias"]
    torch.save(marked, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match=r"missing post_quant_conv\.bias"):
        write_decoder(tmp_path / "Wan2.1_VAE.pth", tmp_path / "other")


@pytest.mark.parametrize("layout", ["folder", "pipeline"])
@torch.no_grad()
def test_diffusers_folders_convert_and_load(tmp_path, layout):
    vae().save_pretrained(tmp_path / "vae")
    write_decoder(tmp_path / "vae" if layout == "folder" else tmp_path, tmp_path / "out")
    codec, latents = WanVae.load(tmp_path / "out"), torch.randn(1, 3, 4, 6, 5)
    assert_same_bits(codec.decode(latents)[0], WanVae(vae()).decode(latents)[0])


def test_a_vae_that_does_not_fit_is_refused_with_every_name(tmp_path):
    vae().save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.bias"]
    tensors |= {"more": torch.zeros(1), "quant_conv.bias": torch.zeros(3)}
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the three names below are the match
        write_decoder(tmp_path / "vae", tmp_path / "out")
    for line in ("missing decoder.conv_in.bias", "unexpected more", "quant_conv.bias is (3,), expected (8,)"):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
        (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), r"must hold one \.safetensors file"),
        (lambda folder: cut(folder / "diffusion_pytorch_model.safetensors"), "is corrupt or truncated"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path, change, message):
    vae().save_pretrained(tmp_path / "vae")
    change(tmp_path / "vae")
    with pytest.raises(ValueError, match=message):
        WanVae.load(tmp_path / "vae")


@pytest.mark.parametrize("change", [{"num_res_blocks": 10**9}, {"dim_mult": [1] * 10**4}])
def test_a_configuration_of_absurd_depth_is_refused_before_it_is_built(tmp_path, change):
    vae().save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for attempt in (
        lambda: WanVae.load(tmp_path / "vae"),
        lambda: write_decoder(tmp_path / "vae", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=rf"has {next(iter(change))} 10+, the weights \d+ tensors"):
            attempt()


def test_a_vae_in_a_pickle_is_not_opened(tmp_path):
    vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Trap(tmp_path / "ran"), tmp_path / "vae" / "diffusion_pytorch_model.bin")
    for attempt in (
        lambda: WanVae.load(tmp_path / "vae"),
        lambda: write_decoder(tmp_path / "vae", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"must hold one \.safetensors file"):
            attempt()
    assert not (tmp_path / "ran").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def test_the_converted_configuration_keeps_what_diffusers_wrote(tmp_path):
    vae().save_pretrained(tmp_path / "vae")
    write_decoder(tmp_path / "vae", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKLWan"
    assert config["latents_mean"] == [0.1, 0.2, -0.3, 0.4]
