from echo_ext._native import Stream, TensorTuple

cuda_version: str | None
cuda_archs: str
emulated: bool
with_sm90a: bool

def driver_error() -> str: ...
def device_info() -> tuple[str, ...]: ...
def describe(x: TensorTuple) -> str: ...
def rope_rotate_fwd(
    x: TensorTuple, frame_table: TensorTuple, grid_table: TensorTuple, out: TensorTuple, stream: Stream
) -> None: ...
def stream_attention_workspace(
    dtype: int, q: tuple[int, ...], tokens: list[int], processors: int, sm90: bool
) -> int: ...
def stream_attention_fwd(
    sm90: bool,
    q: TensorTuple,
    shift: TensorTuple | None,
    runs: list[tuple[TensorTuple, TensorTuple]],
    turned: int,
    scale: float,
    out: TensorTuple,
    lse: TensorTuple | None,
    workspace: TensorTuple | None,
    processors: int,
    stream: Stream,
) -> None: ...
def ring_append_fwd(
    q: TensorTuple,
    k: TensorTuple,
    v: TensorTuple,
    q_weight: TensorTuple | None,
    k_weight: TensorTuple | None,
    frame_table: TensorTuple,
    key_frame_table: TensorTuple | None,
    grid_table: TensorTuple,
    slots: TensorTuple,
    ring_k: TensorTuple,
    ring_v: TensorTuple,
    ring_raw: TensorTuple | None,
    eps: float,
    out: TensorTuple,
    stream: Stream,
) -> None: ...
def modulate_fwd(
    x: TensorTuple, shift: TensorTuple, scale: TensorTuple, eps: float, out: TensorTuple, stream: Stream
) -> None: ...
def gated_add_fwd(x: TensorTuple, y: TensorTuple, gate: TensorTuple, sum: TensorTuple, stream: Stream) -> None: ...
def gated_modulate_fwd(
    x: TensorTuple,
    y: TensorTuple,
    gate: TensorTuple | None,
    shift: TensorTuple,
    scale: TensorTuple,
    eps: float,
    sum: TensorTuple,
    out: TensorTuple,
    stream: Stream,
) -> None: ...
def memory_query_fwd(
    q: TensorTuple,
    norm_weight: TensorTuple | None,
    frame_table: TensorTuple | None,
    grid_table: TensorTuple | None,
    eps: float,
    out: TensorTuple,
    stream: Stream,
) -> None: ...
def gate_blend_fwd(
    state: TensorTuple,
    proposal: TensorTuple,
    weight: TensorTuple,
    bias: TensorTuple,
    out: TensorTuple,
    stream: Stream,
) -> None: ...
def cpu_isa(dtype: int) -> str: ...

cpu_has_amx_bf16: bool

def stream_attention_cpu(
    q: TensorTuple,
    shift: TensorTuple | None,
    sink: tuple[TensorTuple, TensorTuple] | None,
    memory: tuple[TensorTuple, TensorTuple] | None,
    ring: tuple[TensorTuple, TensorTuple] | None,
    out: TensorTuple,
    lse: TensorTuple | None,
    scale: float,
    last_count: int,
    threads: int,
    isa: str = "",
) -> None: ...
def ring_append_cpu(
    q: TensorTuple,
    k: TensorTuple,
    v: TensorTuple,
    q_weight: TensorTuple | None,
    k_weight: TensorTuple | None,
    frame_table: TensorTuple,
    key_frame_table: TensorTuple | None,
    grid_table: TensorTuple,
    slots: TensorTuple,
    ring_k: TensorTuple,
    ring_v: TensorTuple,
    ring_raw: TensorTuple | None,
    eps: float,
    out: TensorTuple,
    threads: int,
    isa: str = "",
) -> None: ...
def norm_cpu(
    x: TensorTuple,
    y: TensorTuple | None,
    gate: TensorTuple | None,
    shift: TensorTuple | None,
    scale: TensorTuple | None,
    sum: TensorTuple | None,
    out: TensorTuple | None,
    eps: float,
    centred: bool,
    threads: int,
    isa: str = "",
) -> None: ...
