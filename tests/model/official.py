"""Checkpoints in the official layouts, made of the golden rollout's weights."""

import torch
from micro import GOLDEN, load, micro_config
from safetensors.torch import load_file, save_file

PROMPT = "the golden prompt"
ROLLOUT = "rollout_mem_nk1"


def golden_parts(name=ROLLOUT):
    """(configuration, DiT tensors, memory tensors) of a golden rollout, under names without ``model.``."""
    settings, _ = load(name)
    weights = load_file(GOLDEN / settings["generator_weights"])
    dit = {name.removeprefix("model."): x for name, x in weights.items()}
    memory = load_file(GOLDEN / settings["encoder_weights"]) if settings["memory"] else {}
    return micro_config(settings), dit, memory


def prefixed(tensors, prefix="model."):
    return {prefix + name: x for name, x in tensors.items()}


def wrapped(tensors):
    """Names as sharded training leaves them: wrappers outside, in the middle, and around each block."""
    return {
        "module._fsdp_wrapped_module.model._fsdp_wrapped_module."
        + name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): x
        for name, x in tensors.items()
    }


def spoilt(tensors):
    """The same shapes, other numbers: what must not be read."""
    return {name: x + 1 for name, x in tensors.items()}


def write_official(path, name=ROLLOUT, dit=None, averaged=()):
    """A training checkpoint: an average without memory under wrong prefixes; the memory is beside it.

    ``dit`` stands in for the golden weights; the average has the memory's tensors named in ``averaged``, and beside it
    they are spoilt.
    """
    _, golden, memory = golden_parts(name)
    dit = golden if dit is None else dit
    held = {key: x for key, x in memory.items() if key in averaged}
    generator = prefixed(spoilt(dit)) | prefixed(memory | spoilt(held), "model.query_memory_encoder.")
    average = wrapped(dit | prefixed(held, "query_memory_encoder."))
    torch.save({"generator": generator, "generator_ema": average, "critic": prefixed(spoilt(dit)), "step": 7}, path)
    return path


def lora_of(dit, rank=4, alpha=None):
    """(PEFT's tensors of an update, the weights that it turns into ``dit``)."""
    generator = torch.Generator().manual_seed(1)
    plain, updates = dict(dit), {}
    linears = ("attn.q.", "attn.k.", "attn.v.", "attn.o.", "ffn.0.", "ffn.2.")
    for key, w in dit.items():
        if key.startswith("blocks.") and key.endswith("weight") and any(part in key for part in linears):
            a, b = (0.1 * torch.randn(s, generator=generator) for s in ((rank, w.shape[1]), (w.shape[0], rank)))
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            updates |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            plain[key] = w - (1 if alpha is None else alpha / rank) * b @ a
    return updates, plain


def write_lora_pair(base, lora, rank=4, alpha=None, name=ROLLOUT):
    """A base and a LoRA-and-memory file whose sum is the golden model."""
    _, dit, memory = golden_parts(name)
    updates, plain = lora_of(dit, rank, alpha)
    torch.save({"generator": prefixed(plain) | prefixed(spoilt(memory), "model.query_memory_encoder.")}, base)
    torch.save({"generator_lora": updates, "query_memory_encoder": memory}, lora)
    return base, lora


def write_embeddings(path, name=ROLLOUT):
    """The golden rollout's prompt as a file of precomputed embeddings."""
    _, tensors = load(name)
    save_file({PROMPT: tensors["text"][0].contiguous()}, path)
    return path
