# SPDX-License-Identifier: GPL-3.0-or-later
"""Guidance where the text has an attention of its own; and the patches of UNets, where that is attn2.

A probe sees the same attentions in the same place, those that are not guided as well.

A UNet's self and cross attention look alike to an attention override, and have the same shapes where a level has as
many image tokens as the text has. But the host calls its attn1 and attn2 patches just before each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..gag_core import guided_attention
from .families import Layer
from .host import (
    OVERRIDE,
    AttentionCall,
    batch_rows,
    distinct_tokens,
    guided_rows,
    host_attention,
    merge_heads,
    split_heads,
)
from .recording import CallRecording
from .run import Run
from .settings import Guidance

# Rows of a batch, and how many of their first text tokens are to be read.
Groups = list[tuple[slice, int]]


class TextCrossAttention:
    """Guides an attention that reads the text alone, with the rows and tokens of one model call.

    ``reached`` lists the layers that were guided in it; ``recording`` is where a probe has it measured.
    """

    def __init__(
        self,
        guidance: Guidance,
        run: Run,
        context: Tensor,
        options: dict[str, Any],
        recording: CallRecording | None = None,
    ) -> None:
        self.guidance = guidance
        self.recording = recording
        self.reached: list[Layer] = []
        self.kinds = run.kinds(options)
        self.context_shape = tuple(context.shape[:2])
        self.token_counts = distinct_tokens(context, options, run.token_counts)

    def result(self, call: AttentionCall, layer: Layer) -> Tensor:
        """What the model gets of its attention call, in the layout it expects: guided where that is asked for."""
        if self.recording is not None:
            every = self._groups(call.q, call.k, [slice(0, call.q.shape[0])])
            self.recording.cross(layer, call.q, call.k, call.v, every, call.mask, call.scale)
        if layer not in self.guidance.layers:
            return call.host_output()
        self.reached.append(layer)
        groups = self._guided_groups(call.q, call.k)
        if call.replaced or [rows for rows, _ in groups] != [slice(0, call.q.shape[0])]:
            base = call.host_output_by_head()
            return call.as_host_output(self._added_to(base, call.q, call.k, call.v, groups, call.mask, call.scale))
        # All rows are guided, and the host's part is plain softmax attention, which guidance has at hand anyway.
        ((_, tokens),) = groups
        k, v, mask = call.k[:, :, :tokens], call.v[:, :, :tokens], _keys(call.mask, tokens)
        return call.as_host_output(guided_attention(call.q, k, v, self.guidance.config, mask=mask, scale=call.scale))

    def added_to(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int, layer: Layer) -> Tensor:
        """``out`` ``[B, N, H * D]``, which somebody else made of these tensors, with guidance added if asked for."""
        q, k, v, base = (split_heads(tensor, heads) for tensor in (query, key, value, out.to(query.dtype)))
        if self.recording is not None:
            self.recording.cross(layer, q, k, v, self._groups(q, k, [slice(0, q.shape[0])]))
        if layer not in self.guidance.layers:
            return out
        self.reached.append(layer)
        return merge_heads(self._added_to(base, q, k, v, self._guided_groups(q, k))).to(out.dtype)

    def _guided_groups(self, q: Tensor, k: Tensor) -> Groups:
        return self._groups(q, k, guided_rows(self.guidance.apply_to, q.shape[0], self.kinds))

    def _groups(self, q: Tensor, k: Tensor, chosen: list[slice]) -> Groups:
        """Rows, split where the number of text tokens changes."""
        if (q.shape[0], k.shape[2]) != self.context_shape:
            # Another node's patch put its own context there.
            return [(rows, k.shape[2]) for rows in chosen]
        groups = []
        for rows in chosen:
            for counted, tokens in self.token_counts:
                start, stop = max(rows.start, counted.start), min(rows.stop, counted.stop)
                if start < stop:
                    groups.append((slice(start, stop), tokens))
        return groups

    def _added_to(
        self,
        base: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: Groups,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """``base`` with guidance added in the rows of ``groups``."""
        out = base.clone()
        for rows, tokens in groups:
            out[rows] = guided_attention(
                q[rows],
                k[rows, :, :tokens],
                v[rows, :, :tokens],
                self.guidance.config,
                base=base[rows],
                mask=_keys(batch_rows(mask, rows), tokens),
                scale=scale,
            )
        return out


class GuidedUNet:
    """The patches of one model call of a UNet; made for it and dropped with it."""

    def __init__(
        self,
        guidance: Guidance,
        run: Run,
        context: Tensor,
        options: dict[str, Any],
        recording: CallRecording | None = None,
    ) -> None:
        self.text = TextCrossAttention(guidance, run, context, options, recording)
        self.caught = guidance.layers if recording is None else frozenset(guidance.order)
        self.reached = self.text.reached
        self.previous = options.get(OVERRIDE)
        self.expected: Layer | None = None

    def installed(self, options: dict[str, Any]) -> dict[str, Any]:
        """The transformer options with the patches."""
        patches = options.get("patches", {})
        replacements = options.get("patches_replace", {})
        around = {key: self._around(replacement) for key, replacement in replacements.get("attn2", {}).items()}
        return {
            **options,
            "patches": {
                **patches,
                "attn1_patch": [*patches.get("attn1_patch", []), self._before_self_attention],
                "attn2_patch": [*patches.get("attn2_patch", []), self._before_cross_attention],
            },
            "patches_replace": {**replacements, "attn2": around},
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
        part, number = options.get("block", ("", 0))
        layer = Layer(part, number, options.get("block_index", 0))
        self.expected = layer if layer in self.caught else None
        return query, key, value

    def _override(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        layer, self.expected = self.expected, None
        if layer is None:
            return host_attention(function, self.previous, *args, **kwargs)
        return self.text.result(AttentionCall(function, self.previous, args, kwargs), layer)

    def _around(self, replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Guidance around an attn2 replacement that another node set, such as an image adapter.

        It runs as it is; what guidance changes in the reading of the text is added to its output.
        """

        def guided_replacement(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
            layer, self.expected = self.expected, None
            out = replacement(query, key, value, options)
            return out if layer is None else self.text.added_to(out, query, key, value, options["n_heads"], layer)

        return guided_replacement


def _keys(mask: Tensor | None, tokens: int) -> Tensor | None:
    return mask if mask is None or mask.shape[3] == 1 else mask[..., :tokens]
