# SPDX-License-Identifier: GPL-3.0-or-later
"""A tiny transformer of one of the host's own classes, and the facts about it that tests check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.sample
import torch
from torch import Generator, Tensor

import host_process as host

# The prompt's width in all of them.
WIDTH = 64


@dataclass(frozen=True)
class Tiny:
    """A model's class and configuration, and the facts that its tests check.

    ``family`` is its entry's name, ``since`` the first release of ComfyUI that runs it and is looked at. ``guided`` is
    the number of text attentions. Of the prompt's tokens ``unread`` at the end are not attended to, and ``more_text``
    more come from ``more_cond``, which has what else a prompt's tensors are: of a seeded generator and the number of
    tokens. In a joint sequence the text comes first or last, behind ``before_text`` tokens of the model's own, and
    padded to ``padded_to``: at its front, or, where the padding is refined with it, at its end, and the image to a
    multiple of that as well. Where ``prompt_modulates``, the prompt acts on the image's tokens before attention too.
    ``text_first`` None is a family with text cross-attention, whose calls come from modules
    with the path ``text_modules``, a regular expression. ``wrapped``: the host lets nodes wrap its blocks.
    """

    family: str
    class_name: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    guided: int
    since: str = "0.3.60"
    patch: int = 2
    width: int = WIDTH
    text_first: bool | None = True
    before_text: int = 0
    more_text: int = 0
    unread: int = 0
    padded_to: int = 0
    padding_is_refined: bool = False
    prompt_modulates: bool = False
    text_modules: str = ""
    wrapped: bool = True
    cond: dict[str, Any] = field(default_factory=dict)
    more_cond: Callable[[Generator, int], dict[str, Any]] | None = None

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        return host.build(self.class_name, self.config, seed, dtype)

    def prompt(self, seed: int, tokens: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, self.width, generator=generator)
        return [[text, {**self.cond, **(self.more_cond(generator, tokens) if self.more_cond else {})}]]

    def text(self, sequence: int, tokens: int) -> slice:
        """The text with its padding in a joint sequence of a length."""
        tokens = max(tokens + self.more_text - self.unread, self.padded_to)
        if self.text_first:
            return slice(self.before_text, self.before_text + tokens)
        return slice(sequence - tokens, sequence)

    def words(self, sequence: int, tokens: int) -> slice:
        """The tokens that a prompt changes: the text without padding that no refiner has touched."""
        text = self.text(sequence, tokens)
        if self.padding_is_refined:
            return text
        return slice(text.stop - (tokens + self.more_text - self.unread), text.stop)

    def image_tokens(self) -> int:
        """How many tokens of the sequence the noise changes."""
        *frames, height, width = self.latent[1:]
        tokens = (height // self.patch) * (width // self.patch) * (frames[0] if frames else 1)
        return -(-tokens // self.padded_to) * self.padded_to if self.padding_is_refined else tokens

    def sample(
        self,
        model: Any,
        *,
        tokens: int = 12,
        cfg: float = 1.0,
        seed: int = 1,
        prompt: int = 10,
        other_token: bool = False,
        other_patch: bool = False,
    ) -> Tensor:
        """A run; with other values for the first token of the text or of the image if wanted."""
        latent = torch.zeros(1, *self.latent)
        noise = comfy.sample.prepare_noise(latent, seed)
        positive = self.prompt(prompt, tokens)
        if other_token:
            positive[0][0][:, 0] *= -1
        if other_patch:
            (noise if noise.ndim == 4 else noise[:, :, 0])[:, :, : self.patch, : self.patch] *= -1
        out: Tensor = comfy.sample.sample(
            model,
            noise,
            2,
            cfg,
            "euler",
            "simple",
            positive,
            self.prompt(11, tokens),
            latent,
            disable_pbar=True,
            seed=seed,
        )
        return out


def unmasked(_: Generator, tokens: int) -> dict[str, Any]:
    """The mask of a prompt without padding, for models that count its tokens by it."""
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}
