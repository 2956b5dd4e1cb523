# SPDX-License-Identifier: GPL-3.0-or-later
"""What the demo models are made of, without the host: sizes, the settings of the host's classes, the text encoder.

The training reads this file too, so that what is trained and what is shipped cannot differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 32
CHANNELS = 3
PATCH = 4
TOKENS = 77
WIDTH = 96
POOLED = 4
_HEADS = 4
_LAYERS = 2
# Token ids 0, 1 and 2: padding, and what stands before and after a prompt.
SPECIAL = ("[PAD]", "[CLS]", "[SEP]")

UNET_CONFIG: dict[str, Any] = {
    "image_size": SIZE // PATCH,
    "in_channels": CHANNELS * PATCH**2,
    "out_channels": CHANNELS * PATCH**2,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [0, 1, 0, 1],
    "transformer_depth_middle": 1,
    "context_dim": WIDTH,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_checkpoint": False,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
# The least of Flux.1's kind: text and picture share one attention, first with weights of their own, then without.
TRANSFORMER_CONFIG: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": PATCH,
    "hidden_size": 96,
    "num_heads": 3,
    "mlp_ratio": 3.0,
    "depth": 2,
    "depth_single_blocks": 4,
    "context_in_dim": WIDTH,
    "vec_in_dim": POOLED,  # the host wants a pooled text; ours is always zero
    "axes_dim": [8, 12, 12],
    "theta": 100,  # few tokens: the slowest angle still turns visibly over 8
    "qkv_bias": True,
    "guidance_embed": False,
}


def words_of(text: str) -> list[str]:
    """The words and marks of a text, in lower case."""
    return re.findall(r"[^\s.,]+|[.,]", text.lower())


class _TextBlock(nn.Module):
    """A pre-norm transformer block; every token reads every other, padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.f1, self.f2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in self.qkv(self.n1(x)).chunk(3, dim=-1))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.f2(nn.functional.gelu(self.f1(self.n2(x))))


class DemoTextEncoder(nn.Module):
    """Prompts of a fixed vocabulary to contexts of 77 tokens, padding included.

    Args:
        vocabulary: every token in the order of its id, the ``SPECIAL`` ones first.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.ids = {token: number for number, token in enumerate(vocabulary)}
        self.words = tuple(vocabulary[len(SPECIAL) :])
        self.table = nn.Embedding(len(vocabulary), WIDTH)
        self.pos = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(_TextBlock() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``[B, 77]`` to contexts ``[B, 77, WIDTH]`` in fp32."""
        x = self.table(ids) + self.pos
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """The contexts ``[B, 77, WIDTH]`` of prompts; an empty one gives the unconditional context.

        Raises:
            ValueError: see ``tokens_of``.
        """
        return self(torch.tensor([self.tokens_of(text) for text in texts]))

    def tokens_of(self, text: str) -> list[int]:
        """The 77 token ids of a prompt.

        Raises:
            ValueError: a word outside the vocabulary, or too many words.
        """
        words = words_of(text)
        if unknown := [word for word in words if word not in self.words]:
            named = ", ".join(map(repr, dict.fromkeys(unknown)))
            raise ValueError(f"The demo model does not know {named}; it knows {' '.join(self.words)}")
        most = TOKENS - 2
        if len(words) > most:
            raise ValueError(f"The demo model reads up to {most} words and marks, got {len(words)}.")
        pad, first, last = (self.ids[token] for token in SPECIAL)
        ids = [first, *(self.ids[word] for word in words), last]
        return ids + [pad] * (TOKENS - len(ids))
