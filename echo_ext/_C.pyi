from echo_ext._native import TensorTuple

cuda_version: str | None
cuda_archs: str

def driver_error() -> str: ...
def device_info() -> tuple[str, ...]: ...
def describe(x: TensorTuple) -> str: ...
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
    slots: list[list[int]],
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
