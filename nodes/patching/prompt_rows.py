# SPDX-License-Identifier: GPL-3.0-or-later
"""The rows of a batch: which prompt each row reads, and how many of its text tokens are its own.

ComfyUI puts the rows of a batch in equal parts, one per entry of ``cond_or_uncond``, and repeats shorter prompts. Other
packs add rows (regions), interleave them (tiles), and repeat, cut or exchange texts. So the rows are identified by the
texts themselves, where they arrive. ComfyUI's lists are hints: they decide where two prompts have the same text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from einops import rearrange
from torch import Tensor

_POSITIVE = 0
# How far the cosine of two texts may lie below 1 where one is a multiple of the other, rounded to half precision.
_PARALLEL = 1e-4


class RowGroup(NamedTuple):
    """Neighbouring rows of a batch with one kind of prompt and one number of distinct tokens.

    Attributes:
        rows: the rows.
        tokens: number of text tokens that are the prompt's own, counted from the first one.
        is_positive: True for the positive prompt, False for any other, None if it cannot be told.
    """

    rows: slice
    tokens: int
    is_positive: bool | None


class Prompt(NamedTuple):
    """One prompt of a run: its text ``[n, L, C]`` as the model gets it, its kind and its id."""

    text: Tensor
    is_positive: bool
    uuid: Any


@dataclass(frozen=True)
class PositivePrompt:
    """Identifies the positive prompt's part of a batch, by the ids of its conditionings and their kind.

    The kind alone is not enough: nodes that call the model once more (SAG, PerpNeg) pass a negative prompt as the first
    and only one, which usually is the positive prompt's place. The id alone is not enough either: where the positive
    prompt has an area, ComfyUI gives the negative prompt's copy for that area the positive prompt's id.
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


@dataclass
class PromptRows:
    """Identifies rows by their texts, for one run.

    Comparing texts waits for the device. So each combination of hints and shapes is compared once, and the result
    serves all later model calls of the run.

    Attributes:
        guider: weak reference to ComfyUI's guider, which holds the prompts while it samples, and the run among its
            options; None outside a run.
        positive: the positive prompt, None if the guider does not tell.
        latent_batch: number of pictures in the run's latent, 0 if it is not known.
        inputs: inputs of a model call that may have the text, see :func:`text_of`.
    """

    guider: ReferenceType[Any] | None = None
    positive: PositivePrompt | None = None
    latent_batch: int = 0
    inputs: tuple[str, ...] = ("c_crossattn",)
    _known: dict[Any, list[RowGroup]] = field(default_factory=dict)

    @classmethod
    def of_run(cls, guider: Any, latent_batch: int, inputs: tuple[str, ...] = ("c_crossattn",)) -> PromptRows:
        """Return the identification for a run of a guider, of a model with these text inputs."""
        return cls(ref(guider), PositivePrompt.from_guider(guider), latent_batch, inputs)

    def hints(self, options: dict[str, Any], batch: int) -> list[bool | None]:
        """Return for each row True if ComfyUI's lists call it positive, False if negative, None if they do not tell."""
        kinds: list[int] = options.get("cond_or_uncond", [])
        if not kinds or batch % len(kinds):
            return [None] * batch
        ids = options.get("uuids", [])
        sides = [kind == _POSITIVE for kind in kinds]
        positive = self.positive
        if positive is not None and len(ids) == len(kinds):
            sides = [kind == positive.kind and one in positive.ids for kind, one in zip(kinds, ids, strict=True)]
        return [side for side in sides for _ in range(batch // len(kinds))]

    def groups(self, text: Tensor, options: dict[str, Any]) -> list[RowGroup]:
        """Return the rows of a model call's text ``[B, N, C]``.

        Args:
            text: text of all rows of the call.
            options: transformer options of the call.
        """
        batch, tokens, _ = text.shape
        hints = self.hints(options, batch)
        if len(options.get("uuids") or options.get("cond_or_uncond") or []) < 2:
            # One prompt: ComfyUI repeated no text.
            return _merge([RowGroup(slice(i, i + 1), tokens, side) for i, side in enumerate(hints)])
        key = (tuple(text.shape), *self._hint_key(options))
        if key not in self._known:
            are_rows_added = batch != self.latent_batch * len(options.get("cond_or_uncond") or [])
            self._known[key] = self._identify(text, None, options, hints, are_rows_added)
        return self._known[key]

    def arrived_groups(
        self, text: Tensor, value: Tensor | None, options: dict[str, Any], layer: Any, rows: list[RowGroup]
    ) -> list[RowGroup]:
        """Return the rows of a text ``[B, N, C]`` that another node's patch put before a layer.

        Args:
            text: text of the keys.
            value: text of the values; None if it is the keys' text.
            options: transformer options of the call.
            layer: the layer.
            rows: rows of the model call's own text.
        """
        values = None if value is None else tuple(value.shape)
        key = (layer, tuple(text.shape), values, *self._hint_key(options))
        if key not in self._known:
            sides = [group.is_positive for group in rows for _ in range(group.rows.start, group.rows.stop)]
            are_rows_added = len(sides) != len(text)
            hints: list[bool | None] = [None] * len(text) if are_rows_added else sides
            self._known[key] = self._identify(text, value, options, hints, are_rows_added)
        return self._known[key]

    def _hint_key(self, options: dict[str, Any]) -> tuple[Any, ...]:
        return (*(options.get("uuids") or []), "kinds", *(options.get("cond_or_uncond") or []))

    def _prompts(self) -> list[Prompt]:
        """Return the prompts of the run, as the model gets them; none if the guider does not store them."""
        found = []
        guider = None if self.guider is None else self.guider()
        for name, conds in (getattr(guider, "conds", None) or {}).items():
            for cond in conds or []:
                conds_of_model = cond.get("model_conds", {})
                text = text_of({key: getattr(one, "cond", None) for key, one in conds_of_model.items()}, self.inputs)
                if text is not None and text.ndim == 3:
                    found.append(Prompt(text, name == "positive", cond.get("uuid")))
        return found

    def _identify(
        self,
        text: Tensor,
        value: Tensor | None,
        options: dict[str, Any],
        hints: list[bool | None],
        are_rows_added: bool,
    ) -> list[RowGroup]:
        """Compare each row with the run's prompts. This waits for the device once."""
        batch, tokens, width = text.shape
        prompts = [
            prompt
            for prompt in self._prompts()
            if prompt.text.shape[2] == width and prompt.text.shape[1] and tokens % prompt.text.shape[1] == 0
        ]
        both = text if value is None else torch.cat((text, value), dim=-1)
        periods = [period for period in range(1, tokens) if tokens % period == 0]
        flags = [(both[:, period:] == both[:, :-period]).flatten(1).all(dim=1) for period in periods]
        for prompt in prompts:
            own = prompt.text.to(text)
            repeated = own.repeat(1, tokens // own.shape[1], 1)
            flags.append((text[:, None] == repeated[None]).flatten(2).all(dim=2).any(dim=1))
            flags.append(_are_parallel(text, repeated))
        answers: list[list[bool]] = torch.stack(flags).tolist() if flags else []
        repeats, equal, scaled = answers[: len(periods)], answers[len(periods) :: 2], answers[len(periods) + 1 :: 2]
        ids = options.get("uuids") or []
        rows = []
        for row in range(batch):
            periodic = {period for period, is_periodic in zip(periods, repeats, strict=True) if is_periodic[row]}
            matches = [prompt for prompt, is_equal in zip(prompts, equal, strict=True) if is_equal[row]]
            # Packs for regions multiply a prompt by a strength.
            matches = matches or [prompt for prompt, is_scaled in zip(prompts, scaled, strict=True) if is_scaled[row]]
            hinted = ids[row * len(ids) // batch] if ids and batch % len(ids) == 0 else None
            best = min(
                matches,
                key=lambda p: (p.is_positive != hints[row], p.uuid != hinted, p.text.shape[1]),
                default=None,
            )
            length = tokens if best is None else best.text.shape[1]
            if best is None or (length < tokens and length not in periodic):
                length = min(periodic, default=tokens)
            rows.append((length, {prompt.is_positive for prompt in matches}))
        sides = _sides([found for _, found in rows], hints, are_rows_added and bool(prompts))
        lengths = [length for length, _ in rows]
        each = enumerate(zip(lengths, sides, strict=True))
        return _merge([RowGroup(slice(row, row + 1), length, side) for row, (length, side) in each])


def text_of(inputs: dict[str, Any], names: tuple[str, ...], rows: int = 0) -> Tensor | None:
    """Return the text of a model call or of a prompt as ``[B, N, C]``; None if it has none.

    Most models get vectors. Others get token ids ``[B, N]``, or a list with the keys of the text ``[b, H, N, D]`` for
    each layer, of which the first tells texts apart.

    Args:
        inputs: the inputs of the model call, or of one prompt, by name.
        names: inputs that may have the text; the first one that is there has it.
        rows: rows of the model call. Lists of keys have a row for each prompt, which neighbouring rows share.
    """
    text = next((inputs[name] for name in names if inputs.get(name) is not None), None)
    if isinstance(text, (list, tuple)) and text and isinstance(text[0], Tensor):
        keys = rearrange(text[0], "b h n d -> b n (h d)")
        return keys.repeat_interleave(max(1, rows // len(keys)), dim=0)
    if not isinstance(text, Tensor):
        return None
    return text.unsqueeze(-1) if text.ndim == 2 else text


def select(groups: list[RowGroup], apply_to: str) -> list[RowGroup]:
    """Return the rows that are guided: all of them, or those of the positive prompt."""
    chosen = groups if apply_to == "both" else [group for group in groups if group.is_positive]
    return _merge([group._replace(is_positive=None) for group in chosen])


def has_positive(groups: list[RowGroup]) -> bool:
    """Return True if some rows are known to be the positive prompt's."""
    return any(group.is_positive for group in groups)


def are_told_apart(groups: list[RowGroup]) -> bool:
    """Return True if the kind of every row is known."""
    return all(group.is_positive is not None for group in groups)


def shifted(groups: list[RowGroup], rows: slice) -> list[RowGroup]:
    """Return the groups of some rows of a batch, counted from the first of these rows."""
    found = []
    for group in groups:
        start, stop = max(rows.start, group.rows.start), min(rows.stop, group.rows.stop)
        if start < stop:
            found.append(group._replace(rows=slice(start - rows.start, stop - rows.start)))
    return found


def with_tokens(groups: list[RowGroup], tokens: int) -> list[RowGroup]:
    """Return the groups with another number of tokens, the same for all."""
    return _merge([group._replace(tokens=tokens) for group in groups])


def _are_parallel(text: Tensor, other: Tensor) -> Tensor:
    """Return for each row of ``[B, N, C]`` True if it is a positive multiple of a row of ``[n, N, C]``.

    Token ids are no vectors, which a node could multiply.
    """
    if not text.is_floating_point():
        return torch.zeros(len(text), dtype=torch.bool, device=text.device)
    rows, others = text.float().flatten(1), other.float().flatten(1)
    product = rows @ others.T
    norms = rows.norm(dim=1)[:, None] * others.norm(dim=1)[None]
    return (product > (1.0 - _PARALLEL) * norms).any(dim=1)


def _sides(found: list[set[bool]], hints: list[bool | None], are_rows_added: bool) -> list[bool | None]:
    """Return the kind of each row, from the kinds of the prompts whose text it has and from the hints.

    The hints decide for every row if no text contradicts them, and if rows with unknown texts stand in their own
    places. Otherwise a row whose text belongs to one kind of prompt is of that kind. A row with an unknown text, such
    as a region's, belongs to the prompt of the row before it.
    """
    is_consistent = all(hint is not None and (not own or hint in own) for own, hint in zip(found, hints, strict=True))
    if is_consistent and not (are_rows_added and not all(found)):
        return hints
    sides: list[bool | None] = []
    for own in found:
        if len(own) == 1:
            sides.append(next(iter(own)))
        elif own:
            sides.append(None)
        else:
            sides.append(sides[-1] if sides else None)
    return sides


def _merge(groups: list[RowGroup]) -> list[RowGroup]:
    """Join neighbouring rows of one kind and one number of tokens."""
    merged: list[RowGroup] = []
    for group in groups:
        last = merged[-1] if merged else None
        if last is not None and last.rows.stop == group.rows.start and last[1:] == group[1:]:
            merged[-1] = last._replace(rows=slice(last.rows.start, group.rows.stop))
        else:
            merged.append(group)
    return merged


def by_batch(tensor: Tensor, batch: int) -> Tensor:
    """Return a text as ``[batch, N, C]``, as ComfyUI's attention reshapes keys by the batch of the queries."""
    if tensor.ndim == 3 and tensor.shape[0] == batch:
        return tensor
    if tensor.numel() % (batch * tensor.shape[-1]):
        return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])
    return tensor.reshape(batch, -1, tensor.shape[-1])
