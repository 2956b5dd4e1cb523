# SPDX-License-Identifier: GPL-3.0-or-later
"""Hooks of one model call of a UNet, where text cross-attention is the host's ``attn2``.

A UNet's self-attention and cross-attention look alike to an attention override. They have the same shapes where a level
has as many image tokens as the text has. But ComfyUI calls its attn1 and attn2 patches just before each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .attention_call import AttentionCall, TextLayers
from .families import Layer, text_attentions
from .host_attention import OVERRIDE, HostAttention, StoredAttentions, offered
from .prompt_rows import PromptRows, RowGroup, by_batch
from .replacement import Read, ReadTokens


class GuidedUNet:
    """Hooks of one model call of a UNet; made for it and dropped after it."""

    def __init__(
        self, text: TextLayers, prompts: PromptRows, stored: StoredAttentions, options: dict[str, Any]
    ) -> None:
        self.text = text
        self.prompts = prompts
        self.stored = stored
        self.options = options
        self.host = HostAttention(options)
        # The text attention whose call comes next, None before a self-attention; and the rows of its text.
        self.expected: Layer | None = None
        self.groups: list[RowGroup] | None = None
        # The text before the attn2 patches of other nodes.
        self.unpatched: Tensor | None = None

    def install(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the transformer options with the hooks."""
        patches = options.get("patches", {})
        replacements = options.get("patches_replace", {})
        wrapped = {key: self._wrap(replacement) for key, replacement in replacements.get("attn2", {}).items()}
        others = patches.get("attn2_patch", [])
        first = [self._before_patches] if others else []
        return {
            **options,
            "patches": {
                **patches,
                "attn1_patch": [*patches.get("attn1_patch", []), self._before_self_attention],
                "attn2_patch": [*first, *others, self._before_cross_attention],
            },
            "patches_replace": {**replacements, "attn2": wrapped},
            OVERRIDE: offered(self._override, self.host.previous, lambda: self.expected is not None),
        }

    @contextmanager
    def watch(self, diffusion_model: Any) -> Iterator[None]:
        """Watch the text attentions whose forward another node replaced, while the model call runs.

        Such a forward may run ComfyUI's attention without the transformer options, so that no override is called. The
        projections of the attention show its queries, keys and values, and its output.
        """
        with self.host.watch(self.stored), ExitStack() as hooks:
            for layer, attention in text_attentions(diffusion_model, self.text.guidance.family).items():
                if layer in self.text.caught and "forward" in vars(attention):
                    self._follow(attention, layer, hooks)
            yield

    def _follow(self, attention: Any, layer: Layer, hooks: ExitStack) -> None:
        projected: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def kept(_: Any, __: Any, out: Tensor) -> None:
                projected[name] = out

            return kept

        def add(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self.expected != layer or len(projected) < 3:
                return None  # the override or a replacement has seen this attention
            self.expected = None
            q, k, v = (projected.pop(name) for name in ("q", "k", "v"))
            out = self.text.replaced(args[0], q, k, v, attention.heads, layer, self.groups, [Read(slice(None))])
            return (out, *args[1:])

        for name in ("q", "k", "v"):
            hooks.enter_context(attention.get_submodule(f"to_{name}").register_forward_hook(keep(name)))
        hooks.enter_context(attention.to_out.register_forward_pre_hook(add))

    def _before_self_attention(
        self, query: Tensor, key: Tensor, value: Tensor, _: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.expected = None
        return query, key, value

    def _before_patches(
        self, query: Tensor, key: Tensor, value: Tensor, _: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.unpatched = key
        return query, key, value

    def _before_cross_attention(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        part, block = options.get("block", ("", 0))
        layer = Layer(part, block, options.get("block_index", 0))
        self.expected = layer if layer in self.text.caught else None
        self.groups = None
        is_patched = self.unpatched is not None and not (key is self.unpatched and value is self.unpatched)
        if is_patched and self.expected is not None:
            text, values = by_batch(key, query.shape[0]), by_batch(value, query.shape[0])
            own_values = None if value is key or values.shape[:2] != text.shape[:2] else values
            self.groups = self.prompts.arrived_groups(text, own_values, self.options, layer, self.text.groups)
        return query, key, value

    def _override(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        layer, self.expected = self.expected, None
        if layer is None:
            return self.host(function, *args, **kwargs)
        return self.text.cross(AttentionCall(function, self.host, args, kwargs), layer, self.groups)

    def _wrap(self, replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return an attn2 replacement of another node, such as an image adapter, with guidance added to its output."""

        def guided_replacement(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
            layer, self.expected = self.expected, None
            if layer is None:
                return replacement(query, key, value, options)
            read = ReadTokens(by_batch(key, query.shape[0]), query.shape[1])
            # torch.compile traces no such mode: there the replacement is taken to read all of the text.
            with nullcontext() if torch.compiler.is_compiling() else read:
                out = replacement(query, key, value, options)
            reads = [Read(slice(None))] if torch.compiler.is_compiling() else read.reads
            return self.text.replaced(out, query, key, value, options["n_heads"], layer, self.groups, reads)

        return guided_replacement
