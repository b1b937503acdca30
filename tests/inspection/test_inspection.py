"""What inspection draws is what the stream computed: attention, gates and states agree with the ops'."""

import av
import pytest
import torch
from echo_infinity import cli
from echo_infinity.cache import RingKV
from echo_infinity.inspection.attention import explain_reading, explain_writing
from echo_infinity.inspection.command import inspect
from echo_infinity.inspection.watch import Watcher
from echo_infinity.memory import EvolvingMemory, MemoryConfig
from echo_infinity.noise import counter_noise
from echo_infinity.policies import POLICIES, make_sampler
from echo_infinity.weights import load_checkpoint
from numerics import assert_same_bits, assert_stream_equal
from small import CIRCLE, save_small


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load_checkpoint(save_small(tmp_path_factory.mktemp("models") / "small"))


def stream(checkpoint, policy="evolving", batch=1):
    text = checkpoint.model.encode_text(checkpoint.text.encode([CIRCLE] * batch))
    return make_sampler(checkpoint, policy, text, counter_noise(3), batch)


@pytest.mark.parametrize("policy", POLICIES)
def test_readings_are_what_every_layer_read_under_every_policy(small, policy, monkeypatch):
    checked = []
    plain = RingKV.attend

    def attend(self, layer, q, k, v, norms, call, memory, *, output=True):
        out = plain(self, layer, q, k, v, norms, call, memory, output=output)
        if output:
            seen = explain_reading(self, layer, q, norms[0], call, memory, self.config.model.eps)
            assert_stream_equal(seen.output, out)
            sums = seen.tiers.sum(-1)
            assert_stream_equal(sums, torch.ones_like(sums))
            memory_share = seen.tiers[..., 1].mean()
            assert_stream_equal(seen.memory.sum(), memory_share)
            checked.append(memory is not None)
        return out

    monkeypatch.setattr(RingKV, "attend", attend)
    sampler = stream(small, policy)
    for _ in range(7):
        sampler.next_block()
    assert len(checked) == 7 * (4 * 2 + 1)
    assert any(checked) == (policy not in ("window", "sink", "full"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2},
        {"residual": True},
        {"post_norm": True, "layers": 1},
        {"sink_anchor": True},
        {"normalise_keys": False, "groups": 3, "sink_anchor": True},
    ],
)
def test_writings_arrive_at_the_state_that_the_memory_does(options):
    module = EvolvingMemory(MemoryConfig(width=24, heads=2, frames=3, tokens_per_frame=4, **options)).eval()
    with torch.no_grad():
        state = torch.randn(module.config.groups, 2, 12, 24)
        segments = [tuple(torch.randn(2, n, 2, 12) for _ in range(2)) for n in (8, 4)]
        sink = tuple(torch.randn(2, 12, 2, 12) for _ in range(2)) if module.config.sink_anchor else None
        seen = explain_writing(module, state, segments, sink)
        assert_stream_equal(seen.state, module.write(state, segments, sink=sink))
    tokens, evicted = 12 * module.config.groups, 12 + (12 if sink else 0)
    assert seen.attention.shape == (module.config.layers, tokens, evicted)
    sums = seen.attention.sum(-1)
    assert_stream_equal(sums, torch.ones_like(sums))
    if options.get("residual"):
        assert seen.gate is None
    else:
        assert seen.gate.shape == (2, tokens, 24)
        assert ((seen.gate > 0) & (seen.gate < 1)).all()


def test_writings_of_a_stream_with_positions_arrive_at_its_states(small, monkeypatch):
    compared = []
    plain = EvolvingMemory.write

    def write(self, state, segments, **tables):
        new = plain(self, state, segments, **tables)
        assert_stream_equal(explain_writing(self, state, segments, **tables).state, new)
        compared.append(tables["q_rope"] is not None)
        return new

    monkeypatch.setattr(EvolvingMemory, "write", write)
    sampler = stream(small)
    for _ in range(7):
        sampler.next_block()
    assert compared == [True] * 3  # blocks 4, 5 and 6 push frames out


def test_a_watched_stream_makes_the_same_bits_and_has_a_view_a_block(small):
    plain, watched = stream(small), stream(small)
    watcher = Watcher(watched)
    for _ in range(7):
        assert_same_bits(watcher.next_block(), plain.next_block())
    assert_same_bits(dict(watched.tensors()), dict(plain.tensors()))
    assert [view.block for view in watcher.views] == list(range(7))
    first, last = watcher.views[0], watcher.views[-1]
    assert first.tiers.shape == (4, 2, 2, 3)
    assert_stream_equal(first.tiers[..., 0], torch.ones(4, 2, 2))  # all there is in block 0 is the sink
    assert first.written is None
    assert first.gate is None
    assert last.memory.shape == (2, 12)
    assert last.maps.shape == (2, 12, 3)
    assert [view.evicted for view in watcher.views[4:]] == [range(3, 6), range(6, 9), range(9, 12)]
    assert last.written.shape == (2, 12, 12)
    assert last.gate.shape == (12, 3)
    assert (last.gate.diff(dim=1) >= 0).all()


def test_memory_is_read_from_the_call_after_its_first_write(small):
    watcher = Watcher(stream(small))
    for _ in range(5):
        watcher.next_block()
    reads = watcher.views[4].tiers[..., 1].sum((1, 2))
    assert reads[0] == 0
    assert (reads[1:] > 0).all()


def test_batches_can_not_be_watched(small):
    with pytest.raises(ValueError, match="batch 1 without CUDA graphs, got batch 2"):
        Watcher(stream(small, batch=2))


def test_draws_pictures_and_a_video_as_long_as_asked(small, tmp_path):
    names = inspect(small, None, CIRCLE, 6, tmp_path)
    assert names == ["inspect.mp4", "tiers.png", "queries.png", "gates.png", "writes.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
    with av.open(str(tmp_path / "inspect.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 9 + 5 * 12
    assert frames[0].shape == (288, 1024, 3)


def test_the_command_draws_a_policy_without_writes(small, tmp_path, capsys, tmp_path_factory):
    folder = save_small(tmp_path_factory.mktemp("models") / "small")
    words = [CIRCLE, "--model", str(folder), "--policy", "sink", "--seconds", "3", "--out", str(tmp_path)]
    assert cli.main(["inspect", *words]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / name) for name in ("inspect.mp4", "tiers.png", "queries.png")]
    assert cli.main(["inspect", CIRCLE, "--model", str(folder), "--policy", "hope"]) == 2
    assert "unknown policy 'hope'" in capsys.readouterr().err
