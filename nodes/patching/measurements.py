# SPDX-License-Identifier: GPL-3.0-or-later
"""The request of a GAG Probe node and the results of the runs that it measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ...gag_core import GuidanceConfig
from .families import Layer
from .guidance import Guidance
from .observer import Sentence

BRANCHES = ("positive", "negative")


class Word(NamedTuple):
    """A word to map, and the indices of its tokens in the text that the model reads."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Result:
    """Measures of one run, on the CPU.

    Attributes:
        model: title of the family.
        layers: names of the text attentions in the order of execution, as the ``blocks`` input takes them.
        sigmas: noise level that each step begins at.
        calls: number of model calls that were measured.
        values: ``[branches, layers, steps, measures]`` fp64, in the order of BRANCHES and MEASURES; NaN where nothing
            was measured.
        guided: ``[branches, layers, steps]`` bool, True where guidance acted.
        settings: configs that the measures were computed with, apart from the strength.
        strengths: strength that acted in each step, 0 where none did. The measures of a step without guidance are for
            the strength of the node.
        strength: strength of the last model call: that of the node, if no guidance acted.
        words: words that have maps.
        maps: for each resolution ``[pictures, words, height, width]``, the mean over layers and steps of the share of
            attention that falls on a word; and the number of attentions in that mean.
        notes: sentences about what could not be measured.
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

    @property
    def sentence(self) -> Sentence:
        """Short summary for the probe's node."""
        if not self.layers:
            return Sentence("nothing_measured", {}, "Nothing measured: no text attention ran.")
        layers, calls = len(self.layers), self.calls
        values = {"attentions": layers, "calls": calls}
        return Sentence("measured", values, f"Measured {layers} attentions in {calls} model calls.")


@dataclass(eq=False)
class Probe:
    """The request of a GAG Probe node, and the results of the last finished runs.

    The model carries the probe through the graph. The results stay in the same object.

    Attributes:
        watched: settings that stand in where no guidance acts: the family, the defaults, and no guided layer.
        names: name of each layer in the ``blocks`` input.
        words: words to map.
        node_id: id of the probe's node.
        result: result of the last run; None before the first.
        results: result of the last run of each model in a list that ComfyUI made, as GAG Sweep does, by its position in
            the list; the result of a single run under 0.
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
        """Store the result of a run that has ended."""
        index = list_index()
        if index == 0:
            self.results.clear()
        self.result = self.results[index] = result


def list_index() -> int:
    """Return the position in ComfyUI's list execution, while it runs a node once per input of a list; else 0."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return 0
    return getattr(get_executing_context(), "list_index", None) or 0
