"""The kernels of stream_attention on the CPU: float64 oracle over shapes, layouts and schedules, extremes, refusals."""

import pytest
import torch
from attention_cases import TIERS, Case, check, draw, one_softmax, positional, random_case
from numerics import assert_no_worse_than, assert_same_bits

from echo_ext import _attention, _native
from echo_ext.attention import frame_shift, stream_attention, stream_attention_ref

BACKENDS = ["kernel_sm80", "kernel_sm90"]
HALF = {"bf16": torch.bfloat16, "f16": torch.float16}
# More tiles than blocks, and keys enough that the blocks share the remainder.
SHARED = [
    ("kernel_sm80", Case(1, 20, (0, 0, 700), 3, 16), torch.bfloat16),
    ("kernel_sm80", Case(2, 9, (130, 65, 600), 1, 16, "own", 3), torch.float16),
    ("kernel_sm80", Case(1, 129, (3, 300, 900), 1, 16, "shared", 4), torch.float32),
    ("kernel_sm80", Case(1, 3, (64, 64, 512), 1, 128, "shared", 2), torch.bfloat16),
    ("kernel_sm90", Case(1, 65, (200, 180, 1400), 3, 64, "shared", 2), torch.bfloat16),
    ("kernel_sm90", Case(2, 2, (3, 0, 1500), 2, 128, "own", 3), torch.float16),
]
SMALL = Case(2, 5, (3, 2, 7), 3, 64)


@pytest.mark.parametrize("seed", range(54))
def test_sm80_matches_one_softmax(seed, emulated):
    check("kernel_sm80", *random_case("kernel_sm80", seed))
    assert emulated.counters().bank_conflicts == 0


@pytest.mark.parametrize("seed", range(32))
def test_sm90_matches_one_softmax(seed, emulated):
    check("kernel_sm90", *random_case("kernel_sm90", seed))


@pytest.mark.parametrize(("backend", "case", "dtype"), SHARED, ids=str)
def test_blocks_share_tiles(backend, case, dtype, emulated):
    check(backend, case, dtype)
    assert emulated.counters().launches == 2


def skip_unless_it_runs(backend, **args):
    """A skip that says why a backend can't take this query here."""
    try:
        _attention.choose(backend, _attention.inputs(args["q"], args["shift"], [("ring", *args["ring"])], 1.0))
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_matches_one_softmax_on_a_gpu(backend, seed):
    case, dtype, layouts = random_case(backend, seed)
    skip_unless_it_runs(backend, **draw(Case(1, 1, (0, 0, 1), 1, case.d, ""), dtype, device="cuda"))
    check(backend, case, dtype, layouts, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*BACKENDS, "library"])
def test_official_geometry_on_a_gpu(backend):
    args = draw(Case(1, 4680, (4680, 4680, 14040), 12, 128), torch.bfloat16, device="cuda")
    skip_unless_it_runs(backend, **args)
    out = stream_attention(**args, backend=backend)
    rows = [0, 1, 127, 128, 2339, 4607, 4608, 4679]
    some = {**args, "q": args["q"][:, rows]}
    exact, _ = one_softmax(**some)
    budget, _ = stream_attention_ref(*positional(some))
    assert_no_worse_than(out[:, rows], budget, exact)


@pytest.mark.sanitizers
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tile_and_its_tails(backend, emulated):
    check(backend, Case(1, 3, (5, 0, 70), 2, 64), torch.bfloat16)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_threads_does_not_matter(backend, order, emulated):
    emulated.configure(order)
    check(backend, Case(1, 129, (65, 3, 193), 1, 64), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_in_every_order_of_threads(backend, emulated):
    args = draw(Case(1, 65, (65, 3, 393), 1, 64), torch.bfloat16)
    outs = []
    for seed in range(2):
        emulated.configure(seed=seed)
        outs.append(stream_attention(**args, backend=backend))
    assert_same_bits(*outs)


@pytest.mark.parametrize("winner", TIERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_survives_scores_that_overflow_exp(backend, winner, emulated):
    args = draw(SMALL, torch.bfloat16)
    for tier in TIERS:
        k, v = args[tier]
        args[tier] = k * (-64 if tier == winner else 64), v
    args["q"] = args["q"] * 64
    exact, _ = one_softmax(**args)
    assert_no_worse_than(stream_attention(**args, backend=backend), exact.bfloat16(), exact)


@pytest.mark.parametrize("size", [512, -512])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_survives_scores_all_far_from_zero(backend, size, emulated):
    args = draw(SMALL._replace(shift=""), torch.bfloat16)
    for tier in TIERS:
        args[tier] = args[tier][0] + size, args[tier][1]
    exact, _ = one_softmax(**args)
    budget, _ = stream_attention_ref(*positional(args))
    assert_no_worse_than(stream_attention(**args, backend=backend), budget, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_average_all_values(backend, emulated):
    args = draw(SMALL, torch.float16)
    args["q"] = torch.zeros_like(args["q"])
    exact = torch.cat([args[tier][1].double() for tier in TIERS], 1).mean(1, keepdim=True).expand_as(args["q"])
    assert_no_worse_than(stream_attention(**args, backend=backend), exact.half(), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_hands_over_its_value(backend, emulated):
    args = draw(Case(1, 9, (0, 1, 0), 2, 64), torch.bfloat16)
    value = args["memory"][1].expand_as(args["q"])
    assert_same_bits(stream_attention(**args, backend=backend), value.contiguous())


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_takes_broadcast_heads_no_queries_and_any_scale(backend, emulated):
    args = draw(Case(1, 4, (0, 0, 9), 3, 64), torch.bfloat16)
    exact, _ = one_softmax(**args, scale=0.9)
    assert_no_worse_than(stream_attention(**args, scale=0.9, backend=backend), exact.bfloat16(), exact)
    assert stream_attention(**{**args, "q": args["q"][:, :0]}, backend=backend).shape == (1, 0, 3, 64)
    args["ring"] = tuple(x[:, :, :1].expand_as(x) for x in args["ring"])
    exact, _ = one_softmax(**args)
    assert_no_worse_than(stream_attention(**args, backend="kernel"), exact.bfloat16(), exact)


def test_kernel_means_the_better_one_that_can_run(emulated, monkeypatch):
    ran = []
    run = _attention.run
    monkeypatch.setattr(_attention, "run", lambda name, x: ran.append(name) or run(name, x))
    for dtype, d in [(torch.bfloat16, 64), (torch.float32, 64), (torch.float16, 16), (torch.float16, 128)]:
        args = draw(Case(1, 2, (0, 0, 3), 1, d), dtype)
        stream_attention(**args, backend="kernel")
        stream_attention(**args)
    assert ran == [x for x in ("kernel_sm90", "kernel_sm80", "kernel_sm80", "kernel_sm90") for _ in range(2)]


def test_library_agrees_with_the_kernel():
    args = draw(SMALL, torch.float32)
    exact, _ = one_softmax(**args)
    assert_no_worse_than(stream_attention(**args, backend="library"), exact.float(), exact)


@pytest.mark.parametrize("backend", [*BACKENDS, "library"])
def test_gradients_through_the_kernel_are_the_references(backend, emulated):
    grads = []
    for way in (backend, "reference"):
        args = draw(SMALL, torch.bfloat16)
        torch.manual_seed(1)
        leaves = [args["q"].requires_grad_(), *(x.requires_grad_() for tier in TIERS for x in args[tier])]
        out = stream_attention(**args, backend=way)
        grads.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
        torch.manual_seed(0)
    assert emulated.counters().launches == (backend != "library")
    for x, y in zip(*grads, strict=True):
        assert_no_worse_than(x, y, y.double())


def test_kernel_op_registration(emulated):
    for dtype in (torch.bfloat16, torch.float32):
        torch.library.opcheck(torch.ops.echo_ext.stream_attention.default, positional(draw(SMALL, dtype)))
    assert emulated.counters().launches > 0


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_kernel_compiles_without_graph_break(backend, emulated):
    args = draw(SMALL, torch.bfloat16)
    compiled = torch.compile(lambda a: stream_attention(**a, backend=backend), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(args), stream_attention(**args, backend=backend))
    assert emulated.counters().launches == 2


def refused(**change):
    args = draw(Case(1, 4, (0, 0, 9), 2, 64, ""), torch.bfloat16)
    return {**args, **change}


NARROW = torch.zeros(1, 9, 2, 65, dtype=torch.bfloat16)[..., :64]
PLAIN = torch.zeros(1, 9, 2, 64, dtype=torch.bfloat16)
ODD = torch.zeros(1, 9, 2, 6)


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("kernel", {"q": ODD, "ring": (ODD, ODD)}, "head dim 6 is not built, only 16, 64 and 128"),
        ("kernel", {"q": PLAIN.double(), "ring": (PLAIN.double(),) * 2}, "dtype torch.float64 is not built"),
        (
            "kernel",
            {"ring": (NARROW, PLAIN)},
            r"ring keys has rows that are not aligned to 16 bytes: strides \(1170, 130",
        ),
        ("kernel", {"ring": (PLAIN, NARROW)}, "ring values has rows that are not aligned to 16 bytes"),
        ("kernel", {"q": NARROW}, "q has rows that are not aligned to 16 bytes"),
        ("kernel", {"scale": 0.0}, "scale 0.0 is not above 0"),
        ("kernel_sm80", {"scale": -1.0}, "scale -1.0 is not above 0"),
        ("kernel_sm90", {"q": PLAIN.float(), "ring": (PLAIN.float(),) * 2}, "float32 has no tensor core path"),
        (
            "kernel_sm90",
            {"q": PLAIN[..., :16], "ring": (PLAIN[..., :16],) * 2},
            "head dim 16 is not built, only 64 and 128",
        ),
        ("kernel_sm90", {"ring": (PLAIN[:, :1].expand_as(PLAIN), PLAIN)}, "ring keys repeats memory, which TMA can't"),
    ],
)
def test_what_a_kernel_cannot_take_is_left_to_another(backend, change, reason, emulated):
    args = refused(**change)
    with pytest.raises(RuntimeError, match=f"stream_attention: {backend} can't run: {reason}"):
        stream_attention(**args, backend=backend)
    assert torch.isfinite(stream_attention(**args)).all()


def test_shift_that_no_kernel_reads(emulated):
    args = draw(SMALL, torch.bfloat16)
    for shift, reason in [
        (args["shift"].double(), "shift is torch.float64"),
        (torch.stack([args["shift"]] * 2, -1)[..., 0], "shift is not dense in its last two dims"),
    ]:
        with pytest.raises(RuntimeError, match=f"kernel can't run: {reason}"):
            stream_attention(**{**args, "shift": shift}, backend="kernel")


def test_unaligned_memory_is_seen_when_the_op_runs(emulated):
    unaligned = torch.zeros(1, 9, 2, 72, dtype=torch.bfloat16)[..., 1:65].normal_()
    args = refused(q=unaligned)
    with pytest.raises(RuntimeError, match="kernel_sm80 can't run: q is not aligned to 16 bytes"):
        stream_attention(**args, backend="kernel_sm80")
    exact, _ = one_softmax(**args)
    assert_no_worse_than(stream_attention(**args), exact.bfloat16(), exact)
    assert emulated.counters().launches == 0


def test_what_a_device_would_run(monkeypatch, emulated):
    monkeypatch.setattr(_native, "emulated", lambda: False)
    monkeypatch.setattr(_native, "capability", lambda device: ((8, 0), (9, 0))[device])
    assert _attention.on_device(0) == "kernel_sm80, as this is sm_80, not sm_90"
    assert _attention.on_device(1).startswith("kernel_sm90 for float16 and bfloat16 with head dim 64 or 128")


def launch(**change):
    q, k, out = torch.zeros(2, 5, 3, 16), torch.zeros(2, 7, 3, 16), torch.zeros(2, 5, 3, 16)
    given = {
        "sm90": False,
        "q": q,
        "shift": frame_shift(1, 0, 16),
        "runs": [(k, k)],
        "turned": 1,
        "scale": 0.25,
        "out": out,
        "lse": torch.zeros(2, 3, 5),
        "workspace": None,
        "processors": 1,
        "stream": (0, 0),
        **change,
    }
    given["runs"] = [tuple(_native.view(x) for x in pair) for pair in given["runs"]]
    views = {name: _native.view(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    _native.module().stream_attention_fwd(**views)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 48)}, r"q must be \(-1, -1, -1, -1\), .* got \(2, 5, 48\)"),
        ({"out": torch.zeros(2, 5, 3, 8)}, r"out must be \(2, 5, 3, 16\)"),
        ({"out": torch.zeros(2, 5, 3, 16).half()}, "out must be float32, got float16"),
        ({"out": torch.zeros(2, 3, 5, 16).transpose(1, 2)}, "out must be contiguous, got strides"),
        ({"q": torch.zeros(2, 5, 3, 18)[..., 2:]}, "q must have rows aligned to 16 bytes"),
        ({"runs": []}, "there must be 1 to 3 runs of keys, got 0"),
        ({"runs": [(torch.zeros(2, 7, 3, 16),) * 2] * 4}, "there must be 1 to 3 runs of keys, got 4"),
        ({"runs": [(torch.zeros(2, 0, 3, 16),) * 2]}, "a run of keys must have 1 to 2147482623 tokens, got 0"),
        ({"runs": [(torch.zeros(2, 7, 2, 16),) * 2]}, r"k must be \(2, -1, 3, 16\)"),
        ({"runs": [(torch.zeros(2, 7, 3, 16), torch.zeros(2, 6, 3, 16))]}, r"v must be \(2, 7, 3, 16\)"),
        ({"runs": [(torch.zeros(2, 7, 3, 16).half(),) * 2]}, "k and v must be float32, got float16"),
        ({"runs": [(torch.zeros(2, 7, 3, 18)[..., :16],) * 2]}, "k and v must have rows aligned to 16 bytes"),
        ({"turned": 2}, "turned must be 0 to 1, got 2"),
        ({"scale": 0.0}, "scale must be above 0, got 0"),
        ({"processors": 0}, "processors must be positive, got 0"),
        ({"shift": torch.zeros(1, 3, 2)}, r"shift must be \(-1, 4, 2\)"),
        ({"shift": torch.zeros(3, 4, 2)}, "shift has 3 rows for a batch of 2"),
        ({"shift": torch.zeros(1, 4, 2).half()}, "shift must be float32, got float16"),
        ({"lse": torch.zeros(2, 5, 3)}, r"lse must be \(2, 3, 5\)"),
        ({"lse": torch.zeros(2, 5, 3).mT}, "lse must have a contiguous last dim"),
        ({"sm90": True}, "dtype must be float16 or bfloat16 on Hopper, got code 0"),
        (
            {"runs": [(torch.zeros(2, 700, 3, 16),) * 2], "processors": 2},
            "these shapes need a workspace of [0-9]+ floats",
        ),
        (
            {"runs": [(torch.zeros(2, 700, 3, 16),) * 2], "workspace": torch.zeros(9), "processors": 2},
            r"workspace must be \([0-9]+,\), .* got \(9,\)",
        ),
        ({"q": torch.zeros(2, 5, 3, 8), "out": torch.zeros(2, 5, 3, 8)}, r"k must be \(2, -1, 3, 8\)"),
    ],
)
def test_binding_rejects_what_python_missed(change, message, emulated):
    with pytest.raises(ValueError, match=f"echo_ext: {message}"):
        launch(**change)


def test_binding_writes_output_without_lse(emulated):
    q, k, out = torch.randn(2, 5, 3, 16), torch.randn(2, 7, 3, 16), torch.full((2, 5, 3, 16), float("nan"))
    launch(q=q, runs=[(k, k)], shift=None, out=out, lse=None)
    exact, _ = one_softmax(q, ring=(k, k))
    assert_no_worse_than(out, exact.float(), exact)
