"""A whole model folder made of foreign files: a generator, UMT5, the Wan VAE and a tiny decoder, all small."""

import torch
from echo_infinity import cli
from echo_infinity.config import EchoConfig, ModelConfig
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.model import CausalDiT
from echo_infinity.taehv import TinyConfig, TinyDecoder
from umt5_files import WIDTH, write_original
from wan import vae

CONFIG = EchoConfig(
    name="foreign",
    model=ModelConfig(
        width=24, heads=2, layers=2, ffn=32, latent_channels=4, text_tokens=40, text_width=WIDTH, time_width=16
    ),
    latent_rows=4,
    latent_columns=4,
    memory=MemoryConfig(width=24, heads=2, frames=3, tokens_per_frame=4),
)
PROMPT = "a red circle drifts"
OTHER = "a blue square drifts"


def write_sources(folder):
    """Foreign files: name -> path."""
    torch.manual_seed(0)
    generator = {f"model.{name}": x for name, x in CausalDiT(CONFIG.model).state_dict().items()}
    memory = EvolvingMemory(CONFIG.memory).state_dict()
    torch.save(
        {"generator": generator | {f"model.query_memory_encoder.{n}": x for n, x in memory.items()}}, folder / "echo.pt"
    )
    vae().save_pretrained(folder / "pipe" / "vae")
    tiny = TinyDecoder(TinyConfig(4, (12, 8, 6, 6)))
    torch.save(tiny.state_dict(), folder / "taew2_1.pth")
    (folder / "geometry.json").write_text(CONFIG.to_json())
    return {
        "weights": folder / "echo.pt",
        "text": write_original(folder / "umt5.pth"),
        "vae": folder / "pipe",
        "tiny": folder / "taew2_1.pth",
        "config": folder / "geometry.json",
    }


def convert_all(folder):
    """Run ``echo-infinity convert`` on them; returns the model folder."""
    s = write_sources(folder)
    words = ["convert", s["weights"], "-o", folder / "model", "--config", s["config"], "--text", s["text"]]
    words += ["--text-dtype", "float32", "--vae", s["vae"], "--tiny-decoder", s["tiny"], "--shard-size", "0.00001"]
    assert cli.main([str(word) for word in words]) == 0
    return folder / "model"
