"""The naive loop of bench/: every waste costs time only, so its blocks are the engine's."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from echo_infinity.config import EchoConfig, ModelConfig, SamplerConfig, WindowConfig
from echo_infinity.generator import Generator
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.noise import counter_noise
from echo_infinity.sampler import BlockSampler
from numerics import assert_same_bits, assert_stream_equal

BENCH = Path(__file__).parents[1] / "bench"
BLOCKS = 9  # past the window and the saturation of memory ids, twice around the ring
CONFIG = EchoConfig(
    model=ModelConfig(
        width=48, heads=3, layers=3, ffn=64, latent_channels=4, text_tokens=5, text_width=8, time_width=16
    ),
    latent_rows=4,
    latent_columns=6,
    window=WindowConfig(),
    memory=MemoryConfig(width=48, heads=3, frames=3, tokens_per_frame=6),
    sampler=SamplerConfig(steps=(1000, 500)),
)


@pytest.fixture(scope="module")
def naive():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("naive")
    for name in ("naive", "baseline", "clock"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    memory = EvolvingMemory(CONFIG.memory)
    return Generator(CONFIG, CausalDiT(CONFIG.model).eval(), memory)


@pytest.fixture(scope="module")
def embeddings():
    return torch.randn(1, 3, CONFIG.model.text_width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def engine_blocks(generator, embeddings):
    with torch.no_grad():
        text = generator.model.encode_text(embeddings)
    return roll(BlockSampler(generator, text, counter_noise(0)))


def roll(sampler):
    return torch.cat([sampler.next_block() for _ in range(BLOCKS)], dim=1)


@torch.no_grad()
def test_without_wastes_it_is_the_engine(naive, generator, embeddings, engine_blocks):
    assert_same_bits(roll(naive.NaiveSampler(generator, embeddings, [], video_blocks=BLOCKS)), engine_blocks)


@pytest.mark.parametrize(
    "wastes",
    [
        *[[name] for name in ("clone", "shift", "rope", "concat", "reproject", "indices", "video")],
        ["embeddings"],
        ["context"],
        ["clone", "shift"],
        ["shift", "rope"],
        ["rope", "concat"],
        ["rope", "reproject"],
        ["shift", "concat"],
    ],
    ids="+".join,
)
@torch.no_grad()
def test_wastes_leave_the_output_alone(naive, generator, embeddings, engine_blocks, wastes):
    assert_stream_equal(roll(naive.NaiveSampler(generator, embeddings, wastes, video_blocks=BLOCKS)), engine_blocks)


@torch.no_grad()
def test_all_wastes_together_leave_the_output_alone(naive, generator, embeddings, engine_blocks):
    sampler = naive.NaiveSampler(generator, embeddings, list(naive.WASTES), video_blocks=BLOCKS)
    assert_stream_equal(roll(sampler), engine_blocks)
    assert_same_bits(sampler.video, roll(naive.NaiveSampler(generator, embeddings, naive.WASTES, video_blocks=BLOCKS)))


def test_unknown_waste_is_named(naive, generator, embeddings):
    with pytest.raises(ValueError, match=r"unknown wastes \['speed'\]; known: clone"):
        naive.NaiveSampler(generator, embeddings, ["speed"], video_blocks=1)


def test_the_report_compares_every_loop_with_the_engine(naive, tmp_path, capsys):
    baseline, out = importlib.import_module("baseline"), tmp_path / "report.json"
    threads = str(torch.get_num_threads())
    arguments = ["--geometry", "small", "--blocks", "1", "--dtype", "float32", "--threads", threads, "--out", str(out)]
    assert baseline.main(arguments) == 0
    report = json.loads(out.read_text())
    rows = report["seconds_per_block"]["float32"]
    assert list(rows) == ["engine", "off", *naive.WASTES, "all"]
    assert rows["engine"]["ratio"] == rows["engine"]["cpu_ratio"] == 1
    assert rows["all"]["ratio"] == rows["all"]["median"] / rows["engine"]["median"]
    assert_stream_equal(torch.tensor([row["difference"] for row in rows.values()]), torch.zeros(len(rows)))
    printed = capsys.readouterr().out
    assert all(f"| {name}: {text} |" in printed for name, text in naive.WASTES.items())
