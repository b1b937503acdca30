from echo_ext._native import TensorTuple

cuda_version: str | None
cuda_archs: str

def driver_error() -> str: ...
def device_info() -> tuple[str, ...]: ...
def describe(x: TensorTuple) -> str: ...
def stream_attention_cpu(
    q: TensorTuple,
    shift: TensorTuple | None,
    sink: tuple[TensorTuple, TensorTuple] | None,
    memory: tuple[TensorTuple, TensorTuple] | None,
    ring: tuple[TensorTuple, TensorTuple] | None,
    out: TensorTuple,
    lse: TensorTuple | None,
    scale: float,
    threads: int,
) -> None: ...
def stream_attention_cpu_isa(dtype: int) -> tuple[str | None, str]: ...
