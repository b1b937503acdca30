"""The UMT5 text encoder: transformers' numbers, zeros past the length, encoded once, freed and replaced."""

import gc
import json
import sys
import weakref

import pytest
import torch
from echo_infinity.checkpoints.parts import write_text
from echo_infinity.config import preset
from echo_infinity.extras import MissingExtraError
from echo_infinity.umt5 import LongPromptWarning, PrecomputedText, Umt5Text, clean_prompt
from numerics import assert_library_equal, assert_same_bits
from safetensors.torch import load_file, save_file
from test_hostile_files import Trap
from transformers import AutoTokenizer, UMT5EncoderModel
from umt5_files import WIDTH, encoder, original_names, plain_encoder, write_folder, write_original, write_tokenizer

PROMPT = "a red circle, it drifts."
TOKENS = 64


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "text")


def text_of(folder, **options):
    return Umt5Text(folder, TOKENS, WIDTH, **options)


@torch.no_grad()
def test_embeddings_equal_transformers_on_a_padded_batch(folder):
    prompts = [PROMPT, "a", "two blue squares drift over a dark field"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), UMT5EncoderModel.from_pretrained(folder)
    batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    expected = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
    actual = text_of(folder).encode(prompts)
    assert actual.shape == (3, TOKENS, WIDTH)
    assert_library_equal(actual, expected)
    for row, mask in zip(actual, batch["attention_mask"], strict=True):
        assert row[mask.sum() :].eq(0).all()
        assert row[: mask.sum()].abs().sum(-1).gt(0).all()


@torch.no_grad()
def test_the_original_file_converts_to_the_encoder_it_is(tmp_path):
    source = write_original(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    write_text(source, None, tmp_path / "text", torch.float32)
    weights = {name: x.float() for name, x in torch.load(source, weights_only=True).items()}
    text = text_of(tmp_path / "text")
    ids = text._tokenise(PROMPT)
    assert_library_equal(text.encode([PROMPT])[0, : len(ids)], plain_encoder(weights, ids))


def test_original_names_cover_the_encoder(tmp_path):
    theirs = set(encoder().state_dict()) - {"encoder.embed_tokens.weight"}
    assert set(original_names().values()) == theirs


@pytest.mark.parametrize("layout", ["transformers", "diffusers"])
def test_folders_convert(tmp_path, folder, layout):
    source = folder
    if layout == "diffusers":
        encoder().save_pretrained(tmp_path / "pipe" / "text_encoder", max_shard_size="5KB")
        assert (tmp_path / "pipe" / "text_encoder" / "model.safetensors.index.json").exists()
        write_tokenizer(tmp_path / "pipe" / "tokenizer")
        source = tmp_path / "pipe"
    write_text(source, None, tmp_path / "out", torch.float32)
    assert_same_bits(text_of(tmp_path / "out").encode([PROMPT]), text_of(folder).encode([PROMPT]))


def test_converted_weights_have_the_dtype_asked_for(tmp_path, folder):
    write_text(folder, None, tmp_path / "out", torch.bfloat16)
    assert {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert text_of(tmp_path / "out").encode([PROMPT]).dtype == torch.bfloat16
    assert text_of(tmp_path / "out", dtype=torch.float32).encode([PROMPT]).dtype == torch.float32


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda x: x.pop("blocks.1.ffn.fc2.weight"),
            r"missing encoder\.block\.1\.layer\.1\.DenseReluDense\.wo\.weight",
        ),
        (lambda x: x.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda x: x.update({"norm.weight": torch.zeros(3)}), r"final_layer_norm\.weight is \(3,\), expected \(16,\)"),
        (lambda x: x.pop("token_embedding.weight"), r"shared\.weight is missing"),
        (lambda x: x.update({"blocks.999999999.norm1.weight": torch.zeros(1)}), "numbers its layers up to 999999999"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(tmp_path, break_it, message):
    source = write_original(tmp_path / "t5.pth")
    tensors = torch.load(source, weights_only=True)
    break_it(tensors)
    torch.save(tensors, source)
    with pytest.raises(ValueError, match=message):
        write_text(source, None, tmp_path / "text", torch.float32)


def test_an_encoder_without_tokenizer_is_refused(tmp_path):
    encoder().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no tokenizer\.json or spiece\.model of the tokenizer in"):
        write_text(tmp_path / "bare", None, tmp_path / "text", torch.float32)


def test_a_prompt_is_encoded_once_and_read_back_bit_for_bit(tmp_path, folder, monkeypatch):
    cache = tmp_path / "cache"
    first = text_of(folder, cache=cache).encode([PROMPT])
    fresh = text_of(folder, cache=cache)
    monkeypatch.setattr(fresh, "_load", lambda: pytest.fail("the encoder was loaded for a prompt that is cached"))
    assert_same_bits(fresh.encode([PROMPT]), first)
    assert_same_bits(fresh.encode([f"  {PROMPT}\n"]), first)
    assert not fresh.loaded
    assert len(list(cache.iterdir())) == 1


def test_another_prompt_encoder_or_dtype_has_its_own_entry(tmp_path, folder):
    cache, other = tmp_path / "cache", write_folder(tmp_path / "other", seed=1)
    text_of(folder, cache=cache).encode([PROMPT, "another"])
    text_of(folder, cache=cache, dtype=torch.bfloat16).encode([PROMPT])
    assert not torch.equal(text_of(other, cache=cache).encode([PROMPT]), text_of(folder, cache=cache).encode([PROMPT]))
    assert len(list(cache.iterdir())) == 4


def test_an_encoder_that_differs_in_one_number_has_its_own_entry(tmp_path, folder):
    cache, path = tmp_path / "cache", folder / "model.safetensors"
    first = text_of(folder, cache=cache).encode([PROMPT])
    weights = load_file(path)
    weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"][3, 5] += 1
    save_file(weights, path, metadata={"format": "pt"})
    assert not torch.equal(text_of(folder, cache=cache).encode([PROMPT]), first)
    assert len(list(cache.iterdir())) == 2


def test_a_broken_cache_entry_is_computed_again(tmp_path, folder):
    cache = tmp_path / "cache"
    first = text_of(folder, cache=cache).encode([PROMPT])
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:50])
    assert_same_bits(text_of(folder, cache=cache).encode([PROMPT]), first)
    assert_same_bits(text_of(folder, cache=cache).encode([PROMPT]), first)


def test_a_cache_that_cannot_be_written_warns_and_goes_on(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not keep the prompt's embedding"):
        text_of(folder, cache=tmp_path / "file").encode([PROMPT])


@pytest.mark.parametrize(("keep", "moves"), [("loaded", []), ("cpu", ["cpu"]), ("freed", [])])
def test_the_encoder_stays_moves_or_goes(folder, monkeypatch, keep, moves):
    text, moved = text_of(folder, keep=keep), []
    plain = UMT5EncoderModel.to
    monkeypatch.setattr(UMT5EncoderModel, "to", lambda self, device: moved.append(str(device)) or plain(self, device))
    text.device = torch.device("cpu", 0)  # told apart from main memory by its number alone
    weights = weakref.ref(text._load().shared.weight)
    first = text.encode([PROMPT])
    assert moved == ["cpu:0", *moves]
    gc.collect()
    assert text.loaded == (weights() is not None) == (keep != "freed")
    assert_same_bits(text.encode([PROMPT]), first)
    text.free()
    gc.collect()
    assert not text.loaded
    assert weights() is None


def test_the_official_model_reads_512_tokens():
    model = preset("wan2.1-1.3b").model
    assert (model.text_tokens, model.text_width) == (512, 4096)


def test_a_long_prompt_is_cut_with_a_warning_and_keeps_its_end_token(folder):
    text = Umt5Text(folder, 8, WIDTH)
    with pytest.warns(LongPromptWarning, match="26 tokens, this model reads 8"):
        cut = text.encode([PROMPT])
    assert cut.shape == (1, 8, WIDTH)
    assert text._tokenizer(PROMPT, truncation=True, max_length=8)["input_ids"][-1] == 1
    assert cut[0].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [
        ("  a   red\n circle ", "a red circle"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("\u201ccurly\u201d", '"curly"'),
        ("caf\u00c3\u00a9", "caf\u00e9"),
    ],
)
def test_prompts_are_cleaned_as_for_training(prompt, clean):
    assert clean_prompt(prompt) == clean


def test_an_empty_prompt_is_refused(folder):
    with pytest.raises(ValueError, match="the prompt is empty"):
        text_of(folder).encode(["  &nbsp; "])


def test_precomputed_embeddings_replace_the_encoder(tmp_path, folder):
    whole = text_of(folder).encode([PROMPT])
    save_file({PROMPT: whole[0, :26].contiguous(), "other": torch.zeros(3, WIDTH)}, tmp_path / "text.safetensors")
    text = PrecomputedText(tmp_path / "text.safetensors", TOKENS, WIDTH)
    assert_same_bits(text.encode([f" {PROMPT} "]), whole)
    with pytest.raises(ValueError, match=r"no embedding of 'unknown' in .*; it holds: "):
        text.encode(["unknown"])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "is corrupt or truncated"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: save_file({PROMPT: torch.zeros(3, WIDTH, dtype=torch.int64)}, path), "found: '.*' I64"),
        (
            lambda path: save_file({PROMPT: torch.full((3, WIDTH), torch.nan)}, path),
            "the embedding of '.*' in .* holds NaN or Inf",
        ),
    ],
)
def test_precomputed_embeddings_that_are_broken_are_refused(tmp_path, break_it, message):
    path = tmp_path / "text.safetensors"
    save_file({PROMPT: torch.zeros(3, WIDTH)}, path)
    break_it(path)
    with pytest.raises(ValueError, match=message):
        PrecomputedText(path, TOKENS, WIDTH).encode([PROMPT])


@pytest.mark.parametrize("depth", [10**9, -1, "many", 1.5])
def test_a_configuration_of_absurd_depth_is_refused_before_it_is_built(tmp_path, folder, depth):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_layers": depth}))
    for attempt in (
        lambda: text_of(folder).encode([PROMPT]),
        lambda: write_text(folder, None, tmp_path / "out", torch.float32),
    ):
        with pytest.raises(ValueError, match=rf"has num_layers {depth!r}, the weights \d+ tensors"):
            attempt()


def test_a_truncated_encoder_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt or truncated"):
        text_of(folder).encode([PROMPT])


def test_an_encoder_of_other_shapes_is_refused(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"d_ff": 10}))
    with pytest.raises(ValueError, match=r"can't be read as a UMT5 encoder|doesn't fit its configuration"):
        text_of(folder).encode([PROMPT])


def test_an_encoder_in_a_pickle_is_not_opened(tmp_path, folder):
    (folder / "model.safetensors").unlink()
    torch.save(Trap(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must hold one \.safetensors file"):
        text_of(folder).encode([PROMPT])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_a_folder_brings_along_does_not_run(tmp_path, folder, file):
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    settings = json.loads((folder / file).read_text())
    names = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / file).write_text(json.dumps(settings | {"auto_map": names}))
    try:
        text_of(folder).encode([PROMPT])
    except ValueError as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017  refused or read without the code: both are safe
    assert not (tmp_path / "ran").exists()


def test_saved_embeddings_are_those_of_the_encoder(tmp_path, folder):
    prompts, path = [PROMPT, "another"], tmp_path / "made" / "text.safetensors"
    text_of(folder).save(prompts, path)
    saved = PrecomputedText(path, TOKENS, WIDTH)
    assert set(saved.prompts) == set(prompts)
    assert_same_bits(saved.encode(prompts), text_of(folder).encode(prompts))


@pytest.mark.parametrize("shape", [(TOKENS + 1, WIDTH), (3, WIDTH + 1), (WIDTH,), (0, WIDTH)])
def test_precomputed_embeddings_of_another_shape_are_refused(tmp_path, shape):
    save_file({PROMPT: torch.zeros(shape)}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"must hold embeddings \(<= 64, 16\) by prompt"):
        PrecomputedText(tmp_path / "text.safetensors", TOKENS, WIDTH)


def test_a_missing_library_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'echo-infinity\[wan\]'"):
        text_of(folder).encode([PROMPT])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        text_of(folder)


def test_an_encoder_of_another_width_is_refused(folder):
    with pytest.raises(ValueError, match="embeds to width 16, the model reads 32"):
        Umt5Text(folder, TOKENS, 32).encode([PROMPT])
