"""Checkpoint files that lie, are cut short or carry code: refused with the reason, and nothing of them runs."""

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from echo_infinity.checkpoints.convert import Settings, Sources, convert
from echo_infinity.checkpoints.entries import open_safetensors, open_weights
from echo_infinity.weights import load_checkpoint
from official import golden_parts, prefixed, write_official
from safetensors.torch import save_file


class Trap:
    """Pickled, it is a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "place",
    [
        lambda trap: trap,
        lambda trap: {"generator": trap},
        lambda trap: {"generator": {"model.head.head.bias": torch.zeros(16)}, "step": trap},
        lambda trap: OrderedDict(args=[trap]),
    ],
)
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, place):
    torch.save(place(Trap(tmp_path / "ran")), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"holds posix\.mkdir, which is code or an object and no tensor"):
        open_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(ValueError, match="truncated, corrupt, or in the format before"):
        open_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_an_object_of_a_class_is_refused(tmp_path):
    torch.save({"generator": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"holds torch\.nn\.modules\.linear\.Linear, which is code"):
        open_weights(tmp_path / "module.pt")


@pytest.mark.parametrize("keep", [0, 4, 1000, 20_000, -1])
def test_a_truncated_torch_file_is_refused(tmp_path, keep):
    path = write_official(tmp_path / "echo.pt")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"echo\.pt"):
        convert(Sources([path]), tmp_path / "model", golden_parts()[0])
    assert not (tmp_path / "model").exists()


def test_a_torch_file_before_1_6_is_refused_with_advice(tmp_path):
    torch.save({"generator": {"a": torch.zeros(2)}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"load it where you trust it and torch\.save it again"):
        open_weights(tmp_path / "old.pt")


def repack(path, change, compression=zipfile.ZIP_STORED):
    """Rewrite the pickle inside a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_a_compressed_torch_file_is_refused(tmp_path):
    torch.save({"generator": {"a": torch.zeros(1000)}}, tmp_path / "packed.pt")
    repack(tmp_path / "packed.pt", lambda data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"is compressed .* which torch\.save never does"):
        open_weights(tmp_path / "packed.pt")


def test_a_shape_larger_than_its_storage_is_refused(tmp_path):
    torch.save({"generator": {"a": torch.zeros(10, 100)}}, tmp_path / "large.pt")
    repack(tmp_path / "large.pt", lambda data: data.replace(b"K\nKd", b"M\xff\x7fM\xff\x7f"))
    with pytest.raises(ValueError, match=r"large\.pt is refused: RuntimeError"):
        open_weights(tmp_path / "large.pt")


def test_a_storage_larger_than_the_file_gives_no_more_than_the_file(tmp_path):
    torch.save({"generator": {"a": torch.zeros(10, 100)}}, tmp_path / "large.pt")
    repack(tmp_path / "large.pt", lambda data: data.replace(b"M\xe8\x03t", b"J" + struct.pack("<i", 1 << 30) + b"t"))
    entry = open_weights(tmp_path / "large.pt")["generator"]["a"]
    assert entry.shape == (10, 100)
    assert entry.read().untyped_storage().nbytes() <= (tmp_path / "large.pt").stat().st_size


def test_a_repeated_tensor_of_absurd_shape_is_refused_by_its_shape(tmp_path):
    config, dit, _ = golden_parts()
    torch.save(
        {"generator": prefixed(dit) | {"model.head.head.bias": torch.zeros(1).expand(1 << 40)}}, tmp_path / "x.pt"
    )
    with pytest.raises(ValueError, match=r"head\.head\.bias is \(1099511627776,\), expected \(16,\)"):
        convert(Sources([tmp_path / "x.pt"]), tmp_path / "model", config)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(16, dtype=torch.int64), "torch.int64"),
        (torch.zeros(16, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(16).to_sparse(), "sparse"),
        (torch.zeros(16, device="meta"), "meta"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(tmp_path, tensor, message):
    torch.save({"generator": {"model.head.head.bias": tensor}}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=rf"no plain weights: model\.head\.head\.bias \(.*{message}"):
        open_weights(tmp_path / "odd.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_leave_nothing(tmp_path, value):
    config, dit, _ = golden_parts()
    dit["head.head.bias"][3] = value
    torch.save({"generator": prefixed(dit)}, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"head\.head\.bias holds NaN or Inf"):
        convert(Sources([tmp_path / "nan.pt"]), tmp_path / "model", config)
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pt"]


def write_header(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


HEADERS = {
    "shape larger than the data": (
        {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 8]}},
        b"8" * 8,
    ),
    "data past the end": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"4" * 4),
    "overlapping tensors": (
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        b"1" * 12,
    ),
    "negative shape": ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"8" * 8),
    "unknown dtype": ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"8" * 8),
    "no object": ([1, 2, 3], b""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, case):
    write_header(tmp_path / "lie.safetensors", *HEADERS[case])
    with pytest.raises(ValueError, match=r"lie\.safetensors is corrupt or truncated"):
        open_safetensors(tmp_path / "lie.safetensors")


def test_a_header_that_claims_an_absurd_length_is_refused(tmp_path):
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ValueError, match="corrupt or truncated"):
        open_safetensors(tmp_path / "long.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_safetensors_of_another_dtype_are_refused(tmp_path, dtype):
    save_file({"blocks.0.ffn.0.weight": torch.zeros(4, 4).to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"no weights of F64, F32, F16, BF16: blocks\.0\.ffn\.0\.weight is"):
        open_safetensors(tmp_path / "x.safetensors")


@pytest.fixture
def sharded(tmp_path):
    """A model folder in shards."""
    config, dit, _ = golden_parts()
    torch.save({"generator": prefixed(dit)}, tmp_path / "source.pt")
    convert(Sources([tmp_path / "source.pt"]), tmp_path / "model", config, Settings(shard_bytes=50_000))
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    return tmp_path / "model"


LAST = "model.head.head.bias"


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", "..\\outside.safetensors"]
)
def test_an_index_that_points_out_of_its_folder_is_refused(sharded, target):
    save_file({"model.head.head.bias": torch.zeros(16)}, sharded.parent / "outside.safetensors")
    change_index(sharded, lambda listed: listed.update({"model.head.head.bias": target}))
    for opening in (load_checkpoint, open_weights):
        with pytest.raises(ValueError, match="shards must lie in the index's own folder"):
            opening(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda listed: listed.pop("model.head.head.bias"),
            "holds model.head.head.bias, which the index puts elsewhere",
        ),
        (
            lambda listed: listed.update({"model.more": listed["model.head.head.bias"]}),
            r"safetensors lacks model\.more",
        ),
        (
            lambda listed: listed.update({"model.head.head.bias": "model-00009.safetensors"}),
            "00009.safetensors is missing",
        ),
        (lambda listed: listed.clear(), "3 layers, the weights only 0 tensors"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(sharded, change, message):
    change_index(sharded, change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": ["a"]}', "null"])
def test_an_index_that_is_no_index_is_refused(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is no index of shards"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(sharded, keep):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{shard.name} is corrupt or truncated"):
        load_checkpoint(sharded)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is missing"):
        load_checkpoint(sharded)


def test_a_configuration_of_absurd_size_is_refused_before_it_is_built(sharded):
    data = json.loads((sharded / "config.json").read_text())
    data["model"]["layers"] = 10**9
    (sharded / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="1000000000 layers, the weights only"):
        load_checkpoint(sharded)


def test_a_folder_with_two_models_in_it_is_refused(sharded):
    (sharded / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"one index of shards, found: model.*, other"):
        open_weights(sharded)
