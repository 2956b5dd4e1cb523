# SPDX-License-Identifier: GPL-3.0-or-later
"""One attention call of ComfyUI: its arguments bound by name, and its output with guidance.

This file is the only one that knows ComfyUI's calling conventions for attention, and the only one that calls
``gag_core`` while a model runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ...gag_core import GuidanceConfig, guided_attention, guided_joint_attention
from ...gag_core.numerics import mask_part
from .families import Layer
from .guidance import Guidance
from .host_attention import EXACT_ATTENTIONS, AttentionFunction, HostAttention
from .prompt_rows import RowGroup, are_told_apart, select, with_tokens
from .recorder import CallRecording
from .replacement import Read
from .text_position import TextPosition

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
# Devices on which torch's own attention returns the logsumexp, which gives the text's share of the attention.
_DEVICES_WITH_LOGSUMEXP = ("cpu", "cuda")


@dataclass
class AttentionCall:
    """One call of ComfyUI's attention, with its arguments bound by name.

    ``q``, ``k``, ``v`` are views of ``[B, H, N, D]`` in whatever layout the model passed them. ``mask`` is None or of
    rank 4.
    """

    function: AttentionFunction
    host: HostAttention
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
        batch, _, _, head_dim = self.q.shape
        # In newer hosts keys may have fewer heads than queries. Each key head then serves several query heads in a row.
        grouped = bound.get("enable_gqa", False)
        for name in ("k", "v"):
            tensor: Tensor = bound[name]
            if not heads_are_split:
                tensor = split_heads(tensor, tensor.shape[-1] // head_dim if grouped else heads, batch, head_dim)
            setattr(self, name, tensor.repeat_interleave(heads // tensor.shape[1], dim=1) if grouped else tensor)
        self.mask: Tensor | None = _rank_4(bound.get("mask"))
        self.scale: float | None = bound.get("scale")
        self._keep_heads_split: bool = bound.get("skip_output_reshape", False)

    @property
    def is_replaced(self) -> bool:
        """True if something other than exact softmax attention computes the host's part of this call."""
        has_other = self.host.previous is not None or bool(self.host.stored)
        return has_other or self.function.__name__ not in EXACT_ATTENTIONS

    def host_output(self) -> Tensor:
        """Return the host's own output, in the layout that the model expects."""
        return self.host(self.function, *self.args, **self.kwargs)

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

    def guided_joint(self, parts: list[JointPart], queries: slice | None) -> Tensor:
        """Return the output of a joint attention whose image queries read the text guided in some rows.

        Args:
            parts: the guided rows, with the text that they read and their settings.
            queries: the guided queries; None for all image queries.
        """
        all_rows = [part.rows for part in parts] == [slice(0, self.q.shape[0])]
        if all_rows and not self.is_replaced and self.q.device.type in _DEVICES_WITH_LOGSUMEXP:
            # The core computes the whole attention, because that gives the text's share along with it.
            (part,) = parts
            if queries is None:
                return self.to_host_layout(self._joint_part(part, slice(None), None))
            off = part._replace(config=replace(part.config, strength=0.0))
            before, after = slice(0, queries.start), slice(queries.stop, self.q.shape[2])
            pieces = [(off, before), (part, queries), (off, after)]
            return self.to_host_layout(torch.cat([self._joint_part(*piece, None) for piece in pieces], dim=2))
        base = self.host_output_by_head()
        out = base.clone()
        guided = slice(None) if queries is None else queries
        for part in parts:
            out[part.rows, :, guided] = self._joint_part(part, guided, base[part.rows, :, guided])
        return self.to_host_layout(out)

    def _joint_part(self, part: JointPart, queries: slice, base: Tensor | None) -> Tensor:
        return guided_joint_attention(
            self.q[part.rows, :, queries],
            self.k[part.rows],
            self.v[part.rows],
            part.text,
            part.config,
            base=base,
            mask=None if self.mask is None else mask_part(self.mask, rows=part.rows, queries=queries),
            scale=self.scale,
        )


class JointPart(NamedTuple):
    """Rows of a joint attention that read one text, and the settings of their guidance."""

    rows: slice
    text: tuple[slice, ...]
    config: GuidanceConfig


@dataclass
class TextLayers:
    """The text attentions of one model call: which layers and rows are guided, and who records them.

    Attributes:
        guidance: settings that act in this call.
        context_shape: ``(B, N)`` of the call's text.
        groups: rows of the call's text.
        recording: receiver of every text attention, None if nobody measures.
        reached: layers in which a row was guided, in the order of their calls.
        has_unknown_rows: True if rows were left alone because their prompt cannot be told.
        other_text: layers in which another node reads another text than the one that was handed to it.
    """

    guidance: Guidance
    context_shape: tuple[int, int]
    groups: list[RowGroup]
    recording: CallRecording | None = None
    reached: list[Layer] = field(default_factory=list)
    has_unknown_rows: bool = False
    other_text: set[Layer] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.caught = self.guidance.layers if self.recording is None else frozenset(self.guidance.order)
        self._guided = select(self.groups, self.guidance.apply_to)
        self._guides_all = self.guidance.apply_to == "both"
        self._are_told_apart = self._guides_all or are_told_apart(self.groups)

    def cross(self, call: AttentionCall, layer: Layer, groups: list[RowGroup] | None = None) -> Tensor:
        """Return the output of a layer's text cross-attention, in the layout that the model expects.

        Args:
            call: the attention call.
            layer: its layer.
            groups: rows of the text that arrived at the layer; None if it is the model call's own text.
        """
        own = self._of_call(self.groups if groups is None else groups, call.q.shape[0], call.k.shape[2])
        if self.recording is not None:
            self.recording.cross(layer, call.q, call.k, call.v, own, call.mask, call.scale)
        guided = self._select(layer, own)
        return call.guided_cross(guided, self.guidance.config) if guided else call.host_output()

    def joint(self, call: AttentionCall, layer: Layer, position: TextPosition) -> Tensor:
        """Return the output of a layer's joint attention, in the layout that the model expects."""
        own = self._of_call(self.groups, call.q.shape[0], self.context_shape[1])
        if self.recording is not None:
            recorded = own if self.guidance.family.repeats_text else with_tokens(own, self.context_shape[1])
            self.recording.joint(
                layer, call.q, call.k, call.v, position, self.context_shape[1], recorded, call.mask, call.scale
            )
        guided = self._select(layer, own)
        if not guided:
            return call.host_output()
        return call.guided_joint([self._joint_part(group, position) for group in guided], position.queries)

    def _joint_part(self, group: RowGroup, position: TextPosition) -> JointPart:
        """Return rows of a joint attention with their own text, without copies that ComfyUI added to it."""
        config, copies = self.guidance.config, self.context_shape[1] // group.tokens
        if copies == 1 or not self.guidance.family.repeats_text:
            return JointPart(group.rows, position.text, config)
        # Each copy has the same share of the attention.
        config = replace(config, strength=copies * config.strength)
        return JointPart(group.rows, position.with_tokens(group.tokens).text, config)

    def replaced(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        layer: Layer,
        groups: list[RowGroup] | None,
        reads: list[Read],
    ) -> Tensor:
        """Return ``out`` ``[B, N, H * D]``, which another node computed of these tensors, with guidance added.

        Args:
            out: the other node's output.
            q, k, v: queries, keys and values ``[B, N, H * D]`` that it was handed.
            heads: number of heads.
            layer: the layer.
            groups: rows of the text that arrived; None if it is the model call's own text.
            reads: tokens that the other node read, and its masks.
        """
        batch = q.shape[0]
        head_dim = q.shape[-1] // heads
        query, key, value, base = (split_heads(one, heads, batch, head_dim) for one in (q, k, v, out.to(q.dtype)))
        own = self._of_call(self.groups if groups is None else groups, batch, key.shape[2])
        if self.recording is not None:
            self.recording.cross(layer, query, key, value, own)
        if layer in self.guidance.layers and not reads:
            self.other_text.add(layer)
            return out
        guided = self._select(layer, own)
        if not guided:
            return out
        for tokens, mask in reads:
            part_keys, part_values = key[:, :, tokens], value[:, :, tokens]
            # A part of the text has no repeated tokens to leave out.
            part = guided if part_keys.shape[2] == key.shape[2] else with_tokens(guided, part_keys.shape[2])
            base = add_guidance(base, query, part_keys, part_values, part, self.guidance.config, mask=mask)
        return merge_heads(base).to(out.dtype)

    def _select(self, layer: Layer, groups: list[RowGroup]) -> list[RowGroup]:
        """Return the guided rows of a layer's attention call, and count the layer if there are any."""
        if layer not in self.guidance.layers:
            return []
        if groups is self.groups:
            guided, is_told = self._guided, self._are_told_apart
        else:
            guided = select(groups, self.guidance.apply_to)
            is_told = self._guides_all or are_told_apart(groups)
        self.has_unknown_rows |= not is_told
        if guided:
            self.reached.append(layer)
        return guided

    def _of_call(self, groups: list[RowGroup], batch: int, tokens: int) -> list[RowGroup]:
        """Return the rows of an attention call, whose batch or keys another node may have changed."""
        if groups[-1].rows.stop != batch:
            return [RowGroup(slice(0, batch), tokens, None)]
        if all(group.tokens <= tokens and tokens % group.tokens == 0 for group in groups):
            return groups
        # Other keys than the text's tokens: all of them count.
        return with_tokens(groups, tokens)


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
    for rows, tokens, _ in groups:
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


def split_heads(tensor: Tensor, heads: int, batch: int | None = None, head_dim: int | None = None) -> Tensor:
    """Return ``[B, N, H * D]`` as a view of ``[B, H, N, D]``; SD3 passes values as ``[B, N, H, D]`` already.

    With a ``batch``, keys and values of any other rank or batch are reshaped by it, as ComfyUI's attention does.
    """
    has_heads = tensor.ndim == 4 and tensor.shape[2] == heads and head_dim in (None, tensor.shape[3])
    if batch is not None and not has_heads and (tensor.ndim != 3 or tensor.shape[0] != batch):
        return rearrange(tensor.reshape(batch, -1, heads, tensor.shape[-1] // heads), "b n h d -> b h n d")
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
