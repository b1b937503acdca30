"""Prompts to embeddings: the learned text encoder of the bundled model's closed language."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class TextEncoder(Protocol):
    """What a pipeline needs of a text encoder: ``B`` prompts to ``(B, n, width)``, zeros past each one's length."""

    def encode(self, prompts: Sequence[str]) -> Tensor: ...


class UnknownWordsWarning(UserWarning):
    """A prompt holds words that the model never learned; they are left out."""


class GrammarText(nn.Module):
    """Embed the words of a closed vocabulary, with a learned embedding a position.

    Args:
        vocabulary: the known words; index 0 of the table is kept for the empty prompt of guidance and dropout.
        tokens: most words of a prompt.
        width: of an embedding, the DiT's ``text_width``.
    """

    def __init__(self, vocabulary: Sequence[str], tokens: int, width: int) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.tokens = tokens
        self._index = {word: i + 1 for i, word in enumerate(self.vocabulary)}
        self.words = nn.Embedding(len(self.vocabulary) + 1, width)
        self.places = nn.Parameter(torch.randn(tokens, width) * 0.1)

    def tokenise(self, prompt: str) -> list[int]:
        """Return the word indices of ``prompt``; case, commas and full stops don't matter.

        Raises:
            ValueError: the prompt is empty, has more than ``tokens`` words, or no known word.
        """
        words = prompt.lower().replace(",", " ").replace(".", " ").split()
        if not words:
            raise ValueError('the prompt is empty; try "a red circle drifts over a dark field"')
        if len(words) > self.tokens:
            raise ValueError(f"the prompt has {len(words)} words, this model reads at most {self.tokens}; shorten it")
        known = [self._index[word] for word in words if word in self._index]
        if unknown := sorted({word for word in words if word not in self._index}):
            advice = f"this model knows: {', '.join(self.vocabulary)}"
            if not known:
                raise ValueError(f"no word of the prompt {prompt!r} is known; {advice}")
            warnings.warn(f"unknown words left out: {', '.join(unknown)}; {advice}", UnknownWordsWarning, stacklevel=3)
        return known

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts.

        Args:
            prompts: ``B`` texts.

        Returns:
            ``(B, tokens, width)``, zeros past each prompt's words.

        Raises:
            ValueError: a prompt is empty, too long, or has no known word.
        """
        return self.embed([self.tokenise(prompt) for prompt in prompts])

    def embed(self, indices: Sequence[Sequence[int]]) -> Tensor:
        """Embed word indices from :meth:`tokenise`: ``(B, tokens, width)``, zeros past each row's words."""
        ids = torch.zeros(len(indices), self.tokens, dtype=torch.int64)
        mask = torch.zeros(len(indices), self.tokens, 1)
        for row, words in enumerate(indices):
            ids[row, : len(words)] = torch.tensor(words, dtype=torch.int64)
            mask[row, : len(words)] = 1
        device = self.places.device
        return (self.words(ids.to(device)) + self.places) * mask.to(device)
