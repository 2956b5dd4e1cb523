# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be said of two methods that were tried on the same captions with the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Two-sided level of 5 % and a power of 80 %, in standard errors.
_LEVEL, _POWER = 1.96, 0.8416
SIGNIFICANT = 0.05

Marks = NDArray[np.bool_]


class Paired(NamedTuple):
    """A share of captions, less that of the baseline.

    Attributes:
        captions: how many there are.
        difference: the share with the method less the share without.
        error: its standard error.
        gained, lost: captions that turned right, and that turned wrong.
        p: how likely so uneven a split of those captions is if the method changes nothing (exact McNemar test).
    """

    captions: int
    difference: float
    error: float
    gained: int
    lost: int
    p: float

    @property
    def detectable(self) -> float:
        """The true difference that so many captions would show in four of five tries, at a level of 5 %."""
        return (_LEVEL + _POWER) * self.error


def paired(baseline: Marks, method: Marks) -> Paired:
    """Compare ``[N]`` marks caption by caption.

    The standard error is that of Agresti and Min (2005), half a caption more in each of the four cells of right and
    wrong: so it is not 0 where no caption turned.

    Raises:
        ValueError: the two are not of the same captions.
    """
    if baseline.shape != method.shape or baseline.ndim != 1 or not len(baseline):
        raise ValueError(f"Pairs need the same captions, at least one; got {baseline.shape} and {method.shape}.")
    gained, lost = int((method & ~baseline).sum()), int((baseline & ~method).sum())
    number = len(baseline) + 2
    error = float(np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / number) / number)
    return Paired(len(baseline), (gained - lost) / len(baseline), error, gained, lost, sign_test(gained, lost))


def sign_test(gained: int, lost: int) -> float:
    """The probability, two-sided, that fair coins fall as unevenly."""
    from scipy.stats import binomtest  # type: ignore[import-untyped, unused-ignore]

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def mean(values: NDArray[np.floating]) -> tuple[float, float]:
    """Mean and its standard error of ``[N]``."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def share(marks: Marks) -> tuple[float, float]:
    """Share of right marks and its standard error."""
    part = float(marks.mean())
    return part, float(np.sqrt(part * (1 - part) / len(marks)))


def holm(values: Sequence[float]) -> list[float]:
    """p-values made larger so that among all of them a false alarm is no likelier than in one (Holm 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[number]))
        adjusted[number] = largest
    return adjusted
