"""Training the codec: resumes bit-exactly, learns, saves on Ctrl-C."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from echo_infinity.codec import Codec, CodecConfig
from echo_infinity.training import codec as codec_training
from echo_infinity.training.codec import CodecTrainer, CodecTraining

from tests.numerics import assert_same_bits, assert_stream_equal

CONFIG = CodecConfig(4, 8, 8, 8, 8, 4)
SETTINGS = CodecTraining(steps=6, batch=2, whole_share=0.4, latent_frames=2, warmup=2, bf16=False)


def weights(trainer: CodecTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.flatten() for name, tensor in trainer.codec.state_dict().items()}


def test_a_resumed_run_gives_the_same_bits_as_an_unbroken_one(tmp_path: Path) -> None:
    whole = CodecTrainer(SETTINGS, tmp_path / "whole", CONFIG)
    assert whole.train()
    CodecTrainer(SETTINGS, tmp_path / "broken", CONFIG).train(until=3)
    resumed = CodecTrainer(SETTINGS, tmp_path / "broken", CONFIG)
    assert resumed.resume()
    assert resumed.step == 3
    resumed.train()
    assert_same_bits(weights(resumed), weights(whole))
    assert [row["loss"] for row in resumed.log] == [row["loss"] for row in whole.log]
    for name in ("checkpoint.safetensors", "log.csv", "loss.png"):
        assert (tmp_path / "broken" / name).stat().st_size > 0


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trainer = CodecTrainer(
        CodecTraining(steps=60, batch=4, latent_frames=2, rate=5e-3, warmup=5, bf16=False), tmp_path, CONFIG
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.log]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_ctrl_c_saves_the_steps_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = CodecTrainer(SETTINGS, tmp_path, CONFIG)
    real = codec_training.training_batch

    def interrupted(settings: CodecTraining, step: int) -> torch.Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return real(settings, step)

    monkeypatch.setattr(codec_training, "training_batch", interrupted)
    assert not trainer.train()
    again = CodecTrainer(SETTINGS, tmp_path, CONFIG)
    assert again.resume()
    assert again.step == 2


def test_a_checkpoint_of_other_settings_or_cut_short_is_refused(tmp_path: Path) -> None:
    CodecTrainer(SETTINGS, tmp_path, CONFIG).train(until=1)
    with pytest.raises(ValueError, match="made with settings"):
        CodecTrainer(CodecTraining(steps=7), tmp_path, CONFIG).resume()
    with pytest.raises(ValueError, match="made with config"):
        CodecTrainer(SETTINGS, tmp_path).resume()
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        CodecTrainer(SETTINGS, tmp_path, CONFIG).resume()


def test_the_command_writes_a_codec_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_training, "judge", partial(codec_training.judge, worlds=3, latent_frames=2))
    parser = argparse.ArgumentParser()
    codec_training.add_arguments(parser)
    options = ["--steps", "2", "--batch", "1", "--latent-frames", "2", "--out", str(tmp_path), "--no-bf16"]
    assert codec_training.run(parser.parse_args(options)) == 0
    assert "psnr" in capsys.readouterr().out
    assert Codec.load(tmp_path / "codec.safetensors").config == CodecConfig()


def test_training_the_decoder_alone_keeps_the_latents(tmp_path: Path) -> None:
    first = CodecTrainer(SETTINGS, tmp_path / "first", CONFIG)
    first.train()
    first.normalise(clips=8)
    first.codec.save(tmp_path / "codec.safetensors")
    before = Codec.load(tmp_path / "codec.safetensors")
    alone = replace(SETTINGS, decoder_only=True)
    trainer = CodecTrainer(alone, tmp_path / "second", init=Codec.load(tmp_path / "codec.safetensors"))
    trainer.train()
    frames = codec_training.training_batch(SETTINGS, 99)
    with torch.no_grad():
        old, new = before.encode(frames)[0], trainer.codec.eval().encode(frames)[0]
        assert_stream_equal(new, old)
        assert (trainer.codec.decode(old)[0] - before.decode(old)[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="--init"):
        CodecTrainer(alone, tmp_path / "third", CONFIG)


def test_normalised_latents_have_zero_mean_and_unit_variance(tmp_path: Path) -> None:
    trainer = CodecTrainer(SETTINGS, tmp_path, CONFIG)
    trainer.train()
    trainer.normalise(clips=32)
    with torch.no_grad():
        whole = replace(SETTINGS, batch=32, whole_share=1.0)
        batches = [codec_training.training_batch(whole, SETTINGS.steps + 32 + i) for i in range(4)]
        latents = torch.cat([trainer.codec.encode(batch)[0] for batch in batches])
    assert latents.mean((0, 1, 3, 4)).abs().max() < 1e-3
    assert (latents.std((0, 1, 3, 4)) - 1).abs().max() < 1e-2
