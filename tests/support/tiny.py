# SPDX-License-Identifier: GPL-3.0-or-later
"""A tiny transformer of one of the host's own classes, and the facts about it that tests check."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import comfy.sample
import torch
from torch import Generator, Tensor

import host_process as host
import reference
from recorder import Call

# Width of the prompt in all models.
WIDTH = 64
# Models that are copied, by class, seed and dtype.
_slow_models: dict[tuple[str, int, torch.dtype], Any] = {}


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
        parts: function of the number of prompt tokens that returns the parts of the keys, by their kind and size, for
            models in which more than the text's end tells them apart: ``text``; ``mark``, which is text that is the
            same in all prompts; ``picture``, which the text encoder read along with the text; ``image`` and ``sound``,
            which the noise changes; ``other``.
        sound: shape of a latent of sound without the batch, which the model samples along with the picture.
        ids: True if the model gets the prompt as token ids.
        last_ids: token ids at the end of the prompt that are no words.
        constants: sizes that the class takes from its module, by their names.
        is_slow: True if ComfyUI takes seconds to make the model, whatever its size. It is then made once and copied.
        attention_in: module in which torch's own attention is used, as on GPUs. ComfyUI's attention for CPUs adds
            masks of bool instead of masking by them.
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
    parts: Callable[[int], list[tuple[str, int]]] | None = None
    sound: tuple[int, ...] | None = None
    ids: bool = False
    last_ids: tuple[int, ...] = ()
    constants: dict[str, int] = field(default_factory=dict)
    is_slow: bool = False
    attention_in: str = ""
    cond: dict[str, Any] = field(default_factory=dict)
    more_cond: Callable[[Generator, int], dict[str, Any]] | None = None

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        for name, value in self.constants.items():
            module, _, constant = name.rpartition(".")
            setattr(importlib.import_module(module), constant, value)
        if self.attention_in:
            user: Any = importlib.import_module(self.attention_in)
            user.optimized_attention = importlib.import_module("comfy.ldm.modules.attention").attention_pytorch
        if not self.is_slow:
            return host.build(self.class_name, self.config, seed, dtype)
        key = (self.class_name, seed, dtype)
        if key not in _slow_models:
            _slow_models[key] = host.build(self.class_name, self.config, seed, dtype).model
        made = _slow_models[key]
        # Newer hosts' configurations of models cannot be copied.
        return host.patcher_of(copy.deepcopy(made, {id(made.model_config): made.model_config}))

    def prompt(self, seed: int, tokens: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, self.width, generator=generator)
        values = {**self.cond, **(self.more_cond(generator, tokens) if self.more_cond else {})}
        if self.ids:
            ids = torch.randint(1, 90, (1, tokens - len(self.last_ids)), generator=generator)
            values["text_input_ids"] = torch.cat((ids, torch.tensor([self.last_ids], dtype=torch.long)), dim=1)
        return [[text, values]]

    def text(self, sequence: int, tokens: int) -> reference.Text:
        """Return the position of the text with its padding in a joint sequence of ``sequence`` tokens."""
        if self.parts is not None:
            return self._slices(tokens, "text", "mark")
        tokens = max(tokens + self.more_text - self.unread, self.padded_to)
        if self.text_first:
            return slice(self.before_text, self.before_text + tokens)
        return slice(sequence - tokens, sequence)

    def words(self, sequence: int, tokens: int) -> reference.Text:
        """Return the position of the tokens that a prompt changes: the text, and its padding only if refined."""
        if self.parts is not None:
            return self._slices(tokens, "text", "picture")
        text = self.text(sequence, tokens)
        if self.padding_is_refined or not isinstance(text, slice):
            return text
        return slice(text.stop - (tokens + self.more_text - self.unread), text.stop)

    def image_tokens(self) -> int:
        """Return the number of tokens of the sequence that the noise changes."""
        if self.parts is not None:
            return sum(size for kind, size in self.parts(12) if kind in ("image", "sound"))
        *frames, height, width = self.latent[1:]
        tokens = (height // self.patch) * (width // self.patch) * (frames[0] if frames else 1)
        return -(-tokens // self.padded_to) * self.padded_to if self.padding_is_refined else tokens

    def reads_text(self, call: Call, tokens: int) -> bool:
        """Return True for a call whose image queries read the text, judged by shapes and module alone."""
        keys = call.k.shape[2]
        if self.text_first is None:
            return re.search(f"{self.text_modules}$", call.module) is not None and keys == tokens
        if "refiner" in call.module:
            return False  # a refiner of the text or of the image alone
        if self.parts is None:
            return keys > self.image_tokens()
        return call.mask is None and keys == sum(size for _, size in self.parts(tokens))

    def guided_output(self, call: Call, config: reference.Config, tokens: int) -> Tensor:
        """Return the output of a call that reads the text, with guidance, in fp64."""
        mask = rank_4(call.mask)
        if self.text_first is None:
            return reference.guided_attention(call.q, call.k, call.v, config, mask=mask)
        keys = call.k.shape[2]
        text = self.text(keys, tokens)
        out = reference.guided_joint_attention(call.q, call.k, call.v, text, config, mask=mask)
        if self.sound is not None:
            # The queries of the sound and of reference pictures are not guided.
            others = torch.ones(call.q.shape[2], dtype=torch.bool)
            others[reference.text_indices(self._slices(tokens, "image"), keys)] = False
            out[:, :, others] = reference.sparse_dense_attention(call.q, call.k, call.v, mask=mask)[1][:, :, others]
        return out

    def _slices(self, tokens: int, *kinds: str) -> list[slice]:
        """Return the parts of the keys that are of some kinds."""
        parts = [] if self.parts is None else self.parts(tokens)
        stops = accumulate(size for _, size in parts)
        return [slice(stop - size, stop) for (kind, size), stop in zip(parts, stops, strict=True) if kind in kinds]

    def sample(
        self,
        model: Any,
        *,
        tokens: int = 12,
        cfg: float = 1.0,
        seed: int = 1,
        prompt: int = 10,
        negative_tokens: int | None = None,
        other_token: bool = False,
        other_patch: bool = False,
    ) -> Tensor:
        """Run the host's sampler. Two options change the values of the first token of the text or of the image."""
        latent: Any = torch.zeros(1, *self.latent)
        if self.sound is not None:
            from comfy.nested_tensor import NestedTensor

            latent = NestedTensor([latent, torch.zeros(1, *self.sound)])
        noise = comfy.sample.prepare_noise(latent, seed)
        positive = self.prompt(prompt, tokens)
        if other_token and self.ids:
            positive[0][1]["text_input_ids"][:, 0] += 1
        elif other_token:
            positive[0][0][:, 0] *= -1
        if other_patch:
            picture = noise if self.sound is None else noise.unbind()[0]
            (picture if picture.ndim == 4 else picture[:, :, 0])[:, :, : self.patch, : self.patch] *= -1
        # HiDream O1 keeps what it computed of the last prompts.
        getattr(model.model.diffusion_model, "clear_kv_cache", lambda: None)()
        out = comfy.sample.sample(
            model,
            noise,
            2,
            cfg,
            "euler",
            "simple",
            positive,
            self.prompt(11, tokens if negative_tokens is None else negative_tokens),
            latent,
            disable_pbar=True,
            seed=seed,
        )
        return out if self.sound is None else torch.cat([stream.flatten() for stream in out.unbind()])


def rank_4(mask: Tensor | None) -> Tensor | None:
    """Add the dimension of the heads to a mask of rank 3."""
    return mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask


def unmasked(_: Generator, tokens: int) -> dict[str, Any]:
    """Return the mask of a prompt without padding, for models that count the tokens by it."""
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}
