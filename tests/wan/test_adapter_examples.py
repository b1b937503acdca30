"""The examples in docs/adapters.md run as they stand; the one on bare tensors computes what the engine computes."""

import re
import subprocess
import sys

import pytest
import torch
from echo_infinity.adapters.self_forcing import StreamCache
from echo_infinity.config import EchoConfig, ModelConfig
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from numerics import assert_stream_equal
from test_packaging import ROOT

import echo_ext

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adapters.md").read_text(), re.DOTALL)
DIFFUSERS, FORCING, BARE = EXAMPLES


@pytest.mark.parametrize(
    ("source", "printed"),
    [(DIFFUSERS, "torch.Size([1, 3, 4, 8, 12]) 33\n"), (FORCING, "torch.Size([1, 36, 48]) 720 16\n")],
)
def test_examples_run_as_they_stand(capsys, source, printed):
    exec(source, {"__name__": "example"})
    assert capsys.readouterr().out == printed


def test_the_bare_example_has_thirty_lines_and_needs_echo_ext_alone():
    assert len(BARE.splitlines()) <= 30
    assert re.findall(r"^(?:import|from) (\w+)", BARE, re.MULTILINE) == ["torch", "echo_ext"]
    hidden, shown = "import sys; sys.modules['echo_infinity'] = None", "print(out.shape, out.isfinite().all(), active)"
    done = subprocess.run([sys.executable, "-c", f"{hidden}\n{BARE}\n{shown}"], capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 192, 4, 64]) tensor(True) True\n", done.stderr


@torch.no_grad()
def test_the_bare_example_computes_what_the_engine_computes(monkeypatch):
    inputs, outputs = [], []
    append, attention = echo_ext.ring_append, echo_ext.stream_attention

    def recorded_append(q, k, v, **options):
        inputs.append((q.clone(), k.clone(), v.clone()))
        return append(q, k, v, **options)

    def recorded_attention(*args, **options):
        outputs.append(attention(*args, **options))
        return outputs[-1]

    monkeypatch.setattr(echo_ext, "ring_append", recorded_append)
    monkeypatch.setattr(echo_ext, "stream_attention", recorded_attention)
    names = {"__name__": "example"}
    exec(BARE.replace("for start in", "first_state = state\nfor start in"), names)
    monkeypatch.undo()

    D = names["D"]
    config = EchoConfig(
        model=ModelConfig(width=D, heads=4, layers=1, ffn=8, latent_channels=1, text_tokens=1, text_width=1),
        latent_rows=16,
        latent_columns=16,
        memory=MemoryConfig(width=D, heads=4, frames=3, tokens_per_frame=64, layers=1, normalise_keys=False),
    )
    memory = EvolvingMemory(config.memory)
    layer, gate = names["write"][0], names["gate"]
    linears = {
        "query_init": names["first_state"][0],
        "layers.0.q.weight": layer.q_weight,
        "layers.0.o.weight": layer.o_weight,
        "layers.0.ffn.0.weight": layer.up_weight,
        "layers.0.ffn.2.weight": layer.down_weight,
        "connector_proj.0.weight": gate.in_weight,
        "connector_proj.2.weight": gate.out_weight,
        "gate_linear.weight": gate.gate_weight,
        "gate_linear.bias": gate.gate_bias,
        "to_k.weight": names["to_k"],
        "to_v.weight": names["to_v"],
    }
    rest = {
        n: torch.ones_like(x) if "norm" in n or n == "connector_proj.3.weight" else torch.zeros_like(x)
        for n, x in memory.state_dict().items()
        if n not in linears
    }
    memory.load_state_dict(linears | rest)
    cache, one = StreamCache(config, memory), torch.ones(D)
    for i, ((q, k, v), expected) in enumerate(zip(inputs, outputs, strict=True)):
        assert_stream_equal(cache.attend(0, q, k, v, (one, one), i * 3 * 64), expected)
    assert cache.memory.writes == 15  # the last block's is seen by the next
