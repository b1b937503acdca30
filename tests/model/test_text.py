"""The grammar's text encoder: words in, padded embeddings out, unknown words said aloud."""

import pytest
import torch
from echo_infinity.text import GrammarText, UnknownWordsWarning


@pytest.fixture
def text():
    return GrammarText(["a", "red", "circle", "drifts"], tokens=5, width=8)


def test_embeddings_are_zero_past_the_words(text):
    out = text.encode(["a red circle", "a"])
    assert out.shape == (2, 5, 8)
    assert out[0, :3].abs().sum(-1).gt(0).all()
    assert out[0, 3:].eq(0).all()
    assert out[1, 1:].eq(0).all()


def test_case_commas_and_full_stops_do_not_matter(text):
    assert text.tokenise("A red, circle.") == text.tokenise("a red circle")


def test_the_same_word_in_another_place_embeds_differently(text):
    out = text.encode(["red a", "a red"])
    assert not torch.equal(out[0, 0], out[1, 1])


def test_unknown_words_warn_with_their_names_and_are_left_out(text):
    with pytest.warns(UnknownWordsWarning, match="left out: purple"):
        assert text.tokenise("a purple circle") == text.tokenise("a circle")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("  ", "prompt is empty"), ("a a a a a a", "6 words.*at most 5"), ("purple", "no word of the prompt 'purple'")],
)
def test_rejects(text, prompt, message):
    with pytest.raises(ValueError, match=message):
        text.encode([prompt])
