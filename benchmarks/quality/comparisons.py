# SPDX-License-Identifier: GPL-3.0-or-later
"""Comparisons on held-out captions: each family's chosen setting against no guidance and against the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality.methods import BASELINE, CONTROLS, FAMILIES, GUIDANCE, METHODS, Method
from benchmarks.quality.records import REPORT, Cell, Key, Outcome, Results
from benchmarks.quality.statistics import SIGNIFICANT, Paired, holm, paired


@dataclass
class Row:
    """One family in one cell, on held-out captions.

    Attributes:
        tuned: share of right captions of this setting on ``tune``; None where the family has one setting.
        outcome: results with the method.
        baseline: results without guidance, of the same captions.
        versus: comparison with no guidance.
        controls: comparison with each control, by its name.
        p: p-value, adjusted among all rows that are reported together.
    """

    cell: Cell
    family: str
    setting: str
    tuned: float | None
    outcome: Outcome
    baseline: Outcome
    versus: Paired
    controls: dict[str, Paired]
    p: float = 1.0

    @property
    def verdict(self) -> str:
        """Return the conclusion in words."""
        if self.p >= SIGNIFICANT:
            return "no measurable difference"
        if self.versus.difference < 0:
            return "worse"
        if self.family not in GUIDANCE:
            return "better"
        if self.beats_controls:
            return "better, and better than all controls"
        return "better, but not better than the controls"

    @property
    def beats_controls(self) -> bool:
        """True if all controls were measured and the family is measurably better than each."""
        return len(self.controls) == len(CONTROLS) and all(
            versus.p < SIGNIFICANT and versus.difference > 0 for versus in self.controls.values()
        )


def chosen(results: Results, cell: Cell, family: str) -> Method | None:
    """Return the method that represents a family on held-out captions: the best on ``tune``, or the only one."""
    settings = {method.setting: method for method in METHODS if method.family == family}
    best = results.best(cell, family)
    if best is not None:
        return settings.get(best[0])
    return next(iter(settings.values())) if len(settings) == 1 else None


def rows_of(results: Results, cell: Cell) -> list[Row]:
    """Return a row for each family of a cell that has held-out results."""
    baseline = results.outcome(Key(cell, REPORT, BASELINE.family, BASELINE.setting))
    if baseline is None:
        return []
    found: dict[str, tuple[str, float | None, Outcome]] = {}
    for family in FAMILIES[1:]:
        method = chosen(results, cell, family)
        outcome = None if method is None else results.outcome(Key(cell, REPORT, family, method.setting))
        if method is not None and outcome is not None:
            tried = results.best(cell, family)
            found[family] = (method.setting, None if tried is None else float(tried[1].right().mean()), outcome)
    return [
        Row(
            cell, family, setting, tuned, *_common(outcome, baseline),
            versus=compared(baseline, outcome),
            controls={name: compared(found[name][2], outcome) for name in CONTROLS if name in found},
        )
        for family, (setting, tuned, outcome) in found.items()
    ]  # fmt: skip


def _common(outcome: Outcome, baseline: Outcome) -> tuple[Outcome, Outcome]:
    captions = min(len(outcome), len(baseline))
    return outcome.first(captions), baseline.first(captions)


def compared(baseline: Outcome, outcome: Outcome) -> Paired:
    """Compare all-right marks in pairs, on the captions that both have."""
    outcome, baseline = _common(outcome, baseline)
    return paired(baseline.right(), outcome.right())


def adjust(rows: Sequence[Row]) -> None:
    """Adjust the p-values of all rows that are reported together, in place."""
    for row, p in zip(rows, holm([row.versus.p for row in rows]), strict=True):
        row.p = p
