"""A small random UMT5 encoder with a tokenizer, in transformers' layout and in the original one."""

import json
import re

import torch
from echo_infinity.checkpoints.names import umt5
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import UMT5Config, UMT5EncoderModel

WIDTH = 16


def encoder(seed=0):
    """A UMT5EncoderModel with random weights."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=40,
        d_model=WIDTH,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
    )
    model = UMT5EncoderModel(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model


def write_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    letters = [(c, -3.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz,.'!"]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **names}))


def write_folder(folder, seed=0):
    """As transformers saves it."""
    encoder(seed).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def original_names():
    """Original name -> transformers' name, for every tensor of the small encoder."""
    parts = ["norm1", "norm2", "attn.q", "attn.k", "attn.v", "attn.o", "pos_embedding.embedding"]
    parts += ["ffn.gate.0", "ffn.fc1", "ffn.fc2"]
    names = ["token_embedding.weight", "norm.weight"]
    names += [f"blocks.{i}.{part}.weight" for i in range(2) for part in parts]
    return {name: umt5(name) for name in names}


def write_original(path, seed=0):
    """As the Wan checkpoints have it: one ``.pth``, the tokenizer in a folder beside it."""
    theirs = encoder(seed).state_dict()
    torch.save({old: theirs[new].bfloat16() for old, new in original_names().items()}, path)
    write_tokenizer(path.parent / "google" / "umt5-xxl")
    return path


def plain_encoder(weights, ids):
    """The original encoder spelt out under its original names, as an oracle: ``(n, D)`` of token ``ids``."""

    def norm(x, w):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w

    def bucket(distance, buckets, far=128):
        half, exact = buckets // 2, buckets // 4
        side = half if distance > 0 else 0
        n = abs(distance)
        if n < exact:
            return side + n
        log = torch.log(torch.tensor(n / exact)) / torch.log(torch.tensor(far / exact)) * (half - exact)
        return side + min(half - 1, exact + int(log))

    x = weights["token_embedding.weight"][ids]
    for i in range(1 + max(int(m[1]) for n in weights if (m := re.match(r"blocks\.(\d+)", n)))):
        w = {n.removeprefix(f"blocks.{i}."): t for n, t in weights.items() if n.startswith(f"blocks.{i}.")}
        table = w["pos_embedding.embedding.weight"]  # (buckets, H)
        rows = [[table[bucket(k - q, len(table))] for k in range(len(ids))] for q in range(len(ids))]
        bias = torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)  # (H, q, k)
        y = norm(x, w["norm1.weight"])
        heads = table.shape[1]
        q, k, v = ((y @ w[f"attn.{n}.weight"].T).unflatten(-1, (heads, -1)).transpose(0, 1) for n in "qkv")
        y = torch.softmax(q @ k.transpose(1, 2) + bias, -1) @ v  # T5 does not scale by the head dim
        x = x + y.transpose(0, 1).flatten(1) @ w["attn.o.weight"].T
        y = norm(x, w["norm2.weight"])
        gate = torch.nn.functional.gelu(y @ w["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ w["ffn.fc1.weight"].T)) @ w["ffn.fc2.weight"].T
    return norm(x, weights["norm.weight"])
