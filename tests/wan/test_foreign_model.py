"""A model folder made of foreign files, from the command line to the video, its states and its parts."""

import itertools
import shutil
import sys

import pytest
import torch
from echo_infinity import cli
from echo_infinity.parts import PartOptions
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.state import read_state
from echo_infinity.weights import load_checkpoint
from elsewhere import stream_elsewhere
from folder import OTHER, PROMPT, convert_all, write_sources
from numerics import assert_same_bits
from running import frames_of, hashes_of
from wan import vae


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return convert_all(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def take(stream, blocks):
    return list(itertools.islice(stream, blocks))


def test_everything_is_in_one_folder(model):
    assert {"config.json", "model.safetensors.index.json", "text", "vae", "tiny_decoder.safetensors"} <= {
        path.name for path in model.iterdir()
    }


def test_pixels_are_the_vaes_whole_decode_of_the_latents(model):
    pipe = EchoPipeline.from_pretrained(model)
    latents = torch.cat(take(pipe.stream(PROMPT, output_type="latents"), 3))
    raw = (latents * pipe.codec.latent_std + pipe.codec.latent_mean).transpose(0, 1)[None]
    with torch.no_grad():
        whole = vae().decode(raw).sample[0].permute(1, 2, 3, 0)
    expected = ((whole + 1) * 127.5).round().to(torch.uint8)
    assert_same_bits(torch.cat(take(pipe.stream(PROMPT), 3)), expected.contiguous())


@pytest.mark.parametrize("decoder", ["wan", "tiny"])
@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_the_decoders_state_is_part_of_the_saved_stream(model, tmp_path, decoder, blocks):
    pipe = EchoPipeline.from_pretrained(model, decoder=decoder)
    stream = pipe.stream(PROMPT)
    take(stream, blocks)
    stream.save(tmp_path / "s.safetensors")
    assert any(name.startswith("codec.decoder.") for name in read_state(tmp_path / "s.safetensors").tensors) == (
        blocks > 0
    )
    expected = take(stream, 3)
    assert_same_bits(
        take(EchoPipeline.from_pretrained(model, decoder=decoder).resume(tmp_path / "s.safetensors"), 3), expected
    )


def test_decoders_differ_and_a_state_of_one_is_not_resumed_with_the_other(model, tmp_path):
    wan, tiny = (EchoPipeline.from_pretrained(model, decoder=name) for name in ("wan", "tiny"))
    stream = wan.stream(PROMPT)
    assert not torch.equal(next(stream), next(tiny.stream(PROMPT)))
    stream.save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="saved with other weights"):
        tiny.resume(tmp_path / "s.safetensors")


def test_without_a_decoder_latents_stream_and_pixels_are_refused(model):
    pipe = EchoPipeline.from_pretrained(model, decoder="none")
    with pytest.raises(ValueError, match="loaded without a decoder"):
        pipe.stream(PROMPT)
    assert next(pipe.stream(PROMPT, output_type="latents")).shape == (3, 4, 4, 4)


def test_without_a_text_encoder_prompts_are_refused_with_advice(model, tmp_path):
    shutil.copytree(model, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "text")
    with pytest.raises(ValueError, match="holds no text encoder: add one with 'echo-infinity convert --text'"):
        EchoPipeline.from_pretrained(tmp_path / "bare").stream(PROMPT)


@pytest.mark.parametrize("keep", ["loaded", "cpu", "freed"])
def test_where_the_encoder_is_kept_changes_no_bit(model, keep):
    expected = take(EchoPipeline.from_pretrained(model, text_cache="").stream(PROMPT), 2)
    pipe = EchoPipeline.from_pretrained(model, text_keep=keep, text_cache="")
    stream = pipe.stream(PROMPT)
    assert_same_bits(take(stream, 2), expected)
    stream.switch(OTHER)
    assert not torch.equal(next(stream), next(pipe.stream(PROMPT)))


@pytest.mark.parametrize("decoder", ["wan", "tiny"])
@pytest.mark.parametrize("source", ["encoder", "file"])
def test_the_model_may_be_on_another_device_than_its_text(model, tmp_path, decoder, source):
    path = tmp_path / "prompts.safetensors"
    assert cli.main(["embed", PROMPT, OTHER, "--model", str(model), "-o", str(path)]) == 0
    parts = PartOptions(text=path if source == "file" else None, text_device="cpu", decoder=decoder)
    assert stream_elsewhere(load_checkpoint(model, parts=parts), [PROMPT, OTHER]) == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["loaded", "cpu", "freed"])
def test_a_gpu_shows_the_same_wherever_prompts_are_encoded(model, keep):
    pipes = [
        EchoPipeline.from_pretrained(model, device="cuda", text_cache="", text_keep=keep, text_device=device)
        for device in ("cuda", "cpu")
    ]
    for ours, theirs in zip(*(take(pipe.stream(PROMPT), 3) for pipe in pipes), strict=True):
        assert (ours.int() - theirs.int()).abs().max() <= 1  # pixels round


def test_precomputed_embeddings_give_the_same_stream_without_an_encoder(model, tmp_path):
    words = ["embed", PROMPT, OTHER, "--model", str(model), "-o", str(tmp_path / "prompts.safetensors")]
    assert cli.main(words) == 0
    expected = take(EchoPipeline.from_pretrained(model).stream(PROMPT), 2)
    shutil.copytree(model, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "text")
    pipe = EchoPipeline.from_pretrained(tmp_path / "bare", text=tmp_path / "prompts.safetensors")
    assert_same_bits(take(pipe.stream(PROMPT), 2), expected)


@pytest.mark.parametrize("options", [{"decoder": "own"}, {"decoder": "other"}, {"text_keep": "somewhere"}])
def test_parts_that_are_not_there_are_refused(model, options):
    with pytest.raises(ValueError, match=r"own|decoder must be one of|text_keep must be one of"):
        EchoPipeline.from_pretrained(model, **options)


def test_one_command_from_the_foreign_model_to_a_video(model, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    words = ["generate", PROMPT, "--model", model, "--seconds", "2", "-o", out, "--decoder", "tiny"]
    assert cli.main([str(word) for word in words]) == 0
    assert frames_of(out) == list(range(32))


def test_a_resumed_run_uses_the_parts_it_began_with(model, tmp_path):
    cli.main(["embed", PROMPT, "--model", str(model), "-o", str(tmp_path / "p.safetensors")])
    parts = ["--text", str(tmp_path / "p.safetensors"), "--decoder", "tiny"]

    def run(name, frames, *more):
        words = [*more, "--frames", frames, "--no-video", "--raw-hashes", tmp_path / name]
        assert cli.main(["generate", *map(str, words)]) == 0

    run("whole", 57, PROMPT, "--model", model, *parts)
    state = tmp_path / "s.safetensors"
    run("halves", 21, PROMPT, "--model", model, *parts, "--save", state)
    run("halves", 57, "--resume", state)
    assert hashes_of(tmp_path / "halves") == hashes_of(tmp_path / "whole")


def test_parts_are_added_to_a_folder_later(tmp_path, model):
    s = write_sources(tmp_path)
    target = str(tmp_path / "model")
    assert cli.main(["convert", str(s["weights"]), "-o", target, "--config", str(s["config"])]) == 0
    with pytest.raises(ValueError, match="loaded without a decoder"):
        EchoPipeline.from_pretrained(target).stream(PROMPT)
    assert cli.main(["convert", "-o", target, "--vae", str(s["vae"])]) == 0
    assert cli.main(["convert", "-o", target, "--text", str(s["text"]), "--text-dtype", "float32"]) == 0
    assert cli.main(["convert", "-o", target, "--text", str(s["text"])]) == 2
    added, whole = (EchoPipeline.from_pretrained(folder, decoder="wan") for folder in (target, model))
    assert_same_bits(take(added.stream(PROMPT), 1), take(whole.stream(PROMPT), 1))


def test_parts_alone_make_no_folder(tmp_path, capsys):
    s = write_sources(tmp_path)
    assert cli.main(["convert", "-o", str(tmp_path / "none"), "--vae", str(s["vae"])]) == 2
    assert "give the generator's checkpoint too" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_decoder_for_other_latents_is_refused(tmp_path):
    s = write_sources(tmp_path)
    words = [s["weights"], "-o", tmp_path / "model", "--config", s["config"], "--vae", s["vae"]]
    assert cli.main(["convert", *map(str, words)]) == 0
    text = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(text.replace('"latent_channels": 4', '"latent_channels": 5'))
    with pytest.raises(ValueError, match=r"patch_embedding|latent channels"):
        EchoPipeline.from_pretrained(tmp_path / "model")


def test_a_missing_library_is_one_line_on_the_command_line(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert cli.main(["generate", PROMPT, "--model", str(model), "--seconds", "1", "--no-video"]) == 2
    assert "pip install 'echo-infinity[wan]'" in capsys.readouterr().err
