# SPDX-License-Identifier: GPL-3.0-or-later
"""Text encoder of the demo models. Imports nothing of ComfyUI.

The training imports this file too, so that the trained and the shipped encoder cannot differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ...gag_core.echo import echo
from .architecture import TOKENS, WIDTH

_HEADS = 4
_LAYERS = 2
# Tokens with the ids 0, 1 and 2: padding, begin and end of a prompt.
SPECIAL = ("[PAD]", "[CLS]", "[SEP]")
# The words that describe a picture, as the message about an unknown word names them. Captions have more.
WORD_GROUPS = {
    "colours": ("red", "green", "blue", "yellow", "purple", "white"),
    "shapes": ("circle", "square", "triangle", "cross"),
    "numbers": ("a", "one", "two", "three"),
    "places": ("left of", "right of", "above", "below", "next to"),
}
_MOST_NAMED = 3


def words_of(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, in lower case."""
    return re.findall(r"[^\s.,]+|[.,]", text.lower())


class _TextBlock(nn.Module):
    """A pre-norm transformer block, in which every token attends to every other, including padding."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.f1, self.f2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.n1(x)), "b n (s h d) -> s b h n d", s=3, h=_HEADS)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(rearrange(out, "b h n d -> b n (h d)"))
        return x + self.f2(nn.functional.gelu(self.f1(self.n2(x))))


class DemoTextEncoder(nn.Module):
    """Encoder of prompts of a fixed vocabulary into contexts of 77 tokens, padding included.

    Args:
        vocabulary: every token in the order of its id, the ``SPECIAL`` ones first.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.ids = {token: index for index, token in enumerate(vocabulary)}
        self.words = tuple(vocabulary[len(SPECIAL) :])
        self.table = nn.Embedding(len(vocabulary), WIDTH)
        self.pos = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(_TextBlock() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the contexts ``[B, 77, WIDTH]`` fp32 of token ids ``[B, 77]``."""
        x = self.table(ids) + self.pos
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Return the contexts ``[B, 77, WIDTH]`` of prompts. The context of an empty prompt is the unconditional one.

        Raises:
            ValueError: see :meth:`tokens_of_words`.
        """
        return self(torch.tensor([self.tokens_of(text) for text in texts]))

    def tokens_of(self, text: str) -> list[int]:
        """Return the 77 token ids of a prompt; see :meth:`tokens_of_words`."""
        return self.tokens_of_words(words_of(text))

    def tokens_of_words(self, words: Sequence[str]) -> list[int]:
        """Return the 77 token ids of a prompt's words and marks.

        Raises:
            ValueError: a word outside the vocabulary, or too many words.
        """
        if unknown := list(dict.fromkeys(word for word in words if word not in self.words)):
            named = ", ".join(echo(word, 40) for word in unknown[:_MOST_NAMED])
            named += ", ..." if unknown[_MOST_NAMED:] else ""
            known = "; ".join(f"{group}: {', '.join(members)}" for group, members in WORD_GROUPS.items())
            raise ValueError(f"The demo model does not know {named}; describe one to three shapes ({known}).")
        max_words = TOKENS - 2
        if len(words) > max_words:
            raise ValueError(f"The demo model reads up to {max_words} words and marks, got {len(words)}.")
        pad, begin, end = (self.ids[token] for token in SPECIAL)
        ids = [begin, *(self.ids[word] for word in words), end]
        return ids + [pad] * (TOKENS - len(ids))
