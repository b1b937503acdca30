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
