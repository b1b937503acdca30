"""Official checkpoints to model folders: every layout, the golden rollout from what came out, and bounded memory."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from echo_infinity import cli
from echo_infinity.checkpoints.convert import Settings, Sources, convert, expected_shapes
from echo_infinity.checkpoints.entries import open_safetensors
from echo_infinity.checkpoints.names import official
from echo_infinity.checkpoints.shards import Progress
from echo_infinity.config import EchoConfig, ModelConfig, preset
from echo_infinity.model import CausalDiT
from echo_infinity.pipeline import EchoPipeline
from echo_infinity.weights import load_checkpoint
from growth import growth
from micro import GOLDEN, golden_noise, load
from numerics import assert_golden, assert_same_bits
from official import (
    PROMPT,
    ROLLOUT,
    golden_parts,
    lora_of,
    prefixed,
    spoilt,
    wrapped,
    write_embeddings,
    write_lora_pair,
    write_official,
)
from safetensors.torch import save_file


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "geometry.json"
    path.write_text(golden_parts()[0].to_json())
    return path


def loaded(folder):
    """The folder's tensors under official names without ``model.``."""
    checkpoint = load_checkpoint(folder)
    memory = {} if checkpoint.memory is None else checkpoint.memory.state_dict()
    return in_order(dict(checkpoint.model.state_dict()) | prefixed(memory, "query_memory_encoder."))


def in_order(tensors):
    return dict(sorted(tensors.items()))


def assert_golden_rollout(folder, tmp_path, name=ROLLOUT, blocks=15):
    _, tensors = load(name)
    pipe = EchoPipeline.from_pretrained(folder, text=write_embeddings(tmp_path / "text.safetensors", name))
    stream = pipe.stream(PROMPT, noise=golden_noise(tensors), output_type="latents")
    latents = torch.cat([next(stream) for _ in range(blocks)])
    assert_golden(latents, tensors["latents"][0, : 3 * blocks])


@pytest.mark.parametrize("shard_size", ["2", "0.00005"])
def test_official_checkpoint_converts_and_reproduces_the_golden_rollout(tmp_path, config_file, capsys, shard_size):
    source, folder = write_official(tmp_path / "echo.pt"), tmp_path / "model"
    words = ["convert", source, "-o", folder, "--config", config_file, "--shard-size", shard_size]
    assert cli.main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert "memory tensors are missing in generator_ema: taken from generator" in out
    assert "not needed, not read: critic" in out
    assert (folder / "model.safetensors.index.json").exists() == (shard_size != "2")
    assert_golden_rollout(folder, tmp_path)


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_lora_and_memory_file_merge_into_the_golden_model(tmp_path, alpha):
    pair = write_lora_pair(tmp_path / "base.pt", tmp_path / "long.pt", rank=4, alpha=alpha)
    notes = convert(Sources(pair), tmp_path / "model", golden_parts()[0], Settings(lora_alpha=alpha))
    assert any(f"LoRA of rank 4 on 30 weights merged, scale {1 if alpha is None else 2:g}" in note for note in notes)
    assert any("its memory replaces the one in base.pt" in note for note in notes)
    assert_golden_rollout(tmp_path / "model", tmp_path, blocks=8)


def test_lora_merges_into_an_average_that_lacks_the_memory(tmp_path):
    updates, plain = lora_of(golden_parts()[1])
    base = write_official(tmp_path / "echo.pt", dit=plain)
    torch.save({"generator_lora": wrapped(updates)}, tmp_path / "lora.pt")
    notes = convert(Sources([base, tmp_path / "lora.pt"]), tmp_path / "model", golden_parts()[0])
    assert any("LoRA of rank 4 on 30 weights merged" in note for note in notes)
    assert any("35 memory tensors are missing in generator_ema: taken from generator" in note for note in notes)
    assert_golden_rollout(tmp_path / "model", tmp_path)


def test_an_average_with_a_part_of_the_memory_keeps_it(tmp_path):
    averaged = {"query_init", "gate_linear.weight", "layers.0.q.weight"}
    notes = convert(
        Sources([write_official(tmp_path / "echo.pt", averaged=averaged)]), tmp_path / "model", golden_parts()[0]
    )
    assert any("32 memory tensors are missing in generator_ema" in note for note in notes)
    assert_golden_rollout(tmp_path / "model", tmp_path, blocks=8)


@pytest.mark.parametrize(
    "name",
    [
        "model.blocks.0.ffn.0.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.0.weight",
        "module._orig_mod.model._orig_mod.blocks.0._checkpoint_wrapped_module._orig_mod.ffn.0.weight",
        "_fsdp_wrapped_module.module.generator.model.blocks.0.ffn._fsdp_wrapped_module.0.weight",
        "transformer.blocks.0.ffn.net.0.proj.weight",
        "base_model.model.model.blocks.0.ffn.0.base_layer.weight",
        "model.base_model.model.blocks.0.ffn.0.base_layer.weight",
    ],
)
def test_wrappers_are_removed_wherever_they_stand(name):
    assert official(name) == "blocks.0.ffn.0.weight"


def test_a_peft_model_saved_whole_is_its_base_with_the_update(tmp_path):
    pair = write_lora_pair(tmp_path / "base.pt", tmp_path / "long.pt")
    base, lora = (torch.load(path, weights_only=True) for path in pair)
    stems = {name.split(".lora_")[0] for name in lora["generator_lora"]}
    whole = {}
    for name, x in base["generator"].items():
        if "query_memory_encoder" not in name:
            stem, _, leaf = f"base_model.{name}".rpartition(".")
            whole[f"{stem}.base_layer.{leaf}" if stem in stems else f"{stem}.{leaf}"] = x
    whole |= {name.replace(".weight", ".default.weight"): x for name, x in lora["generator_lora"].items()}
    torch.save({"generator": whole, "query_memory_encoder": lora["query_memory_encoder"]}, tmp_path / "whole.pt")
    convert(Sources([tmp_path / "whole.pt"]), tmp_path / "model", golden_parts()[0])
    assert_golden_rollout(tmp_path / "model", tmp_path, blocks=5)


def test_without_the_average_the_trained_weights_are_read(tmp_path):
    config, dit, memory = golden_parts()
    convert(Sources([write_official(tmp_path / "echo.pt")]), tmp_path / "model", config, Settings(ema=False))
    expected = spoilt(dit) | prefixed(memory, "query_memory_encoder.")
    assert_same_bits(loaded(tmp_path / "model"), in_order(expected))


# Files without memory: Self-Forcing and Causal-Forcing keep the average alone, LongLive the generator alone.
LAYOUTS = {
    "self-forcing": lambda dit: {"generator_ema": wrapped(dit)},
    "causal-forcing": lambda dit: {"generator_ema": prefixed(dit), "critic_ema": prefixed(spoilt(dit))},
    "longlive": lambda dit: {"generator": prefixed(dit)},
    "plain": lambda dit: {"model": dit},
    "top": lambda dit: dit,
    "parameters": lambda dit: {name: torch.nn.Parameter(x) for name, x in prefixed(dit).items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_without_memory_keep_every_tensor(tmp_path, layout):
    config, dit, _ = golden_parts()
    torch.save(LAYOUTS[layout](dit), tmp_path / "source.pt")
    notes = convert(Sources([tmp_path / "source.pt"]), tmp_path / "model", config)
    assert any("no memory in these files" in note for note in notes)
    assert load_checkpoint(tmp_path / "model").config == replace(config, memory=None)
    assert_same_bits(loaded(tmp_path / "model"), in_order(dit))


def test_original_safetensors_convert_with_and_without_shards(tmp_path):
    config, dit, _ = golden_parts()
    names = list(dit)
    (tmp_path / "shards").mkdir()
    save_file(dit, tmp_path / "whole.safetensors")
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, own in halves.items():
        save_file({name: dit[name] for name in own}, tmp_path / "shards" / shard)
    weight_map = {name: shard for shard, own in halves.items() for name in own}
    index = tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for source in (tmp_path / "whole.safetensors", index, tmp_path / "shards"):
        convert(Sources([source]), tmp_path / f"from-{source.name}", config)
        assert_same_bits(loaded(tmp_path / f"from-{source.name}"), in_order(dit))


def test_dtype_is_as_in_the_file_or_as_asked(tmp_path):
    config, dit, _ = golden_parts()
    torch.save({"generator": prefixed({name: x.bfloat16() for name, x in dit.items()})}, tmp_path / "half.pt")
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        folder = tmp_path / f"model-{dtype}"
        convert(Sources([tmp_path / "half.pt"]), folder, config, Settings(dtype=dtype))
        assert {x.dtype for x in open_safetensors(folder / "model.safetensors").values()} == {expected}
    assert_same_bits(loaded(tmp_path / "model-None"), loaded(tmp_path / "model-torch.float32"))


def test_key_norm_of_a_memory_that_does_not_normalise_is_left_out(tmp_path):
    config, dit, memory = golden_parts("rollout_mem_nk0")
    assert "norm_k_out.weight" in memory
    assert not config.memory.normalise_keys
    torch.save({"generator": prefixed(dit | prefixed(memory, "query_memory_encoder."))}, tmp_path / "echo.pt")
    notes = convert(Sources([tmp_path / "echo.pt"]), tmp_path / "model", config)
    assert any("norm_k_out.weight belongs to an option that is off" in note for note in notes)
    assert_golden_rollout(tmp_path / "model", tmp_path, "rollout_mem_nk0", blocks=6)


def test_every_wrong_tensor_is_listed_before_anything_is_written(tmp_path):
    config, dit, memory = golden_parts()
    del dit["head.head.bias"]
    dit["blocks.1.ffn.0.weight"] = torch.zeros(2, 2)
    dit["extra"] = torch.zeros(1)
    memory["to_k.bias"] = torch.zeros(7)
    lost = [name for name in dit if name.startswith("blocks.2.")]
    more = [f"blocks.{i}.ffn.0.weight" for i in range(3, 40)]
    dit = {name: x for name, x in dit.items() if name not in lost} | {name: torch.zeros(1) for name in more}
    tensors = prefixed(dit) | prefixed(memory, "model.query_memory_encoder.")
    torch.save({"generator": tensors}, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as error:  # noqa: PT011  the lines below are the match
        convert(Sources([tmp_path / "bad.pt"]), tmp_path / "model", config)
    assert len(lost) > 20
    assert set(str(error.value).split("\n  ")[1:]) == {
        "missing model.head.head.bias",
        "model.blocks.1.ffn.0.weight is (2, 2), expected (96, 48)",
        "unexpected model.extra",
        "model.query_memory_encoder.to_k.bias is (7,), expected (48,)",
        *(f"missing model.{name}" for name in lost),
        *(f"unexpected model.{name}" for name in more),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt"]


def test_official_names_and_shapes_are_those_that_the_preset_expects(tmp_path):
    layout = json.loads((GOLDEN / "state_dict_layout.json").read_text())
    official = {name: tuple(shape) for name, shape in layout["generator"].items()}
    official |= {f"model.query_memory_encoder.{name}": tuple(x) for name, x in layout["memory_encoder"].items()}
    ours = expected_shapes(preset("wan2.1-1.3b"))
    assert {name for name in official if "norm_k_out" not in name} == ours.keys()
    assert {name: official[name] for name in ours} == ours


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"blocks.0.self_attn.q.lora_A.weight": (4, 48)}, r"blocks\.0\.self_attn\.q: lora_B is missing"),
        ({"blocks.9.ffn.0.lora_A.weight": (4, 48), "blocks.9.ffn.0.lora_B.weight": (96, 4)}, "no such weight"),
        ({"blocks.0.ffn.0.lora_A.weight": (4, 96), "blocks.0.ffn.0.lora_B.weight": (48, 4)}, "doesn't fit the weight"),
        ({"blocks.0.ffn.0.lora_magnitude_vector": (96,), "x.lora_A.weight": (1, 1)}, "unexpected blocks"),
    ],
)
def test_lora_that_does_not_fit_is_refused(tmp_path, lora, message):
    config, dit, _ = golden_parts()
    torch.save({"generator": prefixed(dit)}, tmp_path / "base.pt")
    torch.save({"generator_lora": {name: torch.zeros(shape) for name, shape in lora.items()}}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=message):
        convert(Sources([tmp_path / "base.pt", tmp_path / "lora.pt"]), tmp_path / "model", config)


@pytest.mark.parametrize(
    ("files", "message"),
    [(("a.pt", "b.pt"), "one file must hold the generator, found in: .*a.pt, .*b.pt"), (("other.pt",), "holds no gen")],
)
def test_files_without_exactly_one_generator_are_refused(tmp_path, files, message):
    config, dit, _ = golden_parts()
    for name in files:
        section = "optimizer" if name == "other.pt" else "generator"
        torch.save({section: prefixed(dit)}, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        convert(Sources([tmp_path / name for name in files]), tmp_path / "model", config)


def test_two_names_of_one_tensor_are_refused(tmp_path):
    config, dit, _ = golden_parts()
    torch.save({"generator": prefixed(dit) | {"module.model.head.head.bias": torch.zeros(16)}}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"which are the same tensor head\.head\.bias"):
        convert(Sources([tmp_path / "twice.pt"]), tmp_path / "model", config)


def test_an_existing_folder_is_replaced_only_when_asked_and_survives_a_failure(tmp_path):
    config, dit, _ = golden_parts()
    torch.save({"generator": prefixed(dit)}, tmp_path / "a.pt")
    torch.save({"generator": prefixed(spoilt(dit))}, tmp_path / "b.pt")
    (tmp_path / "broken.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:5000])
    convert(Sources([tmp_path / "a.pt"]), tmp_path / "model", config)
    with pytest.raises(FileExistsError, match="exists already"):
        convert(Sources([tmp_path / "b.pt"]), tmp_path / "model", config)
    with pytest.raises(ValueError, match="truncated"):
        convert(Sources([tmp_path / "broken.pt"]), tmp_path / "model", config, Settings(overwrite=True))
    assert_same_bits(loaded(tmp_path / "model"), in_order(dit))
    convert(Sources([tmp_path / "b.pt"]), tmp_path / "model", config, Settings(overwrite=True))
    assert_same_bits(loaded(tmp_path / "model"), in_order(spoilt(dit)))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_killed_run_left_is_cleared(tmp_path):
    config, dit, _ = golden_parts()
    torch.save({"generator": prefixed(dit)}, tmp_path / "a.pt")
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part" / "model.safetensors").write_bytes(b"half")
    convert(Sources([tmp_path / "a.pt"]), tmp_path / "model", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "model"]


def test_an_old_folder_that_a_killed_run_left_beside_the_new_one_is_cleared(tmp_path):
    config, dit, _ = golden_parts()
    torch.save({"generator": prefixed(dit)}, tmp_path / "a.pt")
    for name in ("model", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    convert(Sources([tmp_path / "a.pt"]), tmp_path / "model", config, Settings(overwrite=True))
    assert_same_bits(loaded(tmp_path / "model"), in_order(dit))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("memory.nothing=1", "no such setting; beside it there are: .*normalise_keys"),
        ("window.relative", "takes NAME=VALUE"),
        ("model.heads=5", "no multiple of heads"),
    ],
)
def test_settings_that_do_not_exist_are_refused(tmp_path, config_file, capsys, change, message):
    words = ["convert", "none.pt", "-o", str(tmp_path / "model"), "--config", str(config_file), "--set", change]
    assert cli.main(words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_settings_reach_the_folder(tmp_path, config_file):
    source = write_official(tmp_path / "echo.pt")
    words = ["convert", source, "-o", tmp_path / "model", "--config", config_file, "--set", "window.relative=false"]
    assert cli.main([str(word) for word in words]) == 0
    assert not load_checkpoint(tmp_path / "model").config.window.relative


PREPARE = """
import sys
from pathlib import Path
import torch
from echo_infinity.checkpoints.convert import Settings, Sources, convert
from echo_infinity.config import EchoConfig

folder, shard = Path(sys.argv[1]), int(sys.argv[2])
config, small = (EchoConfig.from_json((folder / f"{name}.json").read_text()) for name in ("geometry", "small"))
convert(Sources([folder / "small.pt"]), folder / "warm", small)  # code and allocator are in memory now
sources = [folder / name for name in sys.argv[3:]]
"""
CONVERT = 'convert(Sources(sources), folder / "model", config, Settings(shard_bytes=shard, dtype=torch.bfloat16))'


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process's memory from /proc")
@pytest.mark.parametrize("kind", ["pt", "safetensors", "lora"])
def test_memory_grows_by_at_most_a_shard_and_two_tensors(tmp_path, kind):
    model = ModelConfig(
        width=768, heads=6, layers=6, ffn=3072, latent_channels=4, text_tokens=8, text_width=64, time_width=32
    )
    config = EchoConfig(model=model, latent_rows=4, latent_columns=4)
    torch.manual_seed(0)
    tensors = CausalDiT(model).state_dict()
    total, largest = sum(x.nbytes for x in tensors.values()), max(x.nbytes for x in tensors.values())
    names = [f"big.{'pt' if kind == 'lora' else kind}"]
    if kind == "safetensors":
        save_file(tensors, tmp_path / names[0])
    else:
        torch.save({"generator_ema": prefixed(tensors), "generator": prefixed(tensors)}, tmp_path / names[0])
    if kind == "lora":
        shapes = {n.removesuffix(".weight"): x.shape for n, x in tensors.items() if n.endswith("ffn.0.weight")}
        lora = {f"{n}.lora_A.weight": torch.zeros(8, s[1]) for n, s in shapes.items()}
        lora |= {f"{n}.lora_B.weight": torch.zeros(s[0], 8) for n, s in shapes.items()}
        torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
        names.append("lora.pt")
    (tmp_path / "geometry.json").write_text(config.to_json())
    small, dit, _ = golden_parts()
    (tmp_path / "small.json").write_text(small.to_json())
    torch.save({"generator": prefixed(dit)}, tmp_path / "small.pt")
    shard = 2 * largest
    grown, allowed = growth(PREPARE, CONVERT, tmp_path, shard, *names), shard + 2 * largest
    assert total > 2.5 * allowed, "the file must be larger than what is allowed, or this shows nothing"
    assert grown <= allowed, f"grew by {grown >> 20} MiB, allowed {allowed >> 20}, the file has {total >> 20}"


def test_progress_hears_every_byte(tmp_path):
    class Heard(Progress):
        expected = written = 0

        def expect(self, nbytes):
            self.expected += nbytes

        def done(self, nbytes):
            self.written += nbytes

    config, dit, _ = golden_parts()
    torch.save({"generator": prefixed(dit)}, tmp_path / "a.pt")
    heard = Heard()
    convert(Sources([tmp_path / "a.pt"]), tmp_path / "model", config, progress=heard)
    assert heard.expected == heard.written == sum(x.nbytes for x in dit.values())
