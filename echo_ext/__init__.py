"""Streaming-video attention and evolving memory: ring, RoPE, three-tier attention, memory write; kernels or PyTorch."""

from echo_ext._native import build_info
from echo_ext.attention import frame_shift, padded_attention, stream_attention
from echo_ext.gate import gate_blend
from echo_ext.linear import linear
from echo_ext.memory import WriteGate, WriteLayer, memory_write, memory_xattn
from echo_ext.norm import gated_add, gated_modulate, modulate, rms_norm
from echo_ext.ring import Evicted, ring_append, ring_evict
from echo_ext.rope import axis_pairs, frame_table, grid_table, rope_rotate

__all__ = [
    "Evicted",
    "WriteGate",
    "WriteLayer",
    "axis_pairs",
    "build_info",
    "frame_shift",
    "frame_table",
    "gate_blend",
    "gated_add",
    "gated_modulate",
    "grid_table",
    "linear",
    "memory_write",
    "memory_xattn",
    "modulate",
    "padded_attention",
    "ring_append",
    "ring_evict",
    "rms_norm",
    "rope_rotate",
    "stream_attention",
]
__version__ = "0.1.0"
