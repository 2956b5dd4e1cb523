# SPDX-License-Identifier: GPL-3.0-or-later
"""Samples of each text attention, gathered on the device during a run and read at its end.

Measuring takes many small operations, and on a GPU their number is the cost. So an attention call only leaves a sample
of its queries with the text's keys and values. Samples of one shape, from all layers and several steps, are measured
together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from threading import Lock
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ...gag_core import GuidanceConfig
from ...gag_core.attention import image_queries, mask_of_text, tokens_of_text
from ...gag_core.eager import attention_with_logsumexp
from ...gag_core.measures import MEASURES, measure, sample_queries, word_shares
from ...gag_core.numerics import mask_part
from .allocation import paused_recorder
from .families import Layer
from .guidance import Guidance
from .measurements import BRANCHES, Probe, Result, Word
from .prompt_rows import RowGroup, shifted
from .steps import step_of_level
from .text_position import TextPosition

# Number of queries that are sampled in each attention and row of the batch: over all heads, and at least per head.
_QUERIES = 256
_MIN_TOKENS = 16
# Bytes of queries, keys and values that wait on a device to be measured together.
_MAX_WAITING_BYTES = 64 << 20
_GAIN = list(MEASURES).index("gain")


def sample_size(heads: int) -> int:
    """Return the number of query tokens that are sampled in an attention with so many heads."""
    return max(_MIN_TOKENS, _QUERIES // heads)


@dataclass(eq=False)
class CallRecord:
    """Facts about one model call: its position in the run, its rows, and its word maps.

    Attributes:
        config: settings at strength 1. Only the gain depends on the strength, and it is multiplied by it at the end. So
            samples of steps that differ in strength are measured together.
        strength: strength of the call.
        positive_only: True if only the positive prompt's rows are guided.
        level: noise level, on the device.
        grid: size of the latent.
        guided: layers that were guided.
        maps: by number of pictures and number of their tokens, the sum over attentions ``[pictures, words, tokens]``
            and the number of attentions in it.
        outside: words that stand behind the end of the text.
        done: number of steps that were done before the end of the call.
    """

    config: GuidanceConfig
    strength: float
    positive_only: bool
    level: Tensor
    grid: tuple[int, ...]
    guided: frozenset[Layer] = frozenset()
    maps: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)
    done: int = 0


class _Sample(NamedTuple):
    """The sample of one attention, or of its rows with one number of text tokens."""

    call: CallRecord
    layer: Layer
    groups: list[RowGroup]
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    joint_lse: Tensor | None

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Properties that must agree for samples to be measured together."""
        mask = None if self.mask is None else (tuple(self.mask.shape), self.mask.dtype)
        shapes = tuple(tuple(tensor.shape) for tensor in (self.q, self.k, self.v))
        return self.call.config, shapes, self.q.dtype, mask, self.scale, self.joint_lse is None

    @property
    def nbytes(self) -> int:
        """Bytes of the queries, keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.q, self.k, self.v))


class Measured(NamedTuple):
    """Samples that were measured together: call, layer and rows of each, and ``values`` [samples, rows, measures].

    The rows of a sample are counted from its first one.
    """

    samples: list[tuple[CallRecord, Layer, list[RowGroup]]]
    values: Tensor


class CallRecording:
    """Samples of one model call.

    Args:
        guidance: settings that act in the call, or that stand in where none act.
        words: words to map.
        x: latent of the call.
        t: noise level of each row, ``[B]``.
        only: layers that are sampled; None samples all.
    """

    def __init__(
        self,
        guidance: Guidance,
        words: tuple[Word, ...],
        x: Tensor,
        t: Tensor,
        only: frozenset[Layer] | None = None,
    ) -> None:
        self.call = CallRecord(
            config=replace(guidance.config, strength=1.0),
            strength=guidance.config.strength,
            positive_only=guidance.apply_to == "positive",
            level=t.detach().amax(),
            grid=tuple(x.shape[2:]),
        )
        self.words = words
        self.only = only
        self.waiting: list[_Sample] = []
        self.measured: list[Measured] = []
        # Indices of the sampled query tokens, by the number of heads and the stretches of image tokens.
        self._indices: dict[tuple[Any, ...], Tensor] = {}
        # True while ComfyUI records allocations: what is kept must then be a copy.
        self._must_copy = False

    def cross(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: list[RowGroup],
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Sample an attention ``[B, H, N, D]`` to the text alone, in the rows of ``groups``."""
        if not self._samples(layer):
            return
        with _paused() as self._must_copy:
            image = [slice(0, q.shape[2])]
            indices = self._query_indices(q, image)
            for same in _by_tokens(groups):
                rows, tokens = slice(same[0].rows.start, same[-1].rows.stop), same[0].tokens
                keys, values = k[rows, :, :tokens], v[rows, :, :tokens]
                part = mask_part(mask, rows=rows, keys=slice(tokens))
                own = shifted(same, rows)
                if self.words:
                    self._add_maps(q[rows], keys, own, image[0], part, scale)
                self._add_sample(layer, own, q[rows], keys, values, part, scale, indices, None)

    def joint(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: TextPosition,
        tokens: int,
        groups: list[RowGroup],
        mask: Tensor | None,
        scale: float | None,
    ) -> None:
        """Sample an attention ``[B, H, N, D]`` over text and image tokens, in the rows of ``groups``.

        ``tokens`` is the number of text tokens with the copies that ComfyUI added to shorter prompts.
        """
        image = image_queries(position.text, q.shape[2], k.shape[2])
        if position.queries is not None:
            image = [position.queries]
        if not self._samples(layer) or not image:
            return
        with _paused() as self._must_copy:
            indices = self._query_indices(q, image)
            largest = max(image, key=lambda part: part.stop - part.start)
            factor = q.shape[3] ** -0.5 if scale is None else scale
            for same in _by_tokens(groups):
                rows, copies = slice(same[0].rows.start, same[-1].rows.stop), tokens // same[0].tokens
                text = position.text if copies == 1 else position.with_tokens(same[0].tokens).text
                part, own = mask_part(mask, rows=rows), shifted(same, rows)
                queries = q[rows].index_select(2, indices)
                _, lse = attention_with_logsumexp(queries, k[rows], v[rows], mask_part(part, queries=indices), factor)
                # Copies: views would keep the image's keys and values in memory too.
                keys, values = (tokens_of_text(one[rows], text).clone() for one in (k, v))
                text_mask = mask_of_text(part, text)
                if self.words:
                    self._add_maps(q[rows], keys, own, largest, text_mask, scale)
                # The share of the text is that of all its copies.
                self._add_sample(layer, own, q[rows], keys, values, text_mask, scale, indices, lse - math.log(copies))

    def _samples(self, layer: Layer) -> bool:
        return self.only is None or layer in self.only

    def finish(self) -> list[Measured]:
        """Measure the samples that still wait for others, and return everything measured. Nothing is read back."""
        self.measured, self.waiting = [*self.measured, *_measure_together(self.waiting)], []
        return self.measured

    def _query_indices(self, q: Tensor, image: list[slice]) -> Tensor:
        """Return the indices of the sampled image tokens, of the stretches of queries that are image tokens."""
        heads = q.shape[1]
        key = (heads, *((part.start, part.stop) for part in image))
        if key not in self._indices:
            tokens = torch.cat([torch.arange(part.start, part.stop, device=q.device) for part in image])
            self._indices[key] = tokens[sample_queries(len(tokens), sample_size(heads), q.device)]
        return self._indices[key]

    def _add_sample(
        self,
        layer: Layer,
        groups: list[RowGroup],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        indices: Tensor,
        lse: Tensor | None,
    ) -> None:
        queries = q.index_select(2, indices)
        sampled_mask = mask_part(mask, queries=indices)
        if self._must_copy:
            k, v = k.clone(), v.clone()
            sampled_mask = None if sampled_mask is None else sampled_mask.clone()
        self.waiting.append(_Sample(self.call, layer, groups, queries, k, v, sampled_mask, scale, lse))
        # The graph that torch.compile traces must not depend on the number of bytes that wait.
        if not torch.compiler.is_compiling() and _is_enough(self.waiting):
            self.measured += _measure_together(self.waiting)
            self.waiting = []

    def _add_maps(
        self, q: Tensor, k: Tensor, groups: list[RowGroup], image: slice, mask: Tensor | None, scale: float | None
    ) -> None:
        """Add the share of each word at each image token, in the positive prompt's rows."""
        tokens, image_tokens = k.shape[2], image.stop - image.start
        columns = torch.zeros(tokens, len(self.words), device=k.device)
        for index, word in enumerate(self.words):
            for token in word.tokens:
                if token < tokens:
                    columns[token, index] = 1.0
                else:
                    self.call.outside.add(word.text)
        for rows, _, is_positive in groups:
            if is_positive is False:
                continue
            share = word_shares(
                q[rows][:, :, image], k[rows], columns, mask=mask_part(mask, rows=rows, queries=image), scale=scale
            )
            key = (share.shape[0], image_tokens)
            total, count = self.call.maps.get(key, (0.0, 0))
            self.call.maps[key] = share + total, count + 1


@dataclass
class Recording:
    """All samples and measures of one run so far."""

    words: tuple[Word, ...] = ()
    calls: list[CallRecord] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    # By device, and behind a lock, because the calls of several devices overlap.
    waiting: dict[torch.device, list[_Sample]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, recorded: CallRecording, reached: list[Layer], done: int) -> None:
        """Add a model call that has ended, the layers guided in it, and the number of steps done."""
        call = recorded.call
        call.guided, call.done = frozenset(reached), done
        with self._lock:
            self.calls.append(call)
            self.measured += recorded.measured
            waiting = [*self.waiting.pop(call.level.device, []), *recorded.waiting]
            is_enough = _is_enough(waiting)
            if not is_enough:
                self.waiting[call.level.device] = waiting
        if is_enough:
            measured = _measure_together(waiting)
            with self._lock:
                self.measured += measured

    def result(self, probe: Probe, levels: list[float]) -> Result:
        """Return the measures for a probe. This is the only place that waits for the device.

        Args:
            probe: the probe, with its words and layer names.
            levels: noise levels of the run.
        """
        for device in list(self.waiting):
            self.measured += _measure_together(self.waiting.pop(device))
        steps = max(1, len(levels) - 1)
        seen = {layer for part in self.measured for _, layer, _ in part.samples}
        order = [layer for layer in probe.watched.order if layer in seen]
        step_of = self._steps_of_calls(levels, steps)
        strengths = [0.0] * steps
        for call in self.calls:
            if call.guided:
                strengths[step_of[id(call)]] = call.strength
        values, guided = self._values(order, step_of, steps)
        wanted = [self.words.index(word) for word in probe.words]
        maps, notes = self._maps(wanted) if wanted else ((), ())
        return Result(
            model=probe.watched.family.title,
            layers=tuple(probe.names[layer] for layer in order),
            sigmas=tuple(levels[:steps]),
            calls=len(self.calls),
            values=values,
            guided=guided,
            settings=tuple(dict.fromkeys(call.config for part in self.measured for call, _, _ in part.samples)),
            strengths=tuple(strengths),
            strength=self.calls[-1].strength if self.calls else 1.0,
            words=tuple(word.text for word in probe.words),
            maps=maps,
            notes=notes,
        )

    def _steps_of_calls(self, levels: list[float], steps: int) -> dict[int, int]:
        """Return the step of each model call, by the id of its record."""
        if all(later < earlier for earlier, later in pairwise(levels)):
            return {id(call): max(0, step_of_level(float(call.level), levels)) for call in self.calls}
        return {id(call): min(call.done, steps - 1) for call in self.calls}

    def _values(self, order: list[Layer], step_of: dict[int, int], steps: int) -> tuple[Tensor, Tensor]:
        """Return the mean measures ``[branches, layers, steps, measures]``, and where guidance acted."""
        index = {layer: i for i, layer in enumerate(order)}
        shape = (len(BRANCHES), len(order), steps)
        total, count = torch.zeros(*shape, len(MEASURES), dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        guided = torch.zeros(shape, dtype=torch.bool)
        for part in self.measured:
            for call, layer, branch, measures, rows, is_guided in _rows_of(part):
                cell = branch, index[layer], step_of[id(call)]
                total[cell] += measures
                count[cell] += rows
                guided[cell] |= is_guided
        return torch.where(count[..., None] > 0, total / count[..., None].clamp_min(1.0), torch.nan), guided

    def _maps(self, wanted: list[int]) -> tuple[tuple[tuple[Tensor, int], ...], tuple[str, ...]]:
        """Return mean maps ``[pictures, words, height, width]`` by resolution, finest first; and notes on gaps."""
        sums: dict[tuple[Any, ...], tuple[Tensor, int]] = {}
        has_lost = False
        for call in self.calls:
            for (_, tokens), (share, count) in call.maps.items():
                layout = layout_of(call.grid, tokens)
                if layout is None:
                    has_lost = True
                    continue
                frames, height, width = layout
                chosen = share.detach().cpu()[:, wanted]
                mean = rearrange(chosen, "b w (f y x) -> b w f y x", f=frames, y=height, x=width).mean(dim=2)
                key = tuple(mean.shape)
                earlier, attentions = sums.get(key, (torch.zeros_like(mean), 0))
                sums[key] = earlier + mean, attentions + count
        outside = sorted(set().union(*(call.outside for call in self.calls)))
        notes = []
        if outside:
            listed = ", ".join(outside)
            notes.append(f"The text that the model read is shorter than the prompt given to GAG Probe: {listed}.")
        if has_lost:
            notes.append("Some attentions have tokens beside the picture's own, so no map could be laid out of them.")
        finest = sorted(sums.values(), key=lambda entry: -entry[0].shape[-1] * entry[0].shape[-2])
        return tuple((total / count, count) for total, count in finest), tuple(notes)


def guided_means(measured: list[Measured]) -> tuple[Tensor, int]:
    """Return the sum of the measures ``[measures]`` fp64 over guided rows and layers, and the number of summands."""
    total, count = torch.zeros(len(MEASURES), dtype=torch.float64), 0
    for part in measured:
        for cell in _rows_of(part):
            if cell.is_guided:
                total += cell.measures
                count += cell.rows
    return total, count


def layout_of(grid: tuple[int, ...], tokens: int) -> tuple[int, int, int] | None:
    """Return frames, rows and columns of a latent ``grid`` that a model sees as so many tokens; None if none fits.

    A model cuts the grid into patches, or halves it from level to level. Sizes that do not divide are rounded up.
    """
    *frames, height, width = grid
    count = frames[0] if frames else 1
    side = 1
    while side <= 2 * max(height, width):
        rows, columns = -(-height // side), -(-width // side)
        if rows * columns * count == tokens:
            return count, rows, columns
        side *= 2
    return None


def _paused() -> AbstractContextManager[bool]:
    """Return the pause of ComfyUI's allocation recorder. torch.compile traces no such pause, and needs none."""
    return nullcontext(False) if torch.compiler.is_compiling() else paused_recorder()


def _is_enough(waiting: list[_Sample]) -> bool:
    """Return True if so many bytes wait that they must be measured now."""
    return sum(sample.nbytes for sample in waiting) > _MAX_WAITING_BYTES


def _measure_together(waiting: list[_Sample]) -> list[Measured]:
    """Measure samples, all those with one ``batch_key`` at once."""
    batches: dict[tuple[Any, ...], list[_Sample]] = {}
    for sample in waiting:
        batches.setdefault(sample.batch_key, []).append(sample)
    measured = []
    for samples in batches.values():
        first = samples[0]
        rows = first.q.shape[0]
        mask, lse = first.mask, first.joint_lse
        if mask is not None:
            mask = torch.cat([s.mask.expand(rows, -1, -1, -1) for s in samples if s.mask is not None])
        if lse is not None:
            lse = torch.cat([s.joint_lse for s in samples if s.joint_lse is not None])
        q, k, v = (torch.cat(tensors) for tensors in zip(*((s.q, s.k, s.v) for s in samples), strict=True))
        values = measure(q, k, v, first.call.config, mask=mask, scale=first.scale, joint_lse=lse)
        keys = [(s.call, s.layer, s.groups) for s in samples]
        measured.append(Measured(keys, rearrange(values, "(s b) m -> s b m", s=len(samples))))
    return measured


class _Cell(NamedTuple):
    """Sum of the measures over the rows of one branch in one attention, number of rows, and True if they are guided."""

    call: CallRecord
    layer: Layer
    branch: int
    measures: Tensor
    rows: int
    is_guided: bool


def _rows_of(part: Measured) -> Iterator[_Cell]:
    """Read measured samples back."""
    # Two moves, because MPS has no fp64 to move.
    values = part.values.detach().cpu().to(torch.float64, copy=True)
    for sample, (call, layer, groups) in zip(values, part.samples, strict=True):
        sample[:, _GAIN] *= abs(call.strength)
        for rows, _, is_positive in groups:
            # Rows that cannot be told apart count as the positive prompt's.
            branch = BRANCHES.index("negative" if is_positive is False else "positive")
            is_guided = layer in call.guided and (is_positive is True or not call.positive_only)
            yield _Cell(call, layer, branch, sample[rows].sum(dim=0), rows.stop - rows.start, is_guided)


def _by_tokens(groups: list[RowGroup]) -> list[list[RowGroup]]:
    """Return neighbouring groups of one number of tokens together."""
    return [list(same) for _, same in groupby(groups, key=lambda group: group.tokens)]
