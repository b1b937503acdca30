"""Attention of one block over sink, memory and ring: kernels, libraries, reference; before and after ids saturate."""

import pytest
import torch

import echo_ext
from echo_ext import _attention
from echo_ext.attention import frame_shift, shift_queries, stream_attention

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
# Queries and keys of three frames, a ring of nine: (B, Tq, (sink, memory, ring), H, d).
GEOMETRIES = {
    "official": (1, 4680, (4680, 4680, 14040), 12, 128),
    "tiny": (1, 48, (48, 48, 144), 2, 64),
}


def arguments(geometry, ids):
    """What the op gets, or a skip that says why it can't be timed here."""
    if geometry == "official" and not GPU:
        pytest.skip(f"official is for GPUs: {echo_ext.build_info()['why_no_kernels']}")
    B, Tq, (sink, memory, ring), H, d = GEOMETRIES[geometry]

    def draw(tokens):
        return torch.randn(B, tokens, H, d, device=DEVICE).to(DTYPE)

    keys, values = draw(sink + ring), draw(sink + ring)
    if ids == "saturated":  # the query is turned for sink and memory
        held = {"sink": (keys[:, :sink], values[:, :sink]), "ring": (keys[:, sink:], values[:, sink:])}
        shift = frame_shift(18, 345_600, d, device=DEVICE)
    else:  # one frame of reference: sink and ring are one run of slots
        held, shift = {"ring": (keys, values)}, None
    return {"q": draw(Tq), **held, "memory": (draw(memory), draw(memory)), "shift": shift}


def cost(q, shift, **tiers):
    """Bytes that must move and operations that must be done."""
    B, Tq, H, d = q.shape
    keys = sum(k.shape[1] for k, _ in tiers.values())
    return {"moved": 2 * B * (Tq + keys) * H * d * q.element_size(), "flops": 4 * B * H * Tq * keys * d}


def cudnn_on_a_copy(q, shift, **tiers):
    """The best of the library with what it needs: one dense sequence of keys. Keys are turned back, not the query."""
    if shift is not None:
        back = shift * shift.new_tensor([1.0, -1.0])
        tiers = {tier: (k if tier == "ring" else shift_queries(k, back), v) for tier, (k, v) in tiers.items()}
    k, v = (torch.cat(x, 1).transpose(1, 2) for x in zip(*tiers.values(), strict=True))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


@pytest.mark.parametrize("backend", ["reference", "library", "kernel_cpu", "kernel_sm80", "kernel_sm90"])
@pytest.mark.parametrize("ids", ["first", "saturated"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_stream_attention(bench, geometry, ids, backend):
    args = arguments(geometry, ids)
    tiers = [(tier, *args.get(tier, (None, None))) for tier in ("sink", "memory", "ring")]
    price = cost(**args)
    try:
        _attention.choose(backend, _attention.inputs(args["q"], args["shift"], tiers, 1.0))
    except RuntimeError as reason:
        pytest.skip(str(reason))
    bench(stream_attention, args.pop("q"), **args, backend=backend, **price)


@pytest.mark.parametrize("ids", ["first", "saturated"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_cudnn(bench, geometry, ids):
    """Copies of keys and their rotation are timed with it: without them it can't see the three tiers at all."""
    args = arguments(geometry, ids)
    if not GPU:
        pytest.skip("cuDNN is for GPUs")
    price = cost(**args)
    bench(cudnn_on_a_copy, args.pop("q"), **args, **price)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def bench_cudnn_alone(bench, geometry):
    """The same products on keys that already lie in one piece: what there is to reach."""
    q, _, ring, memory = (arguments(geometry, "first")[name] for name in ("q", "shift", "ring", "memory"))
    if not GPU:
        pytest.skip("cuDNN is for GPUs")
    k, v = (torch.cat(x, 1) for x in zip(ring, memory, strict=True))
    bench(cudnn_on_a_copy, q, None, ring=(k, v), **cost(q, None, ring=(k, v)))
