"""The relative recipe: every golden row, ids without end, and the settings that must be refused."""

import json

import pytest
from echo_infinity.cache import plan_slots
from echo_infinity.config import EchoConfig, ModelConfig, WindowConfig
from echo_infinity.memory import MemoryConfig
from echo_infinity.positions import ABSOLUTE_TABLE_FRAMES, absolute_ids, grid_positions, relative_ids
from hypothesis import given
from hypothesis import strategies as st
from micro import GOLDEN

FAR = 345_600  # a day of latent frames


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "relative_positions.json").read_text())


def configured(window, memory_frames):
    """A configuration around ``window``; raises ValueError where it is impossible."""
    memory = MemoryConfig(width=16, heads=1, frames=memory_frames, tokens_per_frame=1) if memory_frames else None
    model = ModelConfig(width=16, heads=1, layers=1, ffn=16, latent_channels=1, text_tokens=1, text_width=1)
    return EchoConfig(model=model, latent_rows=2, latent_columns=2, window=window, memory=memory)


def ids_of_block(config, start, frames=None):
    """Ids of the block at ``start`` as the engine asks for them, and whether a write has been published before it."""
    w = config.window
    frames = w.frames_per_block if frames is None else frames
    slots = plan_slots(start, frames, w.sink_frames, w.local_frames)
    reads = config.memory is not None and start + frames > w.window_frames  # from the block that first evicts
    ids = relative_ids(
        start,
        frames,
        slots.local,
        memory_frames=config.memory.frames if reads else 0,
        sink_frames=slots.sink,
        p_max=w.p_max,
        frames_per_block=w.frames_per_block,
    )
    return ids, slots


def test_every_golden_row_gets_the_golden_ids_and_breaks_the_golden_rules(golden):
    assert len(golden["rows"]) == 20_160
    for values in golden["rows"]:
        row = dict(zip(golden["columns"], values, strict=True))
        ids = relative_ids(
            row["current_start_frame"],
            row["B"],
            row["R"],
            memory_frames=row["N_Q"],
            sink_frames=row["N_S"],
            p_max=row["pmax"],
            frames_per_block=row["num_frame_per_block"],
        )
        assert ids.bulk == row["is_bulk_forward"], row
        assert ids.query == range(row["q_start"], row["q_last"] + 1), row
        assert ids.sink == range(row["sink_start"], row["sink_start"] + row["N_S"]), row
        assert len(ids.local) == row["R"], row
        if row["R"]:
            assert ids.local == range(row["local_start"], row["local_end"] + 1), row
        assert bool(ids.memory) == row["use_memory"], row
        if ids.memory:
            assert ids.memory == range(row["mem_start"], row["mem_end"] + 1), row
        rules = {
            "A": ids.query[-1] <= row["pmax"] - 1,
            "B": ids.query[0] >= 0,
            "C": not ids.memory or ids.memory[0] >= row["N_S"],
            "D": not (ids.memory and ids.local) or ids.memory[-1] + 1 == ids.local[0],
            "E": ids.bulk or not ids.local or ids.query[-1] == ids.local[-1],
        }
        assert "".join(name for name, holds in rules.items() if not holds) == row["violated"], row


def test_configurations_are_refused_exactly_where_a_stream_would_break_a_rule(golden):
    assert len(golden["reachable"]) == 180
    refused = 0
    for setting in golden["reachable"]:
        fits = {
            "sink_frames": setting["sink"],
            "window_frames": setting["local"],
            "frames_per_block": setting["block"],
            "p_max": setting["pmax"],
        }
        if setting["first_violation"] is None:
            configured(WindowConfig(**fits), setting["Q"])
            continue
        refused += 1
        with pytest.raises(ValueError, match=r"memory frames .* ids would overlap the sink"):
            configured(WindowConfig(**fits), setting["Q"])
    assert refused == 39


def test_whole_golden_streams_get_the_golden_ids(golden):
    compared = 0
    for setting in golden["reachable"]:
        if setting["seq"] is None or setting["first_violation"] is not None:
            continue
        window = WindowConfig(setting["sink"], setting["local"], setting["block"], setting["pmax"])
        config = configured(window, setting["Q"])
        for start, step, q_start, q_last, local_start, local_end, mem_start, mem_end, _ in setting["seq"]:
            ids, slots = ids_of_block(config, start)
            assert ids.query == range(q_start, q_last + 1)
            if slots.local:
                assert ids.local == range(local_start, local_end + 1)
            if mem_end >= 0:
                assert ids.memory == range(mem_start, mem_end + 1)
            first = start + setting["block"] > window.window_frames >= start  # its first call still reads no memory
            assert (mem_end >= 0) == bool(ids.memory) or (first and step == "step0")
            compared += 1
    assert compared > 300


@pytest.mark.parametrize(
    ("start", "memory", "local", "query"),
    [(12, (3, 5), (6, 14), (12, 14)), (15, (6, 8), (9, 17), (15, 17)), (18, (9, 11), (12, 20), (18, 20))],
)
def test_official_layout(start, memory, local, query):
    ids, _ = ids_of_block(configured(WindowConfig(), 3), start)
    assert [(tier[0], tier[-1]) for tier in (ids.memory, ids.local, ids.query)] == [memory, local, query]
    assert ids.sink == range(3)


@pytest.mark.parametrize("start", [21, 45, 1020, FAR - 3, FAR, 10**12])
def test_ids_are_the_same_for_ever_once_saturated(start):
    config = configured(WindowConfig(), 3)
    assert ids_of_block(config, start)[0] == ids_of_block(config, 18)[0]


@st.composite
def windows(draw):
    """Any window that can be configured, with its memory frames (0 for none)."""
    block, sink = draw(st.integers(1, 6)), draw(st.integers(0, 7))
    memory = draw(st.integers(0, block))
    least = sink + block
    window = draw(st.integers(least, least + 15))
    if memory:
        window = -(-window // block) * block
    return WindowConfig(sink, window, block, draw(st.integers(window + memory, window + memory + 12))), memory


@given(windows(), st.integers(0, 40) | st.integers(0, 10**9))
def test_ids_never_leave_the_pretrained_range_or_meet(setting, block):
    window, memory = setting
    config = configured(window, memory)
    start = block * window.frames_per_block
    ids, slots = ids_of_block(config, start)
    tiers = [*ids.sink, *ids.memory, *ids.local]
    assert all(0 <= i < window.p_max for i in (*tiers, *ids.query))
    assert len(set(tiers)) == len(tiers) == slots.sink + slots.local + len(ids.memory)
    assert len(ids.query) == window.frames_per_block
    if start >= window.sink_frames:
        assert ids.local[-window.frames_per_block :] == ids.query
    # Once there is memory its ids touch the local ones: nothing between them is out of the model's sight.
    assert not ids.memory or ids.memory[-1] + 1 == ids.local[0]


@given(windows(), st.integers(1, 10**6))
def test_bulk_ids_stay_in_range_and_leave_memory_out(setting, blocks):
    window, memory = setting
    config = configured(window, memory)
    end = blocks * window.frames_per_block
    frames = min(end, window.local_frames)
    ids, _ = ids_of_block(config, max(end - frames, window.sink_frames), frames)
    assert all(0 <= i < window.p_max for i in (*ids.local, *ids.query, *ids.sink))
    assert ids.bulk == (frames > window.frames_per_block)
    assert not (ids.bulk and ids.memory)


def test_absolute_ids_are_frame_numbers_with_memory_before_the_local_frames():
    ids = absolute_ids(30, 3, 9, memory_frames=3, sink_frames=3)
    assert (ids.query, ids.local, ids.memory) == (range(30, 33), range(24, 33), range(21, 24))
    assert ids.sink == range(3)
    assert absolute_ids(3, 3, 3, memory_frames=6, sink_frames=3).memory == range(0, 6)


def test_absolute_ids_end_where_their_table_ends():
    assert absolute_ids(ABSOLUTE_TABLE_FRAMES - 3, 3, 9, memory_frames=0, sink_frames=3).query[-1] == 1023
    message = "absolute ids reach frame 1025, their table ends at 1024: stop the stream earlier or use relative ids"
    with pytest.raises(ValueError, match=message):
        absolute_ids(ABSOLUTE_TABLE_FRAMES - 2, 3, 9, memory_frames=0, sink_frames=3)


def test_a_grid_of_memory_tokens_sits_at_the_centres_of_its_cells():
    assert grid_positions(2, 3, 2, 3) == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    assert grid_positions(1, 2, 3, 4) == ([1, 1], [0.5, 2.5])
    assert grid_positions(1, 1, 30, 52) == ([14.5], [25.5])


@given(rows=st.integers(1, 8), columns=st.integers(1, 8), grid=st.tuples(st.integers(1, 30), st.integers(1, 52)))
def test_memory_tokens_stay_on_the_frame_and_share_its_centre(rows, columns, grid):
    ys, xs = grid_positions(min(rows, grid[0]), min(columns, grid[1]), *grid)
    assert len(ys) == len(xs) == min(rows, grid[0]) * min(columns, grid[1])
    for positions, span in ((ys, grid[0]), (xs, grid[1])):
        assert all(-1e-9 <= p <= span - 1 + 1e-9 for p in positions)
        assert sum(positions) / len(positions) == pytest.approx((span - 1) / 2)
