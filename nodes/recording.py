# SPDX-License-Identifier: GPL-3.0-or-later
"""What a probe keeps of a run: numbers of each text attention, gathered on the device and read at the run's end.

Measuring takes many small operations, and on a GPU it is their number that costs. So an attention call only leaves a
sample of its queries with the text's keys and values, and what has one shape, of all layers and of several steps, is
measured together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gag_core import GuidanceConfig
from ..gag_core.joint import attention_with_logsumexp
from ..gag_core.measures import MEASURES, measure, sample_queries, word_shares
from .families import Layer
from .host import batch_rows, place_in_list, show_on_node
from .settings import Guidance

# How many queries are looked at in each attention and row of the batch: so many over all heads, and so many tokens.
_QUERIES = 256
_LEAST_TOKENS = 16
# Bytes of queries, keys and values that wait on a device to be measured together.
_WAITING = 64 << 20
BRANCHES = ("positive", "negative")
_GAIN = list(MEASURES).index("gain")
# A noise level that lies this close above a step's own, relatively, is that step's.
_SAME_LEVEL = 1e-4


def sample_size(heads: int) -> int:
    """How many tokens are looked at in an attention with so many heads."""
    return max(_LEAST_TOKENS, _QUERIES // heads)


class Word(NamedTuple):
    """A word to map, and the numbers of its tokens in the text that the model reads."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Result:
    """What was measured in one run; on the CPU.

    Attributes:
        model: the family's title.
        layers: names of the text attentions in the order of execution, as the ``blocks`` input takes them.
        sigmas: the noise level that each step begins at.
        calls: how many model calls were measured.
        values: ``[branches, layers, steps, measures]`` fp64, in the order of BRANCHES and MEASURES; NaN where nothing
            was measured.
        guided: ``[branches, layers, steps]`` bool, where guidance acted.
        settings: what the numbers that depend on settings were computed with, but for the strength.
        strengths: the strength that acted in each step, 0 where none did. Where none did, the numbers are for that
            of the node.
        strength: of the last model call: that of the node, where none acted.
        words: the words that have maps.
        maps: ``[pictures, words, height, width]`` for each resolution, mean over layers and steps of the share that
            falls on a word; with the number of attentions in it.
        notes: what could not be measured, in sentences.
    """

    model: str
    layers: tuple[str, ...]
    sigmas: tuple[float, ...]
    calls: int
    values: Tensor
    guided: Tensor
    settings: tuple[GuidanceConfig, ...]
    strengths: tuple[float, ...]
    strength: float = 1.0
    words: tuple[str, ...] = ()
    maps: tuple[tuple[Tensor, int], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class Probe:
    """What a probe node asks for, and what the runs that came to their end last gave.

    Wherever the model travels, the results stay here.

    Attributes:
        watched: stands for a guidance where none acts: which model, the defaults, and no layer that is guided.
        names: what each layer is called in the ``blocks`` input.
        words: what to map.
        node_id: the probe's node.
        result: of the last run; None before the first.
        results: of the last run of each of the models that the host made a list of, as GAG Sweep does, by their place
            in it; of a run by itself under 0.
    """

    watched: Guidance
    names: dict[Layer, str]
    words: tuple[Word, ...] = ()
    node_id: str | None = None
    result: Result | None = None
    results: dict[int, Result] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "result": None, "results": {}}

    def keep(self, result: Result) -> None:
        """A run has come to its end; say so on the node."""
        place = place_in_list()
        if place == 0:
            self.results.clear()
        self.result = self.results[place] = result
        if result.layers:
            text = f"Measured {len(result.layers)} attentions in {result.calls} model calls."
        else:
            text = "Nothing measured: no text attention ran."
        show_on_node(text, self.node_id)


@dataclass(eq=False)
class _Call:
    """What is kept of one model call: where it was in the run, and its maps.

    Attributes:
        config: the settings, of strength 1. What strength multiplies, the gain alone, it multiplies in the end: so
            steps that differ in it stay together.
        strength: the strength.
        positive_only: whether only the positive prompt's rows are guided.
        level: the noise level, on the device.
        done: how many steps were done.
        kinds: the prompts in the batch, 0 the positive one.
        grid: the latent's size.
        batch: rows in the batch.
        guided: the layers that were guided.
        maps: by the numbers of pictures and of their tokens the sum over attentions, ``[pictures, words, tokens]``,
            and how many there were.
        outside: words that stand behind the end of the text.
    """

    config: GuidanceConfig
    strength: float
    positive_only: bool
    level: Tensor
    kinds: list[int]
    grid: tuple[int, ...]
    batch: int = 0
    guided: frozenset[Layer] = frozenset()
    maps: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)
    done: int = 0


class _Waiting(NamedTuple):
    """The sample of one attention, or of those of its rows that have as many text tokens."""

    call: _Call
    layer: Layer
    rows: slice
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    joint_lse: Tensor | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What has to agree for samples to be measured together."""
        mask = None if self.mask is None else (tuple(self.mask.shape), self.mask.dtype)
        shapes = tuple(tuple(tensor.shape) for tensor in (self.q, self.k, self.v))
        return self.call.config, shapes, self.q.dtype, mask, self.scale, self.joint_lse is None

    @property
    def size(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.q, self.k, self.v))


class Measured(NamedTuple):
    """What was measured together: of each sample its call, layer and rows, and ``values`` [samples, rows, measures]."""

    of: list[tuple[_Call, Layer, slice]]
    values: Tensor


class CallRecording:
    """What one model call leaves; made for it."""

    def __init__(self, guidance: Guidance, words: tuple[Word, ...], x: Tensor, t: Tensor, kinds: list[int]) -> None:
        self.call = _Call(
            config=replace(guidance.config, strength=1.0),
            strength=guidance.config.strength,
            positive_only=guidance.apply_to == "positive",
            level=t.detach().amax(),
            kinds=kinds,
            grid=tuple(x.shape[2:]),
        )
        self.words = words
        self.waiting: list[_Waiting] = []
        self.measured: list[Measured] = []
        self.samples: dict[tuple[int, int, int, int], Tensor] = {}

    def cross(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: list[tuple[slice, int]],
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """An attention ``[B, H, N, D]`` to the text alone is about to run; ``groups`` are rows and their tokens."""
        for rows, tokens in groups:
            keys, values = k[rows, :, :tokens], v[rows, :, :tokens]
            part = batch_rows(mask, rows)
            part = part if part is None or part.shape[3] == 1 else part[..., :tokens]
            if self.words:
                self._map(q, keys, rows, slice(0, q.shape[2]), part, scale)
            picked = self._sample(q, slice(q.shape[2], q.shape[2]))
            self._take(layer, rows, q, keys, values, part, scale, picked, None)

    def joint(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, text: slice, mask: Tensor | None, scale: float | None
    ) -> None:
        """An attention ``[B, H, N, D]`` over text and image tokens is about to run."""
        if text.stop - text.start == q.shape[2]:
            return
        rows = slice(0, q.shape[0])
        picked = self._sample(q, text)
        some = q.index_select(2, picked)
        seen = _queries(mask, picked)
        factor = q.shape[3] ** -0.5 if scale is None else scale
        _, lse = attention_with_logsumexp(some, k, v, seen, factor)
        # Copies, or the keys and values of the image would have to wait as well.
        keys, values = k[:, :, text].clone(), v[:, :, text].clone()
        columns = mask if mask is None or mask.shape[3] == 1 else mask[..., text]
        if self.words:
            picture = max(slice(0, text.start), slice(text.stop, q.shape[2]), key=lambda part: part.stop - part.start)
            self._map(q, keys, rows, picture, columns, scale)
        self._take(layer, rows, q, keys, values, columns, scale, picked, lse)

    def finish(self) -> list[Measured]:
        """All that was measured in this call, with what still waits for others of its kind. Nothing is read back."""
        self.measured, self.waiting = [*self.measured, *_measured(self.waiting)], []
        return self.measured

    def _sample(self, q: Tensor, text: slice) -> Tensor:
        """Numbers of the image's tokens to look at, in a sequence with text within."""
        _, heads, tokens, _ = q.shape
        key = (heads, tokens, text.start, text.stop)
        if key not in self.samples:
            length = text.stop - text.start
            picked = sample_queries(tokens - length, sample_size(heads), q.device)
            self.samples[key] = torch.where(picked < text.start, picked, picked + length)
        return self.samples[key]

    def _take(
        self,
        layer: Layer,
        rows: slice,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        picked: Tensor,
        lse: Tensor | None,
    ) -> None:
        self.call.batch = q.shape[0]
        some = q[rows].index_select(2, picked)
        self.waiting.append(_Waiting(self.call, layer, rows, some, k, v, _queries(mask, picked), scale, lse))
        # What torch.compile traces must not depend on how much there is by now.
        if not torch.compiler.is_compiling() and sum(sample.size for sample in self.waiting) > _WAITING:
            self.measured += _measured(self.waiting)
            self.waiting = []

    def _map(self, q: Tensor, k: Tensor, rows: slice, picture: slice, mask: Tensor | None, scale: float | None) -> None:
        """Add the share of each word at each token of the picture, in the positive prompt's rows."""
        tokens, number = k.shape[2], picture.stop - picture.start
        columns = torch.zeros(tokens, len(self.words), device=k.device)
        for place, word in enumerate(self.words):
            for token in word.tokens:
                if token < tokens:
                    columns[token, place] = 1.0
                else:
                    self.call.outside.add(word.text)
        for branch, part in _parts(q.shape[0], self.call.kinds):
            chosen = slice(max(rows.start, part.start), min(rows.stop, part.stop))
            if branch != BRANCHES[0] or chosen.start >= chosen.stop:
                continue
            here = slice(chosen.start - rows.start, chosen.stop - rows.start)
            seen = batch_rows(mask, here)
            seen = seen if seen is None or seen.shape[2] == 1 else seen[:, :, picture]
            share = word_shares(q[chosen][:, :, picture], k[here], columns, mask=seen, scale=scale)
            key = (share.shape[0], number)
            total, count = self.call.maps.get(key, (0.0, 0))
            self.call.maps[key] = share + total, count + 1


@dataclass
class Recording:
    """All that was measured in one run so far."""

    words: tuple[Word, ...] = ()
    calls: list[_Call] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    # By device, because the calls of several devices overlap.
    waiting: dict[torch.device, list[_Waiting]] = field(default_factory=dict)

    def add(self, recorded: CallRecording, reached: list[Layer], done: int) -> None:
        """A model call has come to its end, in which these layers were guided, after so many steps."""
        call = recorded.call
        call.guided, call.done = frozenset(reached), done
        self.calls.append(call)
        self.measured += recorded.measured
        waiting = [*self.waiting.pop(call.level.device, []), *recorded.waiting]
        if sum(sample.size for sample in waiting) > _WAITING:
            self.measured += _measured(waiting)
        else:
            self.waiting[call.level.device] = waiting

    def result(self, probe: Probe, levels: list[float]) -> Result:
        """All of it, for a probe; ``levels`` are the run's noise levels. The one place that waits for the device."""
        for device in list(self.waiting):
            self.measured += _measured(self.waiting.pop(device))
        steps = max(1, len(levels) - 1)
        seen = {layer for part in self.measured for _, layer, _ in part.of}
        order = [layer for layer in probe.watched.order if layer in seen]
        number = {layer: place for place, layer in enumerate(order)}
        falling = all(later < earlier for earlier, later in pairwise(levels))
        step_of = {
            id(call): _step_of(float(call.level), levels) if falling else min(call.done, steps - 1)
            for call in self.calls
        }
        shape = (len(BRANCHES), len(order), steps)
        total, count = torch.zeros(*shape, len(MEASURES), dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        guided = torch.zeros(shape, dtype=torch.bool)
        strengths = [0.0] * steps
        for call in self.calls:
            if call.guided:
                strengths[step_of[id(call)]] = call.strength
        for part in self.measured:
            # In two moves, because on MPS there is no fp64 to move.
            values = part.values.detach().cpu().to(torch.float64, copy=True)
            for of, (call, layer, held) in zip(values, part.of, strict=True):
                of[:, _GAIN] *= abs(call.strength)
                for branch, rows in _parts(call.batch, call.kinds):
                    start, stop = max(rows.start, held.start), min(rows.stop, held.stop)
                    if start >= stop:
                        continue
                    b = BRANCHES.index(branch)
                    cell = b, number[layer], step_of[id(call)]
                    total[cell] += of[start - held.start : stop - held.start].sum(dim=0)
                    count[cell] += stop - start
                    guided[cell] |= layer in call.guided and not (call.positive_only and b)
        values = torch.where(count[..., None] > 0, total / count[..., None].clamp_min(1.0), torch.nan)
        wanted = [self.words.index(word) for word in probe.words]
        maps, notes = self._maps(wanted) if wanted else ((), ())
        return Result(
            model=probe.watched.family.title,
            layers=tuple(probe.names[layer] for layer in order),
            sigmas=tuple(levels[:steps]),
            calls=len(self.calls),
            values=values,
            guided=guided,
            settings=tuple(dict.fromkeys(call.config for part in self.measured for call, _, _ in part.of)),
            strengths=tuple(strengths),
            strength=self.calls[-1].strength if self.calls else 1.0,
            words=tuple(word.text for word in probe.words),
            maps=maps,
            notes=notes,
        )

    def _maps(self, wanted: list[int]) -> tuple[tuple[tuple[Tensor, int], ...], tuple[str, ...]]:
        """Mean maps ``[pictures, words, height, width]`` by resolution, the finest first; and what they lack."""
        sums: dict[tuple[Any, ...], tuple[Tensor, int]] = {}
        lost = False
        for call in self.calls:
            for (_, tokens), (share, count) in call.maps.items():
                layout = layout_of(call.grid, tokens)
                if layout is None:
                    lost = True
                    continue
                frames, height, width = layout
                share = share.detach().cpu()[:, wanted].unflatten(2, (frames, height, width)).mean(dim=2)
                key = tuple(share.shape)
                earlier, number = sums.get(key, (torch.zeros_like(share), 0))
                sums[key] = earlier + share, number + count
        outside = sorted(set().union(*(call.outside for call in self.calls)))
        notes = []
        if outside:
            listed = ", ".join(outside)
            notes.append(f"The text that the model read is shorter than the prompt given to GAG Probe: {listed}.")
        if lost:
            notes.append("Some attentions have tokens beside the picture's own, so no map could be laid out of them.")
        finest = sorted(sums.values(), key=lambda entry: -entry[0].shape[-1] * entry[0].shape[-2])
        return tuple((total / count, count) for total, count in finest), tuple(notes)


def _measured(waiting: list[_Waiting]) -> list[Measured]:
    """Measure what waits, all samples of a kind at once."""
    kinds: dict[tuple[Any, ...], list[_Waiting]] = {}
    for sample in waiting:
        kinds.setdefault(sample.kind, []).append(sample)
    measured = []
    for samples in kinds.values():
        first = samples[0]
        rows = first.q.shape[0]
        mask, lse = first.mask, first.joint_lse
        if mask is not None:
            mask = torch.cat([s.mask.expand(rows, -1, -1, -1) for s in samples if s.mask is not None])
        if lse is not None:
            lse = torch.cat([s.joint_lse for s in samples if s.joint_lse is not None])
        q, k, v = (torch.cat(tensors) for tensors in zip(*((s.q, s.k, s.v) for s in samples), strict=True))
        values = measure(q, k, v, first.call.config, mask=mask, scale=first.scale, joint_lse=lse)
        of = [(s.call, s.layer, s.rows) for s in samples]
        measured.append(Measured(of, values.unflatten(0, (len(samples), rows))))
    return measured


def guided_means(measured: list[Measured]) -> tuple[Tensor, int]:
    """Sum of the measures ``[measures]`` fp64 over rows and layers that were guided, and how many there are of them."""
    total, count = torch.zeros(len(MEASURES), dtype=torch.float64), 0
    for part in measured:
        values = part.values.detach().cpu().double()
        for of, (call, layer, held) in zip(values, part.of, strict=True):
            if layer not in call.guided:
                continue
            for branch, rows in _parts(call.batch, call.kinds):
                start, stop = max(rows.start, held.start), min(rows.stop, held.stop)
                if start < stop and not (call.positive_only and branch != BRANCHES[0]):
                    some = of[start - held.start : stop - held.start].sum(dim=0)
                    some[_GAIN] *= abs(call.strength)
                    total += some
                    count += stop - start
    return total, count


def layout_of(grid: tuple[int, ...], tokens: int) -> tuple[int, int, int] | None:
    """Frames, rows and columns of a latent ``grid`` that a model sees as a number of tokens; None if none fits.

    A model cuts it into patches, or halves it from level to level; what does not go evenly is rounded up.
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


def _parts(batch: int, kinds: list[int]) -> Iterator[tuple[str, slice]]:
    """The prompts' rows of a batch with their branch; all are the positive prompt's where the host does not say."""
    if not kinds or batch % len(kinds):
        kinds = [0]
    size = batch // len(kinds)
    for number, kind in enumerate(kinds):
        yield BRANCHES[min(kind, 1)], slice(number * size, (number + 1) * size)


def _queries(mask: Tensor | None, picked: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[2] == 1 else mask.index_select(2, picked)


def _step_of(level: float, levels: list[float]) -> int:
    """The step whose stretch of the noise schedule a level lies in."""
    above = sum(level <= start * (1.0 + _SAME_LEVEL) for start in levels[:-1])
    return max(0, above - 1)
