# SPDX-License-Identifier: GPL-3.0-or-later
"""Scores of pictures and their differences to those without guidance, in words, as labels and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .measures import Measure
from .significance import SIGNIFICANT, holm, mean, sign_test, t_test

FORMAT = 1


@dataclass(frozen=True)
class Difference:
    """Differences of pairs of pictures.

    Attributes:
        pairs: number of pairs.
        mean, error: mean difference and its standard error.
        gained, lost: numbers of pairs that differ upwards and downwards.
        p: p-value, adjusted for the number of comparisons.
        verdict: one of VERDICTS.
    """

    pairs: int
    mean: float
    error: float
    gained: int
    lost: int
    p: float
    verdict: str


VERDICTS = {
    "better": "better",
    "worse": "worse",
    "chance": "cannot be told from chance",
    "one": "one pair tells nothing",
    "same": "no difference at all",
    "repeated": "all pairs differ alike, as if one picture was repeated, which tells no more than one pair",
}


@dataclass(frozen=True)
class Cell:
    """Pictures of one setting, or single pictures: label (empty without one), scores, difference to the baseline."""

    label: str
    scores: list[float]
    difference: Difference | None = None


@dataclass(frozen=True)
class Report:
    """Scores of pictures.

    Attributes:
        measure: the measure.
        prompts: the prompts, without repetitions.
        cells: the pictures by label; a single one without labels.
        batches: scores of each batch that came in, for labels where none came in.
        baseline: scores of the pictures without guidance, None if there are none.
        versus: name of the baseline.
    """

    measure: Measure
    prompts: list[str]
    cells: list[Cell]
    batches: list[list[float]]
    baseline: list[float] | None
    versus: str

    def summary(self) -> str:
        """Return the result in words."""
        compared = [cell for cell in self.cells if cell.difference]
        lines = [f"{self._about(cell)}{self._versus(cell)}." for cell in self.cells]
        if compared:
            test = "exact sign test" if self.measure.is_mark else "paired t-test; ± is the standard error"
            many = f"; corrected for {len(compared)} comparisons (Holm)" if len(compared) > 1 else ""
            lines.append(f"Better and worse: {test}, at a level of 5 %{many}.")
        return "\n".join([*lines, *self.measure.notes])

    def _about(self, cell: Cell) -> str:
        """Return label and score of a cell, for the summary."""
        label = f"{cell.label}: " if cell.label else ""
        pictures = f"{len(cell.scores)} picture{'' if len(cell.scores) == 1 else 's'}"
        if self.measure.is_mark:
            return f"{label}{sum(cell.scores):.0f} of {pictures} right"
        return f"{label}{self.measure.name} {np.mean(cell.scores):.2f} on {pictures}"

    def _versus(self, cell: Cell) -> str:
        """Return the difference of a cell to the baseline, for the summary."""
        if cell.difference is None:
            return ""
        assert self.baseline is not None
        there = np.mean(self.baseline)
        value = f"{sum(self.baseline):.0f}" if self.measure.is_mark else f"{there:.2f}"
        return f"; {self.versus} {value}; {difference_in_words(cell.difference, self.measure.is_mark)}"

    def labels(self) -> list[str]:
        """Return a label for each cell of GAG Grid: for each label that came in, else for each picture or batch."""
        if self.cells[0].label:
            return ["\n".join([cell.label, *self._short(cell)]) for cell in self.cells]
        batches = self.batches
        if len(batches) == 1:
            batches = [[score] for score in batches[0]]
        return [self._score(scores) for scores in batches]

    def _short(self, cell: Cell) -> list[str]:
        """Return the score and the difference of a cell in as few words as fit into a grid."""
        lines = [self._score(cell.scores)]
        if cell.difference is not None:
            lines.append(difference_in_words(cell.difference, self.measure.is_mark))
        return lines

    def _score(self, scores: Sequence[float]) -> str:
        if self.measure.is_mark:
            return f"{sum(scores):.0f} of {len(scores)} right" if len(scores) > 1 else "right" if scores[0] else "wrong"
        return f"{self.measure.name} {np.mean(scores):.2f}"

    def as_json(self) -> str:
        """Return all numbers as JSON."""
        cells = [
            {
                "label": cell.label or None,
                "scores": _rounded(cell.scores),
                "mean": _rounded([float(np.mean(cell.scores))])[0],
                "difference": None
                if cell.difference is None
                else {
                    **{name: getattr(cell.difference, name) for name in ("pairs", "gained", "lost", "verdict")},
                    **{name: round(getattr(cell.difference, name), 6) for name in ("mean", "error", "p")},
                },
            }
            for cell in self.cells
        ]
        data = {
            "format": FORMAT,
            "score": self.measure.name,
            "definition": self.measure.definition,
            "prompts": self.prompts,
            "cells": cells,
            "baseline": None if self.baseline is None else _rounded(self.baseline),
            "notes": self.measure.notes,
        }
        return json.dumps(data, indent=2, allow_nan=False)


def _rounded(scores: Sequence[float]) -> list[float]:
    return [round(score, 6) for score in scores]


def difference_in_words(difference: Difference, is_mark: bool) -> str:
    """Return a difference and its verdict in words, such as ``on 8 pairs +0.41 ± 0.28: cannot be told from chance``."""
    pairs = f"on {difference.pairs} pair{'' if difference.pairs == 1 else 's'}"
    if is_mark:
        change = f"{difference.gained} turned right and {difference.lost} wrong"
    else:
        change = f"{difference.mean:+.2f}" + (f" ± {difference.error:.2f}" if difference.pairs > 1 else "")
    return f"{pairs} {change}: {VERDICTS[difference.verdict]}"


def differences_of(cells: Sequence[Sequence[float]], baseline: Sequence[float], is_mark: bool) -> list[Difference]:
    """Compare the scores of each cell with the baseline, pair by pair.

    Scores are compared by a paired t-test, marks of 0 and 1 by the exact sign test. If there are several cells, the
    p-values are adjusted for their number.
    """
    found = [np.array(cell, float) - np.array(baseline, float) for cell in cells]
    gained, lost = ([int((sign * one > 0).sum()) for one in found] for sign in (1, -1))
    tested = [
        sign_test(up, down) if is_mark else t_test(one) for one, up, down in zip(found, gained, lost, strict=True)
    ]
    return [
        Difference(len(one), *mean(one), up, down, p, _verdict(one, p, is_mark))
        for one, up, down, p in zip(found, gained, lost, holm(tested), strict=True)
    ]


def _verdict(differences: Any, p: float, is_mark: bool) -> str:
    """Return one of VERDICTS for the differences ``[N]`` of pairs."""
    average, error = mean(differences)
    if len(differences) == 1:
        return "one"
    if not differences.any():
        return "same"
    if not is_mark and error <= 1e-6 * abs(average):
        return "repeated"
    if p >= SIGNIFICANT:
        return "chance"
    return "better" if average > 0 else "worse"
