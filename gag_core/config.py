# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings of a guided attention."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from .echo import echo, plain

RULES = ("gag", "uniform", "pladis", "anderson")
NORM_MODES = ("absolute", "relative")
MOST_ANDERSON_DEPTH = 5


@dataclass(frozen=True)
class GuidanceConfig:
    """Settings of a guided attention (arXiv 2603.02531 v2, eq. 12-13; rule ``"anderson"``: its v1).

    Attributes:
        rule: ``"gag"`` extrapolates from the sparse read-out along the capped, geometry-aware discrepancy;
            ``"uniform"`` extrapolates from the uniform read-out U, the mean of the values, beyond the dense one,
            ``D + guidance_scale (D - U)`` (see :mod:`gag_core.uniform`);
            ``"pladis"`` is the plain extrapolation ``D + guidance_scale (S - D)`` of arXiv 2503.07677;
            ``"anderson"`` is ``"gag"`` with a lambda that is solved for each token and head (see
            :func:`gag_core.anderson.retrieve_with_coefficients`).
        guidance_scale: lambda, the factor of the extrapolation. 0 is plain sparse attention with ``"gag"`` and
            ``"anderson"``, and plain attention with the others. With ``"anderson"`` it is only the bound of the
            coefficients, and is at least 0.
        norm_threshold: eta, the largest norm of the guidance vector; ``inf`` switches the cap off. Rules
            ``"uniform"`` and ``"pladis"`` have no cap.
        norm_mode: ``"absolute"`` caps at ``norm_threshold``; ``"relative"`` at ``norm_threshold * ||S||``, so that
            one setting means the same on models whose values have other norms.
        orthogonal_scale: zeta, the factor of the part orthogonal to the sparse read-out. Not used by ``"uniform"`` and
            ``"pladis"``.
        alpha: sparsity of the sparse read-out: 1 is softmax (no guidance), 1.5 the paper's, 2 is sparsemax. Not used by
            ``"uniform"``.
        strength: blend with plain attention, ``D + strength (guided - D)``; 0 is off.
        merge_heads: True to take norms and inner products over the concatenated heads instead of per head.
        anderson_depth: number of differences of retrievals that the coefficients are solved over, 1 to 5. Each beyond
            the first costs one more sparse retrieval. ``"anderson"`` only.
        anderson_regularization: Tikhonov regularisation, relative to the squared length of each difference: 0.01 makes
            a lambda of one difference 1% smaller. ``"anderson"`` only.

    Raises:
        ValueError: a field is outside its range; the message names the field, the value and the range.
        TypeError: a field that must be a number or a boolean is neither.
    """

    rule: str = "gag"
    guidance_scale: float = 10.0
    norm_threshold: float = 15.0
    norm_mode: str = "absolute"
    orthogonal_scale: float = 0.0
    alpha: float = 1.5
    strength: float = 1.0
    merge_heads: bool = False
    anderson_depth: int = 1
    anderson_regularization: float = 0.01

    def __post_init__(self) -> None:
        _one_of("rule", self.rule, RULES)
        _one_of("norm_mode", self.norm_mode, NORM_MODES)
        _number("guidance_scale", self.guidance_scale, -math.inf, math.inf)
        _number("norm_threshold", self.norm_threshold, 0.0, math.inf, infinite=True)
        _number("orthogonal_scale", self.orthogonal_scale, -math.inf, math.inf)
        _number("alpha", self.alpha, 1.0, 2.0)
        _number("strength", self.strength, -math.inf, math.inf)
        if not isinstance(self.merge_heads, bool):
            raise TypeError(f"merge_heads must be True or False, got {echo(self.merge_heads)}.")
        _integer("anderson_depth", self.anderson_depth, 1, MOST_ANDERSON_DEPTH)
        _number("anderson_regularization", self.anderson_regularization, 0.0, math.inf)
        if self.rule == "anderson" and self.guidance_scale < 0.0:
            raise ValueError(
                "guidance_scale must be at least 0 with rule 'anderson', of whose coefficients it is the bound, "
                f"got {echo(self.guidance_scale)}."
            )


def wrong_type(config: object) -> TypeError:
    """Return the error for an argument ``config`` that is not a GuidanceConfig."""
    return TypeError(f"config must be a GuidanceConfig, got {plain(type(config).__name__)}.")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {echo(value)}.")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {echo(value)}.")
    if not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {echo(value)}.")


def _number(name: str, value: object, low: float, high: float, *, infinite: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {echo(value)}.")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must be a number that fits in a float, got {echo(value)}.")
    if math.isnan(value) or (math.isinf(value) and not infinite) or not low <= value <= high:
        allowed = "a finite number" if math.isinf(high) and not infinite else "a number"
        if not math.isinf(low):
            allowed += f" of at least {low:g}" if math.isinf(high) else f" from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {allowed}, got {echo(value)}.")
