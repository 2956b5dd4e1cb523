# SPDX-License-Identifier: GPL-3.0-or-later
"""Statistics of methods that are compared on the same captions with the same noise.

Means, the sign test and Holm's correction are those of GAG Score, in the pack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

import pack

if TYPE_CHECKING:
    from gag.nodes.scoring import significance
else:
    significance = pack.module(pack.SIGNIFICANCE)

# Standard errors for a two-sided level of 5 % and for a power of 80 %.
_LEVEL, _POWER = 1.96, 0.8416
SIGNIFICANT = significance.SIGNIFICANT
mean, sign_test, holm = significance.mean, significance.sign_test, significance.holm

Marks = NDArray[np.bool_]


class Paired(NamedTuple):
    """Share of right captions with a method, compared with the baseline.

    Attributes:
        captions: number of captions.
        difference: share with the method minus share of the baseline.
        error: standard error of the difference.
        gained: number of captions that turned right.
        lost: number of captions that turned wrong.
        p: p-value of the exact McNemar test, that gained and lost differ this much by chance.
    """

    captions: int
    difference: float
    error: float
    gained: int
    lost: int
    p: float

    @property
    def detectable(self) -> float:
        """Return the true difference that this many captions would show in four of five tries, at a level of 5 %."""
        return (_LEVEL + _POWER) * self.error


def paired(baseline: Marks, method: Marks) -> Paired:
    """Compare ``[N]`` marks caption by caption.

    The standard error is that of Agresti and Min (2005), with half a caption added to each of the four cells of right
    and wrong, so that it is not 0 where no caption turned.

    Raises:
        ValueError: the marks are not of the same captions.
    """
    if baseline.shape != method.shape or baseline.ndim != 1 or not len(baseline):
        raise ValueError(f"Pairs need the same captions, at least one; got {baseline.shape} and {method.shape}.")
    gained, lost = int((method & ~baseline).sum()), int((baseline & ~method).sum())
    count = len(baseline) + 2
    error = float(np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / count) / count)
    return Paired(len(baseline), (gained - lost) / len(baseline), error, gained, lost, sign_test(gained, lost))


def share(marks: Marks) -> tuple[float, float]:
    """Return the share of right marks and its standard error."""
    part = float(marks.mean())
    return part, float(np.sqrt(part * (1 - part) / len(marks)))
