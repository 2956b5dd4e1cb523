# SPDX-License-Identifier: GPL-3.0-or-later
"""What ComfyUI does in ways of its own, in one place: calling conventions, batches, step positions, messages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("comfyui-gag")

# Positional parameters of the host's attention functions; models differ in which of them they pass by name.
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
# The host's attention functions that compute softmax attention as it stands (sage quantises it).
_EXACT_ATTENTIONS = {
    "attention_basic",
    "attention_sub_quad",
    "attention_split",
    "attention_pytorch",
    "attention_xformers",
    "attention_flash",
}
OVERRIDE = "optimized_attention_override"
_POSITIVE = 0
# Two prompts are batched if neither is repeated more than 4 times; a third may triple their common multiple.
_MOST_REPEATS = 12

AttentionFunction = Callable[..., Tensor]
Override = Callable[..., Tensor]


@dataclass
class AttentionCall:
    """One call of the host's attention, with its arguments bound by name.

    ``q``, ``k``, ``v`` are views of ``[B, H, N, D]`` whatever the model passed; ``mask`` is None or of rank 4.
    """

    function: AttentionFunction
    previous: Override | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        bound = {**dict(zip(_ATTENTION_PARAMETERS, self.args, strict=False)), **self.kwargs}
        heads = bound["heads"]
        separate = bound.get("skip_reshape", False)
        self.q, self.k, self.v = (
            bound[name] if separate else split_heads(bound[name], heads) for name in ("q", "k", "v")
        )
        self.mask: Tensor | None = rank_4(bound.get("mask"))
        self.scale: float | None = bound.get("scale")
        self._separate_output: bool = bound.get("skip_output_reshape", False)

    @property
    def replaced(self) -> bool:
        """Whether somebody else's attention computes the host's part of this call."""
        return self.previous is not None or self.function.__name__ not in _EXACT_ATTENTIONS

    def host_output(self) -> Tensor:
        """The host's own result, in the layout the model expects."""
        if self.previous is not None:
            return self.previous(self.function, *self.args, **self.kwargs)
        return self.function(*self.args, **self.kwargs)

    def host_output_by_head(self) -> Tensor:
        """The host's own result as a view of ``[B, H, N, D]``."""
        out = self.host_output()
        return out if self._separate_output else split_heads(out, self.q.shape[1])

    def as_host_output(self, out: Tensor) -> Tensor:
        """``[B, H, N, D]`` in the layout the model expects."""
        return out if self._separate_output else merge_heads(out)


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """``[B, N, H * D]`` to a view of ``[B, H, N, D]``; SD3 passes values as ``[B, N, H, D]`` already."""
    return (tensor if tensor.ndim == 4 else tensor.unflatten(-1, (heads, -1))).transpose(1, 2)


def merge_heads(tensor: Tensor) -> Tensor:
    """``[B, H, N, D]`` to ``[B, N, H * D]``."""
    return tensor.transpose(1, 2).flatten(2)


def rank_4(mask: Tensor | None) -> Tensor | None:
    """The host's masks leave out the heads, or the batch and the heads."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask.unsqueeze(1)


def batch_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """A mask of rank 4 for some of the batch's rows."""
    return mask if mask is None or mask.shape[0] == 1 else mask[rows]


def guided_rows(apply_to: str, batch: int, cond_or_uncond: list[int]) -> list[slice]:
    """The rows of a batch that are to be guided: all, or those of the positive prompt.

    The host puts the prompts' rows one after the other, in equal parts, in the order of ``cond_or_uncond``.
    """
    if apply_to == "both":
        return [slice(0, batch)]
    if not cond_or_uncond or batch % len(cond_or_uncond):
        return []
    size = batch // len(cond_or_uncond)
    rows: list[slice] = []
    for number, kind in enumerate(cond_or_uncond):
        if kind != _POSITIVE:
            continue
        if rows and rows[-1].stop == number * size:
            rows[-1] = slice(rows[-1].start, (number + 1) * size)
        else:
            rows.append(slice(number * size, (number + 1) * size))
    return rows


def distinct_tokens(context: Tensor, options: dict[str, Any], known: dict[Any, int]) -> list[tuple[slice, int]]:
    """Batch rows of a text context ``[B, N, C]`` with the number of its tokens before the host repeated them.

    To batch prompts of different lengths the host repeats each up to the least common multiple. Softmax does not
    notice, entmax does: without this, what the positive prompt does would depend on the negative one's length.

    Args:
        context: the text of all rows of one model call.
        options: the transformer options of that call.
        known: what was found so far in this run, by the prompt's id; each prompt is compared once, because the
            comparison waits for the device.
    """
    ids = options.get("uuids") or []
    batch, tokens = context.shape[:2]
    if len(ids) < 2 or batch % len(ids):
        return [(slice(0, batch), tokens)]
    size = batch // len(ids)
    found: list[tuple[slice, int]] = []
    for number, prompt in enumerate(ids):
        rows = slice(number * size, (number + 1) * size)
        if (prompt, tokens) not in known:
            known[prompt, tokens] = _period(context[rows])
        period = known[prompt, tokens]
        if found and found[-1][1] == period:
            found[-1] = (slice(found[-1][0].start, rows.stop), period)
        else:
            found.append((rows, period))
    return found


def _period(context: Tensor) -> int:
    """The fewest first tokens of ``[B, N, C]`` that make up all of it by being repeated."""
    tokens = context.shape[1]
    for parts in range(_MOST_REPEATS, 1, -1):
        if tokens % parts:
            continue
        period = tokens // parts
        if torch.equal(context[:, :period].repeat(1, parts, 1), context):
            return period
    return tokens


def sigma_range(model_sampling: Any, start_percent: float, end_percent: float) -> tuple[float, float]:
    """``(highest, lowest)`` noise level of a stretch of the run, as the model's own sampling maps percents."""
    return float(model_sampling.percent_to_sigma(start_percent)), float(model_sampling.percent_to_sigma(end_percent))


def show_on_node(text: str, node_id: str | None) -> None:
    """Show ``text`` on the node in the browser, where there is a server and the host is new enough for it."""
    if node_id is None:
        return
    try:
        from server import PromptServer
    except ImportError:
        return
    send = getattr(getattr(PromptServer, "instance", None), "send_progress_text", None)
    if send is not None:
        send(text, node_id)
