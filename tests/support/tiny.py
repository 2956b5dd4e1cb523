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

# Width of the prompt in all models.
WIDTH = 64


@dataclass(frozen=True)
class Tiny:
    """A model's class and configuration, and the facts that its tests check.

    Attributes:
        family: name of its entry in FAMILIES.
        class_name: name of the class in the host's list of supported models.
        config: configuration of the class.
        latent: shape of a latent without the batch.
        guided: number of text attentions.
        since: first release of ComfyUI, of those that are tested, that runs the model.
        patch: height and width of the part of the latent that becomes one token.
        width: width of the prompt.
        text_first: True if the text comes first in the joint sequence; None for a family with text cross-attention.
        before_text: number of the model's own tokens before the text.
        more_text: number of text tokens that come from ``more_cond``.
        unread: number of tokens at the end of the prompt that no attention reads.
        padded_to: length that the text is padded to, at its front. If ``padding_is_refined``, the text is padded at its
            end, and the image is padded to a multiple of this length as well.
        padding_is_refined: True if a refiner processes the padding along with the text.
        prompt_modulates: True if the prompt acts on the image's tokens before attention too.
        text_modules: path of the modules whose calls read the text by cross-attention, as a regular expression.
        wrapped: True if the host lets nodes wrap the blocks.
        cond: entries of the conditioning beside the text.
        more_cond: function of a seeded generator and the number of tokens that returns the prompt's other tensors.
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
        """Return the position of the text with its padding in a joint sequence of ``sequence`` tokens."""
        tokens = max(tokens + self.more_text - self.unread, self.padded_to)
        if self.text_first:
            return slice(self.before_text, self.before_text + tokens)
        return slice(sequence - tokens, sequence)

    def words(self, sequence: int, tokens: int) -> slice:
        """Return the position of the tokens that a prompt changes: the text, and its padding only if refined."""
        text = self.text(sequence, tokens)
        if self.padding_is_refined:
            return text
        return slice(text.stop - (tokens + self.more_text - self.unread), text.stop)

    def image_tokens(self) -> int:
        """Return the number of tokens of the sequence that the noise changes."""
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
        """Run the host's sampler. Two options change the values of the first token of the text or of the image."""
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
    """Return the mask of a prompt without padding, for models that count the tokens by it."""
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}
