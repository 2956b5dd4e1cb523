# SPDX-License-Identifier: GPL-3.0-or-later
"""Strength over the steps of a run: a factor of the strength for every model call.

The curve is not part of ``gag_core``, which knows one attention and no steps. It is not part of the paper either, which
guides every step alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...gag_core.echo import echo, plain
from ..input_checks import check_option

KINDS = ("constant", "linear", "cosine", "interval", "bump")
OVER = ("steps", "sigma")
_LARGEST = 100.0
_LARGEST_SIGMA = 1e9
_MOST_FACTORS = 10_000
# Positions are quotients of whole numbers. A position this close to a factor's own is meant to be that position.
_SAME_POSITION = 1e-9


@dataclass(frozen=True)
class Curve:
    """A factor that goes from one value to another, or there and back.

    Let u go from 0 at ``start`` to 1 at ``end``, with 0 before and 1 after. The factor is
    ``start_value + (end_value - start_value) * w``, where w is

    - ``"constant"``: 1
    - ``"linear"``: u
    - ``"cosine"``: (1 - cos(pi u)) / 2
    - ``"interval"``: 1 from ``start`` to ``end``, both of them included, else 0
    - ``"bump"``: (1 - cos(2 pi u)) / 2

    Attributes:
        kind: one of :data:`KINDS`.
        start_value: factor before ``start``; with interval and bump after ``end`` too. -100 to 100.
        end_value: factor that the curve goes to. -100 to 100.
        start: begin of the change, in the unit of ``over``. With ``start == end``, linear and cosine jump there.
        end: end of the change, not before ``start``. With sigma not above ``start``, because noise falls during a run.
        over: ``"steps"`` for shares of the run's steps, 0 the first and 1 the last; ``"sigma"`` for noise levels.

    Raises:
        ValueError: a field is outside what is allowed; the message names the field, the value and the range.
        TypeError: a number was expected and something else was given.
    """

    kind: str = "linear"
    start_value: float = 0.0
    end_value: float = 1.0
    start: float = 0.0
    end: float = 1.0
    over: str = "steps"

    def __post_init__(self) -> None:
        for name, value, allowed in (("kind", self.kind, KINDS), ("over", self.over, OVER)):
            check_option(name, value, allowed)
        for name in ("start_value", "end_value"):
            _check_factor(name, getattr(self, name))
        ends = (self.start, self.end)
        numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends)
        given = f"got {echo(self.start)} and {echo(self.end)}."
        if self.over == "steps":
            if not numbers or not 0.0 <= self.start <= self.end <= 1.0:
                raise ValueError(
                    "start and end must lie between 0 and 1 over steps, the start not after the end, " + given
                )
        elif not numbers or not _LARGEST_SIGMA >= self.start >= self.end >= 0.0:
            raise ValueError(
                f"start and end must be noise levels from 0 to {_LARGEST_SIGMA:g} over sigma, the start not below the "
                "end because noise falls during a run, " + given
            )

    def factor(self, percent: float, sigma: float) -> float:
        """Return the factor of a model call at a share of the run's steps (0 to 1) and a noise level."""
        # Noise falls. With the sign reversed, the position grows during a run in both units.
        at, start, end = (percent, self.start, self.end) if self.over == "steps" else (-sigma, -self.start, -self.end)
        u = 0.0 if at < start else 1.0 if at >= end else (at - start) / (end - start)
        if self.kind == "interval":
            weight = float(start <= at <= end)
        else:
            weight = {
                "constant": 1.0,
                "linear": u,
                "cosine": (1.0 - math.cos(math.pi * u)) / 2.0,
                "bump": (1.0 - math.cos(2.0 * math.pi * u)) / 2.0,
            }[self.kind]
        # Exactly end_value where w is 1, so that a factor of 0 is off.
        return self.end_value if weight == 1.0 else self.start_value + (self.end_value - self.start_value) * weight


@dataclass(frozen=True)
class Factors:
    """One factor per step. In a run of another number of steps the factors are stretched over it, linearly in between.

    Raises:
        ValueError: there is none, or one is not a number from -100 to 100.
        TypeError: one is not a number.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("schedule must have at least one factor, got none.")
        if len(self.values) > _MOST_FACTORS:
            raise ValueError(f"schedule must have at most {_MOST_FACTORS} factors, got {len(self.values)}.")
        for index, value in enumerate(self.values):
            _check_factor(f"schedule: factor {index} (counted from 0)", value)

    def factor(self, percent: float, sigma: float) -> float:
        """Return the factor of a model call at a share of the run's steps (0 to 1). The noise level does not matter."""
        position = percent * (len(self.values) - 1)
        nearest = round(position)
        if abs(position - nearest) < _SAME_POSITION:
            return float(self.values[nearest])
        before, after = self.values[int(position)], self.values[int(position) + 1]
        return before + (after - before) * (position - int(position))


Schedule = Curve | Factors


def schedule_of(given: Any) -> Schedule | None:
    """Return the schedule that was connected to a node's ``schedule`` input.

    Args:
        given: None; the output of GAG Schedule; FLOATS, a list of one factor per step; or SIGMAS, a tensor
            ``[steps + 1]`` of noise levels. Each step's factor then is its level divided by the largest. The last level
            is the end of a run and begins no step.

    Raises:
        ValueError, TypeError: the input is none of these, or a number in it is not allowed.
    """
    if given is None or isinstance(given, (Curve, Factors)):
        return given
    if isinstance(given, Tensor):
        return Factors(_shares_of_largest(given))
    if isinstance(given, (list, tuple)):
        return Factors(tuple(given))
    raise TypeError(
        "schedule must come from GAG Schedule, or be FLOATS (a list of one factor per step) or SIGMAS, "
        f"got {plain(type(given).__name__)}."
    )


def _shares_of_largest(sigmas: Tensor) -> tuple[float, ...]:
    """Return each step's noise level divided by the largest."""
    if sigmas.numel() > _MOST_FACTORS + 1:
        raise ValueError(f"schedule must have at most {_MOST_FACTORS} factors, got {sigmas.numel() - 1}.")
    is_row = sigmas.ndim == 1 and sigmas.layout == torch.strided and not sigmas.is_meta
    levels = sigmas.tolist() if is_row and sigmas.dtype != torch.bool and not sigmas.is_complex() else []
    if len(levels) < 2 or not all(0.0 <= level < math.inf for level in levels) or max(levels[:-1]) == 0.0:
        raise ValueError(
            "schedule must be, where it is SIGMAS, a row of two or more noise levels of at least 0 that are not all 0, "
            f"got {echo(levels) if levels else f'a tensor of shape {tuple(sigmas.shape)} in {sigmas.dtype}'}."
        )
    largest = max(levels[:-1])
    return tuple(level / largest for level in levels[:-1])


def _check_factor(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {echo(value)}.")
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} must be a number from {-_LARGEST:g} to {_LARGEST:g}, got {echo(value)}.")
