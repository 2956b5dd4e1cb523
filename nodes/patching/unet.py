# SPDX-License-Identifier: GPL-3.0-or-later
"""Hooks of one model call of a UNet, where text cross-attention is the host's ``attn2``.

A UNet's self-attention and cross-attention look alike to an attention override. They have the same shapes where a level
has as many image tokens as the text has. But ComfyUI calls its attn1 and attn2 patches just before each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .attention_call import OVERRIDE, AttentionCall, TextLayers, host_attention
from .families import Layer


class GuidedUNet:
    """Hooks of one model call of a UNet; made for it and dropped after it."""

    def __init__(self, text: TextLayers, options: dict[str, Any]) -> None:
        self.text = text
        self.previous = options.get(OVERRIDE)
        # The text attention whose call comes next, None before a self-attention.
        self.expected: Layer | None = None

    def install(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the transformer options with the hooks."""
        patches = options.get("patches", {})
        replacements = options.get("patches_replace", {})
        wrapped = {key: self._wrap(replacement) for key, replacement in replacements.get("attn2", {}).items()}
        return {
            **options,
            "patches": {
                **patches,
                "attn1_patch": [*patches.get("attn1_patch", []), self._before_self_attention],
                "attn2_patch": [*patches.get("attn2_patch", []), self._before_cross_attention],
            },
            "patches_replace": {**replacements, "attn2": wrapped},
            OVERRIDE: self._override,
        }

    def _before_self_attention(
        self, query: Tensor, key: Tensor, value: Tensor, _: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.expected = None
        return query, key, value

    def _before_cross_attention(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        part, block = options.get("block", ("", 0))
        layer = Layer(part, block, options.get("block_index", 0))
        self.expected = layer if layer in self.text.caught else None
        return query, key, value

    def _override(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        layer, self.expected = self.expected, None
        if layer is None:
            return host_attention(function, self.previous, *args, **kwargs)
        return self.text.cross(AttentionCall(function, self.previous, args, kwargs), layer)

    def _wrap(self, replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return an attn2 replacement of another node, such as an image adapter, with guidance added to its output."""

        def guided_replacement(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
            layer, self.expected = self.expected, None
            out = replacement(query, key, value, options)
            return out if layer is None else self.text.replaced(out, query, key, value, options["n_heads"], layer)

        return guided_replacement
