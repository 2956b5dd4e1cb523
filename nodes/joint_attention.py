# SPDX-License-Identifier: GPL-3.0-or-later
"""Guidance where text and image tokens are attended to together: the transformers of the Flux kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..gag_core import guided_joint_attention
from .families import Layer
from .host import OVERRIDE, AttentionCall, batch_rows, guided_rows
from .run import Guidance, Run

# Where torch's own attention gives the logsumexp, from which the text's share of it follows.
_DEVICES_WITH_LOGSUMEXP = ("cpu", "cuda")


class GuidedJointAttention:
    """The patches of one model call; made for it and dropped with it."""

    def __init__(self, guidance: Guidance, run: Run, context: Tensor, options: dict[str, Any]) -> None:
        self.guidance = guidance
        self.run = run
        self.kinds = options.get("cond_or_uncond", [])
        self.previous = options.get(OVERRIDE)
        self.batch, self.text_tokens = context.shape[:2]
        self.calls = 0

    def installed(self, options: dict[str, Any]) -> dict[str, Any]:
        """The transformer options with the patches; ``options`` as it came if no row is to be guided."""
        if not guided_rows(self.guidance.apply_to, self.batch, self.kinds):
            self.run.no_positive_rows[self.guidance] += 1
            return options
        patches = options.get("patches", {})
        # Other nodes' patches of this kind may put tokens in front of the text; ours comes last and counts them all.
        after_input = [*patches.get("post_input", []), self._after_input]
        return {**options, "patches": {**patches, "post_input": after_input}, OVERRIDE: self._override}

    def _after_input(self, args: dict[str, Any]) -> dict[str, Any]:
        self.text_tokens = args["txt"].shape[1]
        return args

    def _override(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        call = AttentionCall(function, self.previous, args, kwargs)
        layer = self._layer(kwargs.get("transformer_options") or {})
        if layer not in self.guidance.layers or call.q.shape[2] <= self.text_tokens:
            return call.host_output()
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
            slice(0, self.text_tokens),
            self.guidance.config,
            base=base,
            mask=batch_rows(call.mask, rows),
            scale=call.scale,
        )

    def _layer(self, options: dict[str, Any]) -> Layer | None:
        if "block_type" in options and "block_index" in options:
            return Layer(options["block_type"], options["block_index"])
        # Hosts before 0.3.75 do not say where they are; the blocks run in order, one attention each.
        self.calls += 1
        return self.guidance.order[self.calls - 1] if self.calls <= len(self.guidance.order) else None
