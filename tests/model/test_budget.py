"""The memory plan: its counts are those of the real tensors, its sums those of a process, its choices fit."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from echo_infinity import cli
from echo_infinity.budget import GIB, Choice, capacity, choices, items, pick
from echo_infinity.cache import RingKV
from echo_infinity.checkpoints.convert import expected_shapes
from echo_infinity.commands import plan
from echo_infinity.config import EchoConfig, ModelConfig, SamplerConfig, preset
from echo_infinity.fp8 import Fp8RingKV
from echo_infinity.memory import MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.taehv import TinyConfig, TinyDecoder
from live import decoding
from test_packaging import ROOT

WAN = preset("wan2.1-1.3b")


def nbytes(tensors):
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_and_cache_are_counted_as_they_are(dtype):
    name = str(dtype).removeprefix("torch.")
    with torch.device("meta"):
        model, ring, narrowed = CausalDiT(WAN.model).to(dtype), RingKV(WAN, 1, dtype), Fp8RingKV(WAN, 1, dtype)
    found = items(WAN, Choice(dtype=name))
    total = sum(torch.Size(shape).numel() for shape in expected_shapes(WAN).values()) * dtype.itemsize
    assert found["generator's weights"] == nbytes(model.state_dict().values())
    assert found["generator's weights"] + found["memory's weights"] == total
    assert found["cached keys and values"] == nbytes(ring.tensors().values())
    held = [*narrowed.tensors().values(), narrowed.k[0], narrowed.v[0]]  # the last two: what layers are widened into
    assert items(WAN, Choice(dtype=name, kv="fp8"))["cached keys and values"] == nbytes(held)


def test_weights_in_eight_bits_are_counted_as_they_are():
    config = replace(WAN, model=replace(WAN.model, layers=2), memory=None)
    with torch.device("meta"):
        model = CausalDiT(config.model).bfloat16()
    linears = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, torch.nn.Linear))
    before = items(config, Choice())["generator's weights"]
    assert before - items(config, Choice(weights="fp8"))["generator's weights"] == linears


def test_the_official_parameters_are_those_published():
    assert items(WAN, Choice(dtype="float32"))["generator's weights"] == 4 * 1_418_996_800
    # With the norm of memory keys, which the long model leaves out.
    assert items(WAN, Choice(dtype="float32"))["memory's weights"] == 4 * (68_571_648 - 1536)


def test_the_tiny_decoder_is_counted_as_it_is():
    with torch.device("meta"):
        decoder = TinyDecoder(TinyConfig())
        _, state = decoder.decode(torch.zeros(1, 2, 16, 60, 104))
    found = items(WAN, Choice(decoder="tiny", decoder_dtype="float32"))
    assert found["decoder"] == nbytes(decoder.state_dict().values())
    assert found["decoder's state, old and new"] == 2 * nbytes(state.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tiny_decoder_takes_no_more_than_the_plan_says(dtype):
    with torch.device("meta"):
        decoder = TinyDecoder(TinyConfig()).to(dtype).requires_grad_(False)
    assert_planned(decoder, "tiny", dtype)


def assert_planned(codec, name, dtype):
    """The plan covers what decoding a block at the official size keeps alive, and not much more than that."""
    found = items(WAN, Choice(decoder=name, decoder_dtype=str(dtype).removeprefix("torch.")))
    planned = found["decoder's state, old and new"] + found["decoder's work"]
    taken = decoding(codec, WAN.model.latent_channels, WAN.latent_rows, WAN.latent_columns)
    assert taken <= planned <= 1.6 * taken, f"takes {taken / GIB:.2f} GiB, planned {planned / GIB:.2f}"


@pytest.mark.parametrize("size", ["12GB", "24GB", "40GB", "80GB"])
def test_what_is_picked_fits_and_nothing_better_does(size):
    room = capacity(size)
    first = Choice(text="cuda", decoder_dtype="float32")
    chosen = pick(WAN, room, first)
    tried = list(choices(first))
    better = tried[: tried.index(chosen)]
    assert sum(items(WAN, chosen).values()) <= room
    assert all(sum(items(WAN, choice).values()) > room for choice in better)


def test_the_official_model_fits_12_gb_with_its_text_elsewhere():
    chosen = pick(WAN, capacity("12GB"))
    assert (chosen.text, chosen.dtype, chosen.weights, chosen.kv) == ("cpu", "bfloat16", "full", "full")


def test_choices_take_ever_less():
    sums = [sum(items(WAN, choice).values()) for choice in choices(Choice(text="cuda", decoder_dtype="float32"))]
    assert sums[0] > sums[1] > sums[2] > sums[3]
    assert min(sums) == sums[-1]


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * GIB), ("24 gib", 24 * GIB), ("80", 80 * GIB), ("11.5GB", int(11.5 * GIB))]
)
def test_sizes_are_read_as_makers_count(text, expected):
    assert capacity(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "24TB", "1e3GB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="a GPU's memory is written like 24GB"):
        capacity(text)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--gpu", "12GB"], 0, "fits 12GB with"),
        (["--gpu", "4GB"], 1, "does not fit 4GB"),
        (["--preset", "tiny", "--gpu", "8GB"], 0, "echo-infinity generate ... --dtype bfloat16\n"),
        (["--size", "1280x720", "--gpu", "80GB"], 0, "1280 x 720 pixels"),
        (["--streams", "4"], 0, "4 streams"),
    ],
)
def test_the_command_says_what_fits(capsys, words, code, line):
    assert cli.main(["plan", *words]) == code
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--decoder", "none"], ["--preset", "tiny"], ["--text", "cpu", "--kv", "fp8"]])
def test_where_nothing_fits_the_least_of_the_choices_is_shown(words):
    args = argparse.ArgumentParser()
    plan.add_arguments(args)
    lines, fits = plan.plan(args.parse_args([*words, "--gpu", "0.1GB"]))
    given = args.parse_args(words)
    config = preset(given.preset)
    text, decoder = ("file", "own") if given.preset == "tiny" else (given.text, given.decoder or "wan")
    sums = [sum(items(config, x).values()) for x in choices(Choice(text=text, decoder=decoder, kv=given.kv))]
    assert not fits
    assert lines[-2].split() == ["together", f"{min(sums) / GIB:.3f}", "GiB"]
    assert lines[-1].startswith("does not fit 0.1GB")


@pytest.mark.parametrize("words", [["--size", "100x100"], ["--size", "wide"], ["--gpu", "big"], ["--streams", "0"]])
def test_plans_that_make_no_sense_are_refused(words):
    assert cli.main(["plan", *words]) == 2


def test_every_option_of_a_plan_exists_in_generate():
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    known = cli._parser().format_help()
    assert "plan" in known
    for gpu in ("80GB", "24GB", "12GB", "8GB"):
        lines, fits = plan.plan(parser.parse_args(["--gpu", gpu]))
        words = lines[-1].split("...")[1].split()
        assert fits
        args = cli._parser().parse_args(["generate", "prompt", *words])
        assert args.dtype == "bfloat16"


def full_geometry(*words):
    """What bench/full_geometry.py reports."""
    command = [sys.executable, str(ROOT / "bench/full_geometry.py"), *map(str, words)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["finite"]
    return report


@pytest.mark.gpu
def test_the_official_model_fits_12_gb_of_a_gpu_with_its_text_elsewhere():
    report = full_geometry("--device", "cuda", "--decoder", "tiny")
    assert report["measured_mib"] <= report["planned_mib"]
    assert report["measured_mib"] <= 12 << 10


def test_a_process_takes_what_the_plan_says(tmp_path):
    """A middle-sized geometry; bench/full_geometry.py does the same at the official one."""
    config = EchoConfig(
        name="middle",
        model=ModelConfig(
            width=1024, heads=8, layers=12, ffn=4096, latent_channels=16, text_tokens=128, text_width=512
        ),
        latent_rows=16,
        latent_columns=16,
        memory=MemoryConfig(width=1024, heads=8, frames=3, tokens_per_frame=64),
        sampler=SamplerConfig(steps=(1000,)),
    )
    (tmp_path / "config.json").write_text(config.to_json())
    report = full_geometry("--config", tmp_path / "config.json")
    assert report["planned_mib"] > 600, "most of it must be the model's, or this shows nothing"
    assert abs(report["measured_over_planned"] - 1) <= 0.15, report
