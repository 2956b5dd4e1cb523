# SPDX-License-Identifier: GPL-3.0-or-later
"""Differences of pairs: mean, standard error, and tests that tell them from chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SIGNIFICANT = 0.05


def mean(values: NDArray[np.floating]) -> tuple[float, float]:
    """Return the mean of ``[N]`` and its standard error, 0 for a single value."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def t_test(differences: NDArray[np.floating]) -> float:
    """Return the two-sided p-value of a paired t-test: that ``[N]`` differences of mean 0 are this far off by chance.

    Student's distribution has N - 1 degrees of freedom, so few pairs must differ by more standard errors than many. The
    p-value is 1 for a single pair, and where all differences are equal, so that nothing is known of their spread.
    """
    average, error = mean(differences)
    if len(differences) < 2 or error <= 1e-6 * abs(average):
        return 1.0
    from scipy.special import stdtr  # type: ignore[import-untyped, unused-ignore]

    return float(2.0 * stdtr(len(differences) - 1, -abs(average) / error))


def sign_test(gained: int, lost: int) -> float:
    """Return the two-sided probability that fair coins fall at least this unevenly: the exact McNemar test."""
    count = gained + lost
    return min(1.0, 2 * sum(math.comb(count, less) for less in range(min(gained, lost) + 1)) / 2**count)


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p-values so that a false alarm among all of them is no likelier than in a single test (Holm 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted
