# SPDX-License-Identifier: GPL-3.0-or-later
"""One attention call of ComfyUI: its arguments bound by name, and its output with guidance.

This file is the only one that knows ComfyUI's calling conventions for attention, and the only one that calls
``gag_core`` while a model runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from torch import Tensor

from ...gag_core import GuidanceConfig, guided_attention, guided_joint_attention
from ...gag_core.numerics import mask_part
from .families import Layer
from .guidance import Guidance
from .prompt_rows import RowGroup, guided_rows, intersect
from .recorder import CallRecording

OVERRIDE = "optimized_attention_override"
# Positional parameters of ComfyUI's attention functions. Models differ in which of them they pass by name.
_ATTENTION_PARAMETERS = (
    "q",
    "k",
    "v",
    "heads",
    "mask",
    "attn_precision",
    "skip_reshape",
    "skip_output_reshape",
)
# ComfyUI's attention functions that compute exact softmax attention (sage attention quantises it).
_EXACT_ATTENTIONS = {
    "attention_basic",
    "attention_sub_quad",
    "attention_split",
    "attention_pytorch",
    "attention_xformers",
    "attention_flash",
}
# Devices on which torch's own attention returns the logsumexp, which gives the text's share of the attention.
_DEVICES_WITH_LOGSUMEXP = ("cpu", "cuda")

AttentionFunction = Callable[..., Tensor]
Override = Callable[..., Tensor]


@dataclass
class AttentionCall:
    """One call of ComfyUI's attention, with its arguments bound by name.

    ``q``, ``k``, ``v`` are views of ``[B, H, N, D]`` in whatever layout the model passed them. ``mask`` is None or of
    rank 4.
    """

    function: AttentionFunction
    previous: Override | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        bound = {**dict(zip(_ATTENTION_PARAMETERS, self.args, strict=False)), **self.kwargs}
        heads = bound["heads"]
        heads_are_split = bound.get("skip_reshape", False)
        self.q = bound["q"] if heads_are_split else split_heads(bound["q"], heads)
        # In newer hosts keys may have fewer heads than queries. Each key head then serves several query heads in a row.
        grouped = bound.get("enable_gqa", False)
        for name in ("k", "v"):
            tensor: Tensor = bound[name]
            if not heads_are_split:
                tensor = split_heads(tensor, tensor.shape[-1] // self.q.shape[3] if grouped else heads)
            setattr(self, name, tensor.repeat_interleave(heads // tensor.shape[1], dim=1) if grouped else tensor)
        self.mask: Tensor | None = _rank_4(bound.get("mask"))
        self.scale: float | None = bound.get("scale")
        self._keep_heads_split: bool = bound.get("skip_output_reshape", False)

    @property
    def is_replaced(self) -> bool:
        """True if something other than exact softmax attention computes the host's part of this call."""
        return self.previous is not None or self.function.__name__ not in _EXACT_ATTENTIONS

    def host_output(self) -> Tensor:
        """Return the host's own output, in the layout that the model expects."""
        return host_attention(self.function, self.previous, *self.args, **self.kwargs)

    def host_output_by_head(self) -> Tensor:
        """Return the host's own output as a view of ``[B, H, N, D]``."""
        out = self.host_output()
        return out if self._keep_heads_split else split_heads(out, self.q.shape[1])

    def to_host_layout(self, out: Tensor) -> Tensor:
        """Return ``[B, H, N, D]`` in the layout that the model expects."""
        return out if self._keep_heads_split else merge_heads(out)

    def guided_cross(self, groups: list[RowGroup], config: GuidanceConfig) -> Tensor:
        """Return the output of a text cross-attention with guidance in the rows of ``groups``."""
        if not self.is_replaced and len(groups) == 1 and groups[0].rows == slice(0, self.q.shape[0]):
            # All rows are guided and the host's part is plain softmax attention, which guidance computes anyway.
            tokens = groups[0].tokens
            k, v = self.k[:, :, :tokens], self.v[:, :, :tokens]
            mask = None if self.mask is None else mask_part(self.mask, keys=slice(tokens))
            return self.to_host_layout(guided_attention(self.q, k, v, config, mask=mask, scale=self.scale))
        base = self.host_output_by_head()
        return self.to_host_layout(
            add_guidance(base, self.q, self.k, self.v, groups, config, mask=self.mask, scale=self.scale)
        )

    def guided_joint(self, rows: list[slice], text: slice, config: GuidanceConfig) -> Tensor:
        """Return the output of a joint attention whose image queries read the tokens ``text`` guided in some rows."""
        all_rows = rows == [slice(0, self.q.shape[0])]
        if all_rows and not self.is_replaced and self.q.device.type in _DEVICES_WITH_LOGSUMEXP:
            # The core computes the whole attention, because that gives the text's share along with it.
            return self.to_host_layout(self._joint_part(slice(None), text, config, None))
        base = self.host_output_by_head()
        out = base.clone()
        for part in rows:
            out[part] = self._joint_part(part, text, config, base[part])
        return self.to_host_layout(out)

    def _joint_part(self, rows: slice, text: slice, config: GuidanceConfig, base: Tensor | None) -> Tensor:
        return guided_joint_attention(
            self.q[rows],
            self.k[rows],
            self.v[rows],
            text,
            config,
            base=base,
            mask=None if self.mask is None else mask_part(self.mask, rows=rows),
            scale=self.scale,
        )


@dataclass
class TextLayers:
    """The text attentions of one model call: which layers and rows are guided, and who records them.

    Attributes:
        guidance: settings that act in this call.
        context_shape: ``(B, N)`` of the call's text.
        kinds: prompt of each part of the batch, 0 the positive one.
        groups: rows of the batch with the number of their distinct tokens.
        recording: receiver of every text attention, None if nobody measures.
        reached: layers that were guided, in the order of their calls.
    """

    guidance: Guidance
    context_shape: tuple[int, int]
    kinds: list[int]
    groups: list[RowGroup]
    recording: CallRecording | None = None
    reached: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.caught = self.guidance.layers if self.recording is None else frozenset(self.guidance.order)
        self._rows = guided_rows(self.guidance.apply_to, self.context_shape[0], self.kinds)
        self._guided_groups = intersect(self.groups, self._rows)

    def cross(self, call: AttentionCall, layer: Layer) -> Tensor:
        """Return the output of a layer's text cross-attention, in the layout that the model expects."""
        batch, tokens = call.q.shape[0], call.k.shape[2]
        if self.recording is not None:
            every = self._all_groups(batch, tokens)
            self.recording.cross(layer, call.q, call.k, call.v, every, call.mask, call.scale)
        if layer not in self.guidance.layers:
            return call.host_output()
        self.reached.append(layer)
        return call.guided_cross(self._groups(batch, tokens), self.guidance.config)

    def joint(self, call: AttentionCall, layer: Layer, text: slice) -> Tensor:
        """Return the output of a layer's joint attention, in the layout that the model expects."""
        if self.recording is not None:
            self.recording.joint(layer, call.q, call.k, call.v, text, call.mask, call.scale)
        if layer not in self.guidance.layers:
            return call.host_output()
        self.reached.append(layer)
        return call.guided_joint(self._guided_rows(call.q.shape[0]), text, self.guidance.config)

    def replaced(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, layer: Layer) -> Tensor:
        """Return ``out`` ``[B, N, H * D]``, which another node computed of these tensors, with guidance added."""
        query, key, value, base = (split_heads(tensor, heads) for tensor in (q, k, v, out.to(q.dtype)))
        batch, tokens = query.shape[0], key.shape[2]
        if self.recording is not None:
            self.recording.cross(layer, query, key, value, self._all_groups(batch, tokens))
        if layer not in self.guidance.layers:
            return out
        self.reached.append(layer)
        groups = self._groups(batch, tokens)
        return merge_heads(add_guidance(base, query, key, value, groups, self.guidance.config)).to(out.dtype)

    def _all_groups(self, batch: int, tokens: int) -> list[RowGroup]:
        """Return all rows. Where another node's patch put a context of its own, all of its tokens count."""
        return self.groups if (batch, tokens) == self.context_shape else [RowGroup(slice(0, batch), tokens)]

    def _groups(self, batch: int, tokens: int) -> list[RowGroup]:
        """Return the guided rows, split where the number of text tokens changes."""
        if (batch, tokens) == self.context_shape:
            return self._guided_groups
        return [RowGroup(rows, tokens) for rows in self._guided_rows(batch)]

    def _guided_rows(self, batch: int) -> list[slice]:
        if batch == self.context_shape[0]:
            return self._rows
        return guided_rows(self.guidance.apply_to, batch, self.kinds)


def add_guidance(
    base: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: list[RowGroup],
    config: GuidanceConfig,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return a copy of ``base`` ``[B, H, N, D]`` with guidance added in the rows of ``groups``."""
    out = base.clone()
    for rows, tokens in groups:
        out[rows] = guided_attention(
            q[rows],
            k[rows, :, :tokens],
            v[rows, :, :tokens],
            config,
            base=base[rows],
            mask=None if mask is None else mask_part(mask, rows=rows, keys=slice(tokens)),
            scale=scale,
        )
    return out


def host_attention(function: AttentionFunction, previous: Override | None, *args: Any, **kwargs: Any) -> Tensor:
    """Run an attention call as it would run without GAG."""
    return function(*args, **kwargs) if previous is None else previous(function, *args, **kwargs)


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """Return ``[B, N, H * D]`` as a view of ``[B, H, N, D]``; SD3 passes values as ``[B, N, H, D]`` already."""
    if tensor.ndim == 4:
        return rearrange(tensor, "b n h d -> b h n d")
    return rearrange(tensor, "b n (h d) -> b h n d", h=heads)


def merge_heads(tensor: Tensor) -> Tensor:
    """Return ``[B, H, N, D]`` as ``[B, N, H * D]``."""
    return rearrange(tensor, "b h n d -> b n (h d)")


def _rank_4(mask: Tensor | None) -> Tensor | None:
    """Add the dimensions that ComfyUI's masks leave out: the heads, or the batch and the heads."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask.unsqueeze(1)
