"""When the memory is written, what it reads then, when a write is seen, and where its keys sit."""

import pytest
import torch
from echo_infinity.cache import Geometry, RingKV
from echo_infinity.config import EchoConfig, ModelConfig, WindowConfig
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.recall import StreamMemory
from numerics import assert_no_worse_than, assert_same_bits
from plain import read, rotate, write

TOKENS = 6  # a frame of 2 x 3
WRAPS = WindowConfig(sink_frames=1, window_frames=9)  # 8 ring slots: every third eviction wraps


class Stream:
    """A cache and a memory, fed with random keys and values; nothing of the model is needed."""

    def __init__(self, window=None, *, layers=2, batch=1, **options):
        settings = {"width": 24, "heads": 2, "frames": 2, "tokens_per_frame": TOKENS, **options}
        self.config = EchoConfig(
            model=ModelConfig(width=24, heads=2, layers=layers, ffn=8, latent_channels=1, text_tokens=1, text_width=1),
            latent_rows=4,
            latent_columns=6,
            window=window or WindowConfig(),
            memory=MemoryConfig(**settings),
        )
        self.module = EvolvingMemory(self.config.memory)
        torch.nn.init.normal_(self.module.query_init if self.config.memory.groups == 1 else self.module.query_inits[0])
        self.geometry, self.cache = Geometry(self.config), RingKV(self.config, batch)
        self.memory = StreamMemory(self.module, self.config, batch)
        self.batch, self.start, self.frames = batch, 0, {}

    def call(self):
        w = self.config.window
        return self.geometry.call(self.start, w.frames_per_block, memory_frames=self.config.memory.frames)

    def append(self, call):
        """One call's keys and values into every layer; the last layer's are kept by frame number."""
        q, k, v = torch.randn(3, self.batch, call.frames * TOKENS, 2, 12)
        for layer in range(self.config.model.layers):
            self.cache.attend(layer, q, k, v, (torch.ones(24), torch.ones(24)), call, None)
        slots = [slice(s * TOKENS, (s + 1) * TOKENS) for s in call.slots.write]
        raw = self.cache.raw if self.cache.raw is not None else self.cache.k[-1]
        for i, span in enumerate(slots):
            self.frames[call.start + i] = raw[:, span].clone(), self.cache.v[-1][:, span].clone()

    def block(self):
        """A block as the sampler runs it: prepare, first call, publish, context call."""
        call = self.call()
        self.memory.prepare(self.cache, call)
        self.append(call)
        self.memory.publish()
        self.append(call)
        self.start += call.frames

    def kept(self, frames):
        """Keys and values of the last layer as the context calls left them."""
        return tuple(torch.cat([self.frames[f][i] for f in frames], 1) for i in (0, 1))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("window", [WindowConfig(), WRAPS], ids=["whole blocks", "wrapped"])
def test_a_write_reads_the_keys_that_the_first_call_is_about_to_overwrite(window):
    stream = Stream(window)
    state, local = stream.module.query_init, window.local_frames
    for _ in range(9):
        held = dict(stream.frames)
        stream.block()
        first = max(window.sink_frames, stream.start - 3 - local)
        leaving = range(first, max(window.sink_frames, stream.start - local))
        if leaving:
            stream.frames, after = held, stream.frames
            state = write(stream.module, state, *stream.kept(leaving))
            stream.frames = after
        assert_no_worse_than(stream.memory.state[0], state, state)
    assert stream.memory.writes == 9 - window.window_frames // 3


def test_a_write_is_seen_from_the_second_call_on():
    stream = Stream()
    for _ in range(4):
        stream.block()
        assert not stream.memory.active
        assert stream.memory.read(stream.call()) is None
    call = stream.call()
    stream.memory.prepare(stream.cache, call)
    assert stream.memory.read(call) is None  # the first call of the block
    stream.memory.publish()
    seen = stream.memory.read(call)
    assert seen is not None
    stream.append(call)
    stream.start += 3
    call = stream.call()
    old = [x.clone() for x in stream.memory.read(call)[0]]
    stream.memory.prepare(stream.cache, call)
    assert_same_bits(list(stream.memory.read(call)[0]), old)  # prepared, not published
    stream.memory.publish()
    assert not torch.equal(stream.memory.read(call)[0][1], old[1])


def test_publishing_twice_writes_once():
    stream = Stream()
    for _ in range(5):
        stream.block()
    state = stream.memory.state.clone()
    stream.memory.publish()
    assert stream.memory.writes == 1
    assert_same_bits(stream.memory.state, state)


def test_a_bulk_call_reads_no_memory():
    stream = Stream()
    for _ in range(6):
        stream.block()
    assert stream.memory.read(stream.geometry.call(9, 9, memory_frames=2)) is None
    assert stream.memory.read(stream.geometry.call(18, 3, memory_frames=0)) is None
    assert stream.memory.read(stream.call()) is not None


@pytest.mark.parametrize("blocks", [5, 6, 7, 20])
def test_keys_sit_at_the_ids_of_the_call(blocks):
    """Memory ids move in the first blocks: an older state is rotated afresh; later they are constant."""
    stream = Stream()
    for _ in range(blocks):
        stream.block()
    state = stream.memory.state[0]
    for start in (stream.start - 3, stream.start):  # a later call of this block, and the next block's first
        call = stream.geometry.call(start, 3, memory_frames=2)
        k, v = read(stream.module, state, 2)
        ids = range(call.ids.local[0] - 2, call.ids.local[0])
        expected = rotate(k, ids, [(r, c) for r in range(2) for c in range(3)])
        for layer in stream.memory.read(call):
            assert_no_worse_than(layer[0], expected, expected)
            assert_no_worse_than(layer[1], v, v)


def test_a_coarser_grid_sits_at_the_centres_of_its_cells():
    stream = Stream(tokens_per_frame=2)
    for _ in range(5):
        stream.block()
    call = stream.call()
    k, _ = read(stream.module, stream.memory.state[0], 2)
    expected = rotate(k, call.ids.memory, [(0.5, 0.25), (0.5, 1.75)])  # 1 x 2 on 2 x 3
    assert_no_worse_than(stream.memory.read(call)[0][0], expected, expected)


def test_a_read_is_projected_once_a_write_and_shared_by_the_layers():
    stream = Stream(layers=3)
    for _ in range(8):
        stream.block()
    calls = [stream.call(), stream.geometry.call(stream.start + 3, 3, memory_frames=2)]  # ids saturated: the same
    first, again = (stream.memory.read(call) for call in calls)
    assert len(first) == 3
    assert all(layer[0] is first[0][0] for layer in (*first, *again))
    stream.block()
    assert stream.memory.read(stream.call())[0][0] is not first[0][0]


def test_groups_of_layers_read_their_own_state():
    stream = Stream(layers=5, groups=2)
    for _ in range(5):
        stream.block()
    layers = stream.memory.read(stream.call())
    assert [layer[0] is layers[0][0] for layer in layers] == [True, True, False, False, False]
    assert layers[2][0] is layers[4][0]
    assert not torch.equal(layers[0][1], layers[2][1])


def test_frozen_memory_is_its_learned_start_from_the_block_that_would_first_write():
    frozen, live = Stream(frozen=True), Stream()
    start = frozen.module.start(1)
    for block in range(8):
        for stream in (frozen, live):
            stream.block()
        assert frozen.memory.active == live.memory.active == (block >= 4)
        assert_same_bits(frozen.memory.state, start)
    k, v = read(frozen.module, frozen.module.query_init, 2)
    expected = rotate(k, frozen.call().ids.memory, [(r, c) for r in range(2) for c in range(3)])
    seen = frozen.memory.read(frozen.call())[0]
    assert_no_worse_than(seen[0], expected, expected)
    assert_no_worse_than(seen[1], v, v)


@pytest.mark.parametrize("window", [WindowConfig(), WRAPS], ids=["whole blocks", "wrapped"])
def test_batched_writes_take_their_evictions_at_once(window):
    stream = Stream(window, write_every=3)
    state, waiting, writes, local = stream.module.query_init, [], [], window.local_frames
    for _ in range(12):
        held = dict(stream.frames)
        stream.block()
        first = max(window.sink_frames, stream.start - 3 - local)
        leaving = range(first, max(window.sink_frames, stream.start - local))
        waiting += [held[f] for f in leaving]
        if len(stream.memory.pending) == 0 and waiting:
            state = write(stream.module, state, *(torch.cat([pair[i] for pair in waiting], 1) for i in (0, 1)))
            waiting = []
            writes.append(stream.start // 3)
        assert_no_worse_than(stream.memory.state[0], state, state)
        assert len(stream.memory.pending) < 3
    assert writes == [n for n in (writes[0], writes[0] + 3, writes[0] + 6) if n <= 12]
    assert stream.memory.writes == len(writes) >= 2


def test_sink_anchor_reads_the_sink_with_every_write():
    stream = Stream(sink_anchor=True)
    for _ in range(4):
        stream.block()
    call = stream.call()
    k, v = stream.kept([0, 1, 2, 3, 4, 5])  # the sink, then the three that leave
    plain = write(stream.module, stream.module.query_init, k, v)
    stream.memory.prepare(stream.cache, call)
    stream.memory.publish()
    assert_no_worse_than(stream.memory.state[0], plain, plain)


@pytest.mark.parametrize("sink_anchor", [False, True])
def test_positions_run_on_through_a_wrapped_eviction(sink_anchor):
    """Evicted frames get ids 0, 1, 2 (after the sink's), memory frames 0, 1; rows and columns as on a frame."""
    stream, grid = Stream(WRAPS, positions=True, sink_anchor=sink_anchor), [(r, c) for r in range(2) for c in range(3)]
    wrapped = 0
    for _ in range(10):
        before, call = stream.memory.state[0].clone(), stream.call()
        pairs = stream.cache.evicted(call)
        wrapped += len(pairs) == 2
        frames = ([0] if sink_anchor else []) + list(range(max(1, stream.start - 8), stream.start - 5))
        if pairs:
            keys, values = stream.kept(frames)
            keys = rotate(keys, range(len(frames)), grid)
            expected = write(stream.module, before, keys, values, lambda q: rotate(q, range(2), grid))
        stream.block()
        if pairs:
            assert_no_worse_than(stream.memory.state[0], expected, expected)
    assert wrapped >= 2


def test_rewrite_starts_over_with_one_write_of_what_it_is_given():
    stream = Stream(write_every=2)
    for _ in range(8):
        stream.block()
    stream.block()
    assert stream.memory.pending
    old = stream.memory.read(stream.call())[0][0]
    writes = stream.memory.writes
    stream.memory.rewrite(stream.cache.local(stream.start), stream.cache)
    expected = write(stream.module, stream.module.query_init, *stream.kept(range(stream.start - 9, stream.start)))
    assert_no_worse_than(stream.memory.state[0], expected, expected)
    assert not stream.memory.pending
    assert stream.memory.writes == writes + 1
    assert stream.memory.read(stream.call())[0][0] is not old


def test_rewrite_leaves_state_keys_and_values_where_captured_graphs_find_them():
    streams = []
    for _ in range(2):
        torch.manual_seed(3)
        streams.append(Stream())
        for _ in range(6):
            streams[-1].block()
    stream, plain = streams
    stream.memory.fix(stream.call())
    fixed = [stream.memory.state, *stream.memory.read(stream.call())[0]]  # alive, so that no other takes their places
    for other in streams:
        other.memory.rewrite(other.cache.local(other.start), other.cache)
    stream.memory.fix(stream.call())
    found = [stream.memory.state, *stream.memory.read(stream.call())[0]]
    assert [x.data_ptr() for x in found] == [x.data_ptr() for x in fixed]
    assert_same_bits(found, [plain.memory.state, *plain.memory.read(plain.call())[0]])


def test_a_rewrite_that_runs_out_of_memory_changes_nothing(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    stream = Stream(write_every=2)
    for _ in range(9):
        stream.block()
    assert stream.memory.pending
    before = {name: x.clone() for name, x in stream.memory.tensors().items()}
    read = [x.clone() for x in stream.memory.read(stream.call())[0]]
    monkeypatch.setattr(stream.module, "write", full)
    with pytest.raises(torch.OutOfMemoryError):
        stream.memory.rewrite(stream.cache.local(stream.start), stream.cache)
    assert_same_bits(stream.memory.tensors(), before)
    stream.memory.publish()
    assert_same_bits(list(stream.memory.read(stream.call())[0]), read)


def test_reset_forgets_everything():
    stream = Stream()
    for _ in range(6):
        stream.block()
    stream.memory.reset()
    assert not stream.memory.active
    assert stream.memory.read(stream.call()) is None
    assert_same_bits(stream.memory.state, stream.module.start(1))


def test_streams_of_a_batch_have_their_own_state():
    stream = Stream(batch=2)
    for _ in range(5):
        stream.block()
    frames = stream.kept([3, 4, 5])
    for b in range(2):
        expected = write(stream.module, stream.module.query_init, *(x[b : b + 1] for x in frames))
        assert_no_worse_than(stream.memory.state[0, b : b + 1], expected, expected)


def test_a_state_saved_mid_stream_goes_on_the_same():
    stream = Stream(write_every=2)
    for _ in range(7):
        stream.block()
    assert stream.memory.writes == len(stream.memory.pending) == 1
    saved = {name: x.clone() for name, x in stream.memory.tensors().items()}
    other = StreamMemory(stream.module, stream.config)
    other.load_tensors(saved)
    assert_same_bits(other.tensors(), saved)
    original, stream.memory = stream.memory, other
    call = stream.call()
    for memory in (original, other):
        memory.prepare(stream.cache, call)
        memory.publish()
    assert_same_bits(other.tensors(), original.tensors())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, "a saved memory lacks state"),
        ({"writes": None}, "a saved memory lacks writes"),
        ({"pending.0.k": None, "pending.1.k": torch.zeros(1)}, "a saved memory lacks pending.0.k"),
        ({"state": torch.zeros(1, 1, 3, 24)}, r"saved memory is \(1, 1, 3, 24\), this one \(1, 1, 12, 24\)"),
    ],
)
def test_loading_a_broken_state_is_an_error(change, message):
    stream = Stream(write_every=2)
    for _ in range(5):
        stream.block()
    saved = {name: x for name, x in {**stream.memory.tensors(), **change}.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        stream.memory.load_tensors(saved)
