# SPDX-License-Identifier: GPL-3.0-or-later
"""Guidance in transformers.

Of most families the host lets blocks be wrapped one by one (``patches_replace["dit"]``). The wrapper sees what goes
into each block, so it tells which block runs and how many tokens of the sequence are text, on every host and beside
other nodes' wrappers; token refiners and control networks run outside of these blocks. Of the other families the
attention calls are told by their order, and taken only if their shapes agree with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..gag_core import guided_joint_attention
from .cross_attention import TextCrossAttention
from .families import Layer
from .host import OVERRIDE, AttentionCall, batch_rows, guided_rows
from .run import Guidance, Run

BlockArgs = dict[str, Any]
Block = Callable[[BlockArgs, dict[str, Any]], dict[str, Any]]
# Where torch's own attention gives the logsumexp, from which the text's share of it follows.
_DEVICES_WITH_LOGSUMEXP = ("cpu", "cuda")


class GuidedBlocks:
    """The patches of one model call; made for it and dropped with it."""

    def __init__(self, guidance: Guidance, run: Run, context: Tensor, options: dict[str, Any]) -> None:
        self.guidance = guidance
        self.run = run
        self.kinds = options.get("cond_or_uncond", [])
        self.previous = options.get(OVERRIDE)
        self.context_tokens = context.shape[1]
        self.layer: Layer | None = None
        self.calls = 0
        # The text stream; a block that has the streams joined does not show it, those before it did.
        self.stream_tokens = self.context_tokens
        self.all_tokens = 0
        # What the calls so far were, where they are told by order.
        self.refined: list[int] = []
        self.after_self_attention = False
        self.cross = (
            TextCrossAttention(guidance, run, context, options) if guidance.family.attention == "cross" else None
        )

    def installed(self, options: dict[str, Any]) -> dict[str, Any]:
        """The transformer options with the patches."""
        if self.guidance.family.refiners is not None:
            return {**options, OVERRIDE: self._override}
        replacements = options.get("patches_replace", {})
        blocks = dict(replacements.get("dit", {}))
        for layer in self.guidance.order:
            key = (layer.part, layer.block)
            blocks[key] = self._around(layer, blocks.get(key))
        return {**options, "patches_replace": {**replacements, "dit": blocks}, OVERRIDE: self._override}

    def _around(self, layer: Layer, replacement: Block | None) -> Block:
        def guided_block(args: BlockArgs, extra: dict[str, Any]) -> dict[str, Any]:
            self.all_tokens = args["img"].shape[1]
            if "txt" in args:
                self.stream_tokens = args["txt"].shape[1]
                self.all_tokens += self.stream_tokens
            self.calls = 0
            self.layer = layer if layer in self.guidance.layers else None
            try:
                return extra["original_block"](args) if replacement is None else replacement(args, extra)
            finally:
                self.layer = None

        return guided_block

    def _override(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        call = AttentionCall(function, self.previous, args, kwargs)
        if self.guidance.family.refiners is None:
            layer = self._layer_of_wrapped(call)
        else:
            layer = self._layer_by_order(call)
        if layer not in self.guidance.layers:
            return call.host_output()
        return self._joint(call, layer) if self.cross is None else self.cross.guided(call, layer)

    def _layer_of_wrapped(self, call: AttentionCall) -> Layer | None:
        """The block that runs, if this call in it is the one that reads the text."""
        number, self.calls = self.calls, self.calls + 1
        if self.cross is not None:
            return self.layer if number == self.guidance.text_call else None
        # A block may have an attention among image tokens alone besides the joint one (SD3.5 medium).
        joint = call.q.shape[2] == call.k.shape[2] == self.all_tokens
        return self.layer if joint else None

    def _layer_by_order(self, call: AttentionCall) -> Layer | None:
        """The block whose turn it is, if the shapes are those of its reading of the text."""
        queries, keys = call.q.shape[2], call.k.shape[2]
        if self.cross is not None:
            is_text = self.after_self_attention and keys == self.context_tokens
            self.after_self_attention = not is_text and queries == keys
        elif len(self.refined) < self.guidance.refiner_calls:
            self.refined.append(queries)
            is_text = False
        else:
            # The text is refined first, the image last; joined, they have the tokens of both.
            ends = self.refined[:1] + self.refined[-1:]
            self.stream_tokens, self.all_tokens = self.refined[0] if ends else 0, sum(ends)
            is_text = bool(ends) and queries == keys == self.all_tokens
        if not is_text:
            return None
        number, self.calls = self.calls, self.calls + 1
        return self.guidance.order[number] if number < len(self.guidance.order) else None

    def _joint(self, call: AttentionCall, layer: Layer) -> Tensor:
        self.run.count(self.guidance, layer)
        rows = guided_rows(self.guidance.apply_to, call.q.shape[0], self.kinds)
        whole = rows == [slice(0, call.q.shape[0])]
        if whole and not call.replaced and call.q.device.type in _DEVICES_WITH_LOGSUMEXP:
            # Leaving the whole attention to the core gives the text's share along with it.
            return call.as_host_output(self._guided(call, slice(None), None))
        base = call.host_output_by_head()
        out = base.clone()
        for chosen in rows:
            out[chosen] = self._guided(call, chosen, base[chosen])
        return call.as_host_output(out)

    def _guided(self, call: AttentionCall, rows: slice, base: Tensor | None) -> Tensor:
        return guided_joint_attention(
            call.q[rows],
            call.k[rows],
            call.v[rows],
            self._text(),
            self.guidance.config,
            base=base,
            mask=batch_rows(call.mask, rows),
            scale=call.scale,
        )

    def _text(self) -> slice:
        """Where the text is in the joint sequence."""
        if not self.guidance.family.text_first:
            return slice(self.all_tokens - self.stream_tokens, self.all_tokens)
        if self.guidance.family.refiners is not None:
            # Padding behind the prompt has been refined together with it.
            return slice(0, self.stream_tokens)
        # Registers, and image tokens that adapters add, stand in front of the prompt's own tokens.
        return slice(max(0, self.stream_tokens - self.context_tokens), self.stream_tokens)
