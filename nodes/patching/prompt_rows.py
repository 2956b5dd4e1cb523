# SPDX-License-Identifier: GPL-3.0-or-later
"""The rows of a batch: which prompt each belongs to, and how many of its text tokens are its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_POSITIVE = 0
# ComfyUI batches two prompts if neither is repeated more than 4 times. A third prompt may triple their common multiple.
_MAX_REPEATS = 12


class RowGroup(NamedTuple):
    """Neighbouring rows of a batch that read the same number of text tokens, counted from the first one."""

    rows: slice
    tokens: int


@dataclass(frozen=True)
class PositivePrompt:
    """Identifies the positive prompt's part of a batch, by the ids of its conditionings and their kind.

    The kind alone is not enough: nodes that call the model once more (SAG, PerpNeg) pass a negative prompt as the first
    and only one, which usually is the positive prompt's place. The id alone is not enough either: see
    :func:`token_groups`.
    """

    ids: frozenset[Any]
    kind: int

    @classmethod
    def from_guider(cls, guider: Any) -> PositivePrompt | None:
        """Return the positive prompt of a run; None for a guider that does not store prompts as ComfyUI's own do."""
        prompts = getattr(guider, "original_conds", None) or {}
        if "positive" not in prompts:
            return None
        # The guider with two positive prompts passes them in reverse order.
        kind = list(reversed(prompts)).index("positive") if "middle" in prompts else _POSITIVE
        return cls(frozenset(prompt.get("uuid") for prompt in prompts["positive"]), kind)


def prompt_kinds(options: dict[str, Any], positive: PositivePrompt | None) -> list[int]:
    """Return the kind of prompt of each part of a batch, 0 for the positive one.

    This is ``cond_or_uncond`` of the transformer options, corrected where the kind and the id of a part disagree.
    """
    kinds: list[int] = options.get("cond_or_uncond", [])
    ids = options.get("uuids", [])
    if positive is None or len(ids) != len(kinds):
        return kinds
    return [
        _POSITIVE if kind == positive.kind and prompt in positive.ids else _POSITIVE + 1
        for kind, prompt in zip(kinds, ids, strict=True)
    ]


def guided_rows(apply_to: str, batch: int, kinds: list[int]) -> list[slice]:
    """Return the rows of a batch that are guided: all of them, or those of the positive prompt.

    ComfyUI puts the prompts' rows one after the other, in equal parts, in the order of ``kinds``.
    """
    if apply_to == "both":
        return [slice(0, batch)]
    if not kinds or batch % len(kinds):
        return []
    size = batch // len(kinds)
    rows: list[slice] = []
    for index, kind in enumerate(kinds):
        if kind != _POSITIVE:
            continue
        if rows and rows[-1].stop == index * size:
            rows[-1] = slice(rows[-1].start, (index + 1) * size)
        else:
            rows.append(slice(index * size, (index + 1) * size))
    return rows


def token_groups(context: Tensor, options: dict[str, Any], known: dict[Any, list[RowGroup]]) -> list[RowGroup]:
    """Return the rows of a text context ``[B, N, C]``, each with the number of its tokens before ComfyUI repeated them.

    To batch prompts of different lengths ComfyUI repeats each of them up to the least common multiple. Softmax gives
    the same result for repeated tokens, entmax does not. Without the number of distinct tokens the effect on the
    positive prompt would depend on the length of the negative one.

    Args:
        context: text of all rows of one model call.
        options: transformer options of that call.
        known: groups found so far in this run, by the prompts in a call. Each combination is compared once, because the
            comparison waits for the device. The id of one prompt would not do as a key: where the positive prompt has
            an area, ComfyUI gives the negative prompt's copy for that area the positive prompt's id.
    """
    ids = options.get("uuids") or []
    batch, tokens = context.shape[:2]
    if len(ids) < 2 or batch % len(ids):
        return [RowGroup(slice(0, batch), tokens)]
    key = (*ids, *options.get("cond_or_uncond", []), batch, tokens)
    if key not in known:
        size = batch // len(ids)
        groups: list[RowGroup] = []
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            period = _period(context[rows])
            if groups and groups[-1].tokens == period:
                groups[-1] = RowGroup(slice(groups[-1].rows.start, rows.stop), period)
            else:
                groups.append(RowGroup(rows, period))
        known[key] = groups
    return known[key]


def intersect(groups: list[RowGroup], chosen: list[slice]) -> list[RowGroup]:
    """Return the parts of ``groups`` that lie in the chosen rows."""
    found = []
    for rows in chosen:
        for group in groups:
            start, stop = max(rows.start, group.rows.start), min(rows.stop, group.rows.stop)
            if start < stop:
                found.append(RowGroup(slice(start, stop), group.tokens))
    return found


def _period(context: Tensor) -> int:
    """Return the smallest number of first tokens of ``[B, N, C]`` whose repetition gives all of it."""
    tokens = context.shape[1]
    for repeats in range(_MAX_REPEATS, 1, -1):
        if tokens % repeats:
            continue
        period = tokens // repeats
        if torch.equal(context[:, :period].repeat(1, repeats, 1), context):
            return period
    return tokens
