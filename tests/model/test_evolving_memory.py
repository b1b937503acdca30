"""EvolvingMemory: golden writes, read-outs and gradients; names; options; state dtypes."""

import json
from pathlib import Path

import pytest
import torch
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from numerics import assert_golden, assert_no_worse_than, assert_same_bits
from safetensors.torch import load_file

from echo_ext.rope import frame_table, grid_table

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
VARIANTS = ["default", "groups3", "normk", "post_norm", "residual", "sink_anchor"]
WRITES = 5


class Golden:
    """One golden file: the memory it was made with, loaded strictly, and its tensors."""

    def __init__(self, variant):
        settings = json.loads((GOLDEN / f"memory_encoder_{variant}.json").read_text())
        official = settings["config"]
        self.tensors = load_file(GOLDEN / f"memory_encoder_{variant}.safetensors")
        self.loss, self.batch = settings["loss"], settings["batch"]
        self.memory = EvolvingMemory(
            MemoryConfig(
                width=official["hidden_dim"],
                heads=official["num_heads"],
                frames=official["Q_frames"],
                tokens_per_frame=official["tokens_per_frame"],
                layers=official["n_encoder_layers"],
                groups=official.get("num_query_groups", 1),
                residual=official.get("use_residual_update", False),
                post_norm=official.get("use_post_norm", False),
                normalise_keys=official.get("normalize_memory_k", False),
                sink_anchor=official.get("use_sink_anchor", False),
            )
        )
        self.memory.load_state_dict(self.with_prefix("param."))

    def with_prefix(self, prefix):
        return {name[len(prefix) :]: x for name, x in self.tensors.items() if name.startswith(prefix)}

    def write(self, state, i, split=0):
        k, v = self.tensors[f"evicted_k.{i}"], self.tensors[f"evicted_v.{i}"]
        segments = [(k[:, :split], v[:, :split]), (k[:, split:], v[:, split:])] if split else [(k, v)]
        sink = (self.tensors["sink_k"], self.tensors["sink_v"]) if self.memory.config.sink_anchor else None
        return self.memory.write(state, segments, sink=sink)


@pytest.fixture(params=VARIANTS)
def golden(request):
    return Golden(request.param)


@pytest.mark.parametrize("split", [0, 2], ids=["one segment", "wrapped in the ring"])
@torch.no_grad()
def test_states_and_read_outs_after_each_write_match_golden(golden, split):
    state = golden.memory.start(golden.batch)
    assert torch.equal(state, golden.tensors["state.init"])
    for i in range(WRITES):
        state = golden.write(state, i, split)
        assert_golden(state, golden.tensors[f"state.{i}"])
        k, v = golden.memory.read(state)
        assert_golden(k, golden.tensors[f"kv_k.{i}"])
        assert_golden(v, golden.tensors[f"kv_v.{i}"])


def test_gradients_of_every_parameter_after_three_writes_match_golden(golden):
    state = golden.memory.start(golden.batch)
    for i in range(3):
        state = golden.write(state, i)
    k, v = golden.memory.read(state)
    loss = k.square().sum() + v.square().sum()
    assert_golden(loss, torch.tensor(golden.loss), "gradient")
    loss.backward()
    expected = golden.with_prefix("grad.")
    parameters = dict(golden.memory.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert_golden(parameter.grad, expected[name], "gradient")


def tiny(**options):
    options = {"width": 24, "heads": 2, "frames": 2, "tokens_per_frame": 3, **options}
    return MemoryConfig(**options)


def evicted(batch=1, length=6, dtype=torch.float32):
    return torch.randn(batch, length, 2, 12, dtype=dtype), torch.randn(batch, length, 2, 12, dtype=dtype)


def official_names(groups):
    layer = ["q.weight", "q.bias", "o.weight", "o.bias", "norm_q.weight", "norm1.weight", "norm2.weight"]
    layer += ["ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias"]
    names = {f"layers.{i}.{name}" for i in range(2) for name in layer}
    for g in range(groups):
        one = groups == 1
        names.add("query_init" if one else f"query_inits.{g}")
        connector = "connector_proj" if one else f"connector_projs.{g}"
        names |= {f"{connector}.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight")}
        linears = (
            ("gate_linear", "to_k", "to_v") if one else (f"gate_linears.{g}", f"to_k_groups.{g}", f"to_v_groups.{g}")
        )
        names |= {f"{linear}.{name}" for linear in linears for name in ("weight", "bias")}
        names.add("norm_k_out.weight" if one else f"norm_k_out_groups.{g}.weight")
    return names


@pytest.mark.parametrize("groups", [1, 3])
def test_parameters_have_the_official_names(groups):
    assert EvolvingMemory(tiny(groups=groups)).state_dict().keys() == official_names(groups)
    assert "post_norm.weight" in EvolvingMemory(tiny(groups=groups, post_norm=True)).state_dict()


def test_official_geometry_has_the_official_parameter_count():
    with torch.device("meta"):
        memory = EvolvingMemory(MemoryConfig(width=1536, heads=12, frames=3, tokens_per_frame=1560))
    assert len(memory.state_dict()) == 35
    assert sum(x.numel() for x in memory.parameters()) == 68_571_648


def test_weights_of_options_that_are_off_are_ignored_and_others_are_errors():
    weights = EvolvingMemory(tiny()).state_dict()
    EvolvingMemory(tiny(normalise_keys=False)).load_state_dict(weights)
    EvolvingMemory(tiny(residual=True)).load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*mu_proj\.weight"):
        EvolvingMemory(tiny(residual=True)).load_state_dict({**weights, "mu_proj.weight": torch.zeros(1)})
    del weights["norm_k_out.weight"]
    EvolvingMemory(tiny(normalise_keys=False)).load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"Missing key.*norm_k_out\.weight"):
        EvolvingMemory(tiny()).load_state_dict(weights)


def test_starts_as_configured():
    memory = EvolvingMemory(tiny(tokens_per_frame=500, init_range=0.1, gate_bias=0.5, groups=2))
    for g in range(2):
        assert 0.09 < memory.query_inits[g].std() < 0.11
        assert (memory.gate_linears[g].bias == 0.5).all()
    state = memory.start(3)
    assert state.shape == (2, 3, 1000, 24)
    assert torch.equal(state[1, 2], memory.query_inits[1][0])


@torch.no_grad()
def test_write_leaves_the_old_state_alone_and_batch_rows_apart():
    memory = EvolvingMemory(tiny())
    k, v = evicted(batch=2)
    state = memory.write(memory.start(2), [(k, v)])
    before = state.clone()
    both = memory.write(state, [(k, v)])
    assert_same_bits(state, before)
    for b in range(2):
        alone = memory.write(state[:, b : b + 1], [(k[b : b + 1], v[b : b + 1])])
        assert_no_worse_than(both[:, b : b + 1], alone, alone)


@torch.no_grad()
def test_sink_anchor_reads_the_sink_before_the_evicted_frames():
    plain, anchored = EvolvingMemory(tiny()), EvolvingMemory(tiny(sink_anchor=True))
    anchored.load_state_dict(plain.state_dict())
    sink, gone = evicted(), evicted()
    joined = [(torch.cat([sink[0], gone[0]], dim=1), torch.cat([sink[1], gone[1]], dim=1))]
    expected = plain.write(plain.start(1), joined)
    assert_no_worse_than(anchored.write(anchored.start(1), [gone], sink=sink), expected, expected)


@torch.no_grad()
def test_frozen_memory_stays_at_its_start_and_can_still_be_read():
    memory = EvolvingMemory(tiny(frozen=True))
    start = memory.start(1)
    assert_same_bits(memory.write(start, [evicted()]), start)
    k, v = memory.read(start)
    assert k.shape == v.shape == (1, 1, 6, 2, 12)


@torch.no_grad()
def test_positions_tell_where_an_evicted_token_was():
    """Without positions a permutation of the evicted tokens can't be seen; with them it can."""
    k, v = evicted()
    order = torch.tensor([3, 4, 5, 0, 1, 2])  # the two frames swapped
    swapped = k[:, order], v[:, order]
    tables = frame_table([0, 1], 12), grid_table([0, 0, 0], [0, 1, 2], 12)
    rope = {"q_rope": tables, "k_rope": [tables]}
    blind, sighted = EvolvingMemory(tiny()).double(), EvolvingMemory(tiny(positions=True)).double()
    same = [blind.write(blind.start(1), [(x.double(), y.double())]) for x, y in ((k, v), swapped)]
    assert_no_worse_than(*same, same[0])
    other = [sighted.write(sighted.start(1), [(x.double(), y.double())], **rope) for x, y in ((k, v), swapped)]
    assert not torch.allclose(*other)


@torch.no_grad()
def test_float32_state_of_a_bf16_model_is_no_worse_than_a_bf16_state():
    memory = EvolvingMemory(tiny()).bfloat16()
    oracle = EvolvingMemory(memory.config).double()
    oracle.load_state_dict(memory.state_dict())
    narrow, wide, exact = memory.start(1), memory.start(1, dtype=torch.float32), oracle.start(1)
    for _ in range(20):
        k, v = evicted(dtype=torch.bfloat16)
        narrow, wide = memory.write(narrow, [(k, v)]), memory.write(wide, [(k, v)])
        exact = oracle.write(exact, [(k.double(), v.double())])
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert_no_worse_than(wide.bfloat16(), narrow, exact)
    for state in (narrow, wide):
        assert [x.dtype for x in memory.read(state)] == [torch.bfloat16] * 2


def test_float32_state_keeps_what_a_bf16_state_rounds_away():
    memory = EvolvingMemory(tiny(gate_bias=12.0)).bfloat16()  # keeps all but 6e-6 of the state
    torch.nn.init.zeros_(memory.gate_linear.weight)
    for dtype, moves in ((torch.float32, True), (torch.bfloat16, False)):
        state = memory.start(1, dtype=dtype) + 1
        assert (not torch.equal(memory.write(state, [evicted(dtype=torch.bfloat16)]), state)) == moves


def test_trains_under_autocast():
    memory = EvolvingMemory(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = memory.write(memory.write(memory.start(1), [evicted()]), [evicted(dtype=torch.bfloat16)])
        k, v = memory.read(state)
    assert state.dtype == torch.float32
    (k.float().square().sum() + v.float().square().sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in memory.parameters())


@pytest.mark.parametrize(
    ("groups", "layers", "expected"),
    [(1, 3, [0, 0, 0]), (3, 3, [0, 1, 2]), (3, 8, [0, 0, 1, 1, 2, 2, 2, 2]), (2, 5, [0, 0, 1, 1, 1])],
)
def test_layers_share_groups_in_order_and_the_last_takes_the_remainder(groups, layers, expected):
    config = tiny(groups=groups)
    assert [config.group_of(i, layers) for i in range(layers)] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 25}, "width 25 is no multiple of 2 heads"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"write_every": 0}, "write_every must be at least 1, got 0"),
        ({"init_range": -1.0}, "init_range is a standard deviation, got -1.0"),
        ({"width": 8, "positions": True}, "head_dim must be even and >= 6"),
    ],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"state": torch.zeros(1, 1, 5, 24)}, r"state is \(1, 1, 5, 24\), this memory's is \(1, 1, 6, 24\)"),
        ({"sink_anchor": True}, {}, "sink_anchor is True, sink given: False"),
        ({}, {"sink": (torch.zeros(1, 3, 2, 12),) * 2}, "sink_anchor is False, sink given: True"),
        ({"positions": True}, {}, r"positions is True, tables given: \[\]"),
        ({}, {"k_rope": []}, r"positions is False, tables given: \['k_rope'\]"),
    ],
)
def test_write_rejects(options, arguments, message):
    memory = EvolvingMemory(tiny(**options))
    with pytest.raises(ValueError, match=message):
        memory.write(**{"state": memory.start(1), "segments": [evicted()], **arguments})


def test_rejects_what_has_no_group_and_a_state_narrower_than_the_weights():
    with pytest.raises(ValueError, match="layer 3 is not one of 3 layers"):
        tiny().group_of(3, 3)
    with pytest.raises(ValueError, match="4 memory groups need at least as many layers, the model has 3"):
        tiny(groups=4).group_of(0, 3)
    with pytest.raises(ValueError, match=r"a torch\.bfloat16 state would round torch\.float32 weights"):
        EvolvingMemory(tiny()).start(1, dtype=torch.bfloat16)


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_the_gate_is_the_share_that_a_write_keeps(groups):
    """With the proposal made nothing, what is left of the state is the gate times the state."""
    memory = EvolvingMemory(MemoryConfig(width=24, heads=2, frames=1, tokens_per_frame=4, groups=groups))
    for connector in memory._all("connector_proj"):
        torch.nn.init.zeros_(connector[3].weight)
    for linear in memory._all("gate_linear"):
        torch.nn.init.normal_(linear.weight)
    state = torch.randn(groups, 2, 4, 24)
    segments = [(torch.randn(2, 12, 2, 12), torch.randn(2, 12, 2, 12))]
    gate = memory.gate(state, segments)
    assert gate.shape == state.shape
    assert gate.std() > 0.05
    assert_golden(memory.write(state, segments), gate * state)


def test_gates_that_are_none():
    settings = MemoryConfig(width=24, heads=2, frames=1, tokens_per_frame=4, frozen=True)
    state = torch.randn(1, 2, 4, 24)
    assert_same_bits(EvolvingMemory(settings).gate(state, []), torch.ones_like(state))
    with pytest.raises(ValueError, match="has no gate"):
        EvolvingMemory(MemoryConfig(width=24, heads=2, frames=1, tokens_per_frame=4, residual=True)).gate(state, [])
