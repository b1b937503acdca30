"""The CPU kernel of stream_attention: every instruction set against one float64 softmax, and when it is chosen."""

import itertools

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, needs_kernels
from numerics import assert_no_worse_than, assert_same_bits
from test_attention import TIERS, make, one_softmax, positional, zeros

from echo_ext import _cpu, _native, build_info
from echo_ext.attention import frame_shift, padded_attention, stream_attention, stream_attention_ref

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Around the sizes the kernel thinks in: 6 rows, 8 or 16 lanes, panels of 16 or 64 keys, tiles of 64 or 128, 420 rows.
SHAPES = [
    (1, 1, (0, 0, 1), 1, 16),
    (2, 5, (3, 2, 7), 3, 16),
    (1, 6, (16, 15, 17), 2, 32),
    (1, 7, (64, 63, 65), 1, 48),
    (3, 13, (0, 128, 127), 2, 64),
    (1, 12, (129, 0, 257), 1, 80),
    (1, 12, (12, 12, 36), 12, 128),
    (1, 9, (5, 40, 97), 2, 256),
    (1, 427, (0, 0, 33), 1, 16),
]


def shape_id(shape):
    B, Tq, Tk, H, d = shape
    return f"B{B}-Tq{Tq}-Tk{'+'.join(map(str, Tk))}-H{H}-d{d}"


def run(args, isa="", *, scale=None):
    """Output and LSE of the kernel itself."""
    q = args["q"]
    tiers = [args.get(tier) for tier in TIERS]
    return _cpu.attention(q, args.get("shift"), *tiers, scale or q.shape[-1] ** -0.5, want_lse=True, isa=isa)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_matches_one_softmax_over_all_tiers(isa, shape, dtype, strided):
    args = make(shape, dtype, strided=strided)
    exact, exact_lse = one_softmax(**args)
    out, lse = run(args, isa)
    assert out.is_contiguous()
    assert_no_worse_than(out, stream_attention_ref(*positional(args))[0], exact)
    assert_no_worse_than(lse, exact_lse.to(dtype).float(), exact_lse)


@pytest.mark.parametrize("shift", [False, True], ids=["one frame of reference", "shifted"])
@pytest.mark.parametrize("tiers", [s for n in (1, 2) for s in itertools.combinations(TIERS, n)], ids="+".join)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_any_tier_may_be_absent(isa, tiers, shift):
    args = make((2, 5, (20, 70, 33), 3, 16), tiers=tiers, shift=shift)
    exact, _ = one_softmax(**args)
    assert_no_worse_than(run(args, isa)[0], exact.float(), exact)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_stream_of_a_batch_can_have_its_own_shift(isa):
    args = make((2, 5, (20, 7, 33), 3, 16))
    args["shift"] = frame_shift(torch.tensor([18, 18]), torch.tensor([18, 345_600]), 16)
    out, _ = run(args, isa)
    for b in range(2):
        row = {tier: tuple(x[b : b + 1] for x in args[tier]) for tier in TIERS}
        alone, _ = run({"q": args["q"][b : b + 1], **row, "shift": args["shift"][b : b + 1]}, isa)
        assert_same_bits(out[b : b + 1], alone)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_shift_may_be_strided(isa):
    args = make((2, 5, (20, 70, 33), 3, 16))
    expected = run(args, isa)
    wide = torch.full((1, 4, 4), float("nan"))
    wide[..., ::2] = args["shift"]
    assert_same_bits(run(args | {"shift": wide[..., ::2]}, isa), expected)


@needs_kernels
def test_a_shift_that_turns_nothing_is_not_looked_at():
    args = make((2, 5, (20, 70, 33), 3, 16), tiers=("ring",))
    plain = stream_attention(**args | {"shift": None}, backend="kernel_cpu")
    assert_same_bits(stream_attention(**args | {"shift": args["shift"].double()}, backend="kernel_cpu"), plain)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_one_row_of_keys_can_serve_a_batch(isa):
    args = make((2, 5, (0, 0, 33), 3, 16), tiers=("ring",), shift=False)
    args["ring"] = tuple(x[:1].expand(2, -1, -1, -1) for x in args["ring"])
    exact, _ = one_softmax(**args)
    assert_no_worse_than(run(args, isa)[0], exact.float(), exact)


def rising(order, dtype, d=32, keys=300):
    """One query whose scores rise, fall or jump by far more than the kernel's slack from key to key."""
    q = torch.ones(1, 7, 1, d, dtype=dtype) * torch.linspace(0.1, 4, 7).to(dtype)[:, None, None]
    size = torch.arange(keys, dtype=torch.float64) / 8
    size = {"rising": size, "falling": size.flip(0), "jumping": size[torch.randperm(keys)]}[order]
    k = size.view(1, -1, 1, 1).expand(1, -1, 1, d).to(dtype)
    return {"q": q, "ring": (k, torch.randn(1, keys, 1, d).to(dtype)), "shift": None}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("order", ["rising", "falling", "jumping"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_scores_may_rise_from_tile_to_tile(isa, order, dtype):
    args = rising(order, dtype)
    exact, exact_lse = one_softmax(**args)
    out, lse = run(args, isa)
    assert_no_worse_than(out, stream_attention_ref(*positional(args))[0], exact)
    assert_no_worse_than(lse, exact_lse.to(dtype).float(), exact_lse)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("winner", [0, 63, 64, 127, 128, 299])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_key_that_takes_all_gives_exactly_its_value(isa, winner, dtype):
    k = torch.zeros(1, 300, 2, 32, dtype=dtype)
    k[:, winner] = 30
    v = torch.randn(1, 300, 2, 32).to(dtype)
    out, _ = run({"q": torch.full((1, 8, 2, 32), 10.0, dtype=dtype), "ring": (k, v)}, isa)
    assert_same_bits(out, v[:, winner : winner + 1].expand_as(out).contiguous())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_zero_queries_average_all_values(isa, dtype):
    args = make((2, 5, (30, 20, 70), 3, 16), dtype)
    args["q"] = torch.zeros_like(args["q"])
    exact = torch.cat([args[tier][1].double() for tier in TIERS], 1).mean(1, keepdim=True).expand_as(args["q"])
    assert_no_worse_than(run(args, isa)[0], exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [1e3, -1e3])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_survives_scores_all_far_from_zero(isa, size, dtype):
    args = make((2, 5, (30, 20, 70), 3, 16), dtype, shift=False)
    args["q"] = args["q"].abs() + 1
    for tier in TIERS:
        args[tier] = args[tier][0] + size, args[tier][1]
    exact, _ = one_softmax(**args)
    assert_no_worse_than(run(args, isa)[0], stream_attention_ref(*positional(args))[0], exact)


@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_nan_comes_out_where_it_went_in(isa, place):
    args = make((1, 8, (0, 0, 70), 2, 32), tiers=("ring",), shift=False)
    {"q": args["q"], "k": args["ring"][0], "v": args["ring"][1]}[place][0, 3, 1, 5] = float("nan")
    spoilt = run(args, isa)[0].isnan()
    expected = torch.zeros(1, 8, 2, 32, dtype=torch.bool)
    expected[:, 3 if place == "q" else slice(None), 1, 5 if place == "v" else slice(None)] = True
    assert_same_bits(spoilt, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_number_of_threads_changes_no_bit(isa, dtype, threads):
    args = make((2, 200, (100, 90, 130), 2, 64), dtype)
    threads(1)
    alone = run(args, isa)
    for count in (2, 3):
        threads(count)
        for _ in range(3):
            assert_same_bits(run(args, isa), alone)


@pytest.mark.parametrize("scale", [0.02, 2.5])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_scale_can_be_chosen(isa, scale):
    args = make((2, 5, (30, 20, 70), 3, 16))
    exact, exact_lse = one_softmax(**args, scale=scale)
    out, lse = run(args, isa, scale=scale)
    assert_no_worse_than(out, stream_attention_ref(*positional(args)[:-1], scale)[0], exact)
    assert_no_worse_than(lse, exact_lse.float(), exact_lse)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("count", [2, 400])
@pytest.mark.parametrize("keys", [1, 2, 16, 17, 64, 65, 128, 130])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_last_key_can_count_more_than_once(isa, keys, count, dtype):
    q, k, v = (torch.randn(2, n, 3, 32).to(dtype) for n in (7, keys, keys))
    repeats = torch.tensor([1] * (keys - 1) + [count])
    whole = {"q": q, "ring": tuple(x.repeat_interleave(repeats, dim=1) for x in (k, v)), "shift": None}
    exact, exact_lse = one_softmax(**whole)
    out, lse = _cpu.attention(q, None, None, None, (k, v), 32**-0.5, last_count=count, want_lse=True, isa=isa)
    assert_no_worse_than(out, stream_attention_ref(*positional(whole))[0], exact)
    assert_no_worse_than(lse, exact_lse.to(dtype).float(), exact_lse)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_only_the_ring_s_last_key_counts_more_than_once(isa):
    args = make((2, 5, (20, 70, 33), 3, 16))
    k, v = args["ring"]
    whole = args | {"ring": tuple(torch.cat([x, x[:, -1:].expand(-1, 4, -1, -1)], dim=1) for x in (k, v))}
    exact, _ = one_softmax(**whole)
    tiers = args["sink"], args["memory"], (k, v)
    out, _ = _cpu.attention(args["q"], args["shift"], *tiers, 0.25, last_count=5, isa=isa)
    assert_no_worse_than(out, exact.float(), exact)


def test_no_query_is_no_work():
    args = make((2, 0, (3, 2, 7), 3, 16))
    assert stream_attention(**args).shape == (2, 0, 3, 16)


@pytest.mark.parametrize(("tokens", "heads"), [(0, 3), (5, 0)], ids=["no query", "no head"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_kernel_takes_no_query_and_no_head(isa, tokens, heads):
    out, lse = run(make((2, tokens, (3, 2, 7), heads, 16)), isa)
    assert (out.shape, lse.shape) == ((2, tokens, heads, 16), (2, heads, tokens))


@pytest.fixture
def kernel_calls(monkeypatch):
    """Queries that the kernel was given."""
    calls, plain = [], _cpu.attention
    monkeypatch.setattr(_cpu, "attention", lambda q, *rest, **options: calls.append(q) or plain(q, *rest, **options))
    return calls


@needs_kernels
@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, not _native.cpu_has_amx()),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float64}, False),
        ({"d": 24}, False),
        ({"d": 272}, False),
        ({"scale": -0.3}, False),
        ({"backend": "reference"}, False),
        ({"requires_grad": True}, False),
    ],
    ids=str,
)
def test_the_kernel_is_taken_where_it_can_be(change, taken, kernel_calls):
    options = {name: change[name] for name in ("scale", "backend") if name in change}
    shape = (2, 5, (3, 2, 7), 3, change.get("d", 16))
    args = make(shape, change.get("dtype", torch.float32), requires_grad=change.get("requires_grad", False))
    out = stream_attention(**args, **options)
    assert len(kernel_calls) == taken
    exact, _ = one_softmax(**args, scale=options.get("scale"))
    assert_no_worse_than(out.detach(), exact.to(out.dtype), exact)


@needs_kernels
def test_auto_leaves_bfloat16_to_amx_and_asking_by_name_does_not(kernel_calls, monkeypatch):
    args = make((2, 5, (3, 2, 7), 3, 16), torch.bfloat16)
    padded = args["q"], *args["ring"], 2
    for amx in (False, True):
        monkeypatch.setattr(_native, "cpu_has_amx", lambda amx=amx: amx)
        kernel_calls.clear()
        stream_attention(**args)
        padded_attention(*padded)
        assert len(kernel_calls) == (0 if amx else 2)
        stream_attention(**args, backend="kernel_cpu")
        assert len(kernel_calls) == (1 if amx else 3)


def test_build_info_names_the_instruction_set_or_the_reason():
    info = build_info()["cpu"]
    assert list(info) == ["float32", "float16", "bfloat16"]
    assert info["float16"].startswith("PyTorch: ")
    reason = _native.why_no_cpu_kernels(torch.bfloat16)
    assert info["bfloat16"] in ([f"PyTorch: {reason}"] if reason else ["avx2", "avx512", "avx512_bf16"])


def views(q=(2, 5, 3, 16), k=(2, 7, 3, 16), v=(2, 7, 3, 16), out=(2, 5, 3, 16), dtype=torch.float32, **changes):
    """Arguments of the binding, from zeros of these shapes, or as given in ``changes``."""
    view = {
        name: _native.view(torch.zeros(shape, dtype=dtype)) for name, shape in zip("qkvo", (q, k, v, out), strict=True)
    }
    named = {"q": view["q"], "shift": None, "sink": None, "memory": None, "ring": (view["k"], view["v"])}
    return {**named, "out": view["o"], "lse": None, "scale": 1.0, "last_count": 1, "threads": 1, **changes}


def strange(*shape, dtype=torch.float32, step=None):
    x = torch.zeros(shape, dtype=dtype)
    return _native.view(x if step is None else x[..., ::step])


@needs_kernels
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (views(q=(2, 5, 48)), "q must be float32 or bfloat16 of 4 dims, the last one contiguous"),
        (views(dtype=torch.float16), "q must be float32 or bfloat16"),
        (views() | {"q": strange(2, 5, 3, 32, step=2)}, "the last one contiguous"),
        (views(*[(2, 5, 3, 24)] * 4), "head dim must be a multiple of 16 up to 256, got 24"),
        (views(*[(2, 5, 3, 272)] * 4), "head dim must be a multiple of 16 up to 256, got 272"),
        (views(*[(2, 5, 3, 0)] * 4), "head dim must be a multiple of 16 up to 256, got 0"),
        (views(k=(2, 6, 3, 16)), r"ring is float32 \(2, 6, 3, 16\).* and 7 tokens"),
        (views(v=(2, 7, 4, 16)), r"ring is float32 \(2, 7, 4, 16\)"),
        (views(k=(1, 7, 3, 16)), r"ring is float32 \(1, 7, 3, 16\)"),
        (views(out=(2, 4, 3, 16)), r"out is float32 \(2, 4, 3, 16\)"),
        (views() | {"out": strange(2, 5, 3, 16, dtype=torch.bfloat16)}, "out is bfloat16"),
        (views(ring=None), "no tier holds a key"),
        (views(last_count=0), "last_count must be 1, or more where the ring has a last key, got 0"),
        (views(ring=None, last_count=2), "last_count must be 1, or more where the ring has a last key, got 2"),
        (views(scale=0.0), "scale must be above 0, got 0"),
        (views(shift=strange(3, 4, 2)), "shift has 3 rows for a batch of 2"),
        (views(shift=strange(1, 9, 2)), r"shift has more than d / 2 pairs: float32 \(1, 9, 2\)"),
        (views(shift=strange(1, 4, 2, dtype=torch.bfloat16)), "shift must be float32, got bfloat16"),
        (views(shift=strange(1, 4, 4, step=2)), "shift must have a contiguous last dim"),
        (views(shift=_native.view(zeros(1, 8, 2)[:, ::2])), "shift must be contiguous, got strides"),
        (views(lse=strange(2, 5, 3)), r"lse must be \(2, 3, 5\), .* got \(2, 5, 3\)"),
        (views(q=(2, 0, 3, 16), out=(2, 0, 3, 16), lse=strange(2, 3, 5)), r"lse must be \(2, 3, 0\)"),
        (views(isa="sse"), "isa must be avx2, avx512 or avx512_bf16, got sse"),
    ],
)
def test_binding_rejects_what_python_missed(bad, message):
    with pytest.raises(ValueError, match=f"echo_ext: .*{message}"):
        _native.module().stream_attention_cpu(**bad)
