# SPDX-License-Identifier: GPL-3.0-or-later
"""Scenes of coloured shapes, which the demo models draw. Imports nothing of ComfyUI.

The training imports this file too, so that what is drawn and what is checked cannot differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

# Widths of the shapes in pixels.
SIZES = (8, 9, 10)
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.75, 0.15, 0.85),
    "white": (0.95, 0.95, 0.95),
}
BACKGROUND = (0.12, 0.12, 0.12)
SHAPES = ("circle", "square", "triangle", "cross")
# Each relation with its opposite: "a left of b" is "b right of a".
RELATIONS = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Group:
    """One to three things that look alike; None stands for an attribute that a caption leaves out."""

    count: int | None
    colour: str | None
    shape: str | None


@dataclass(frozen=True)
class Scene:
    """Groups of things; ``relation`` is the position of the first group relative to the second, or None."""

    groups: tuple[Group, ...]
    relation: str | None = None


@cache
def mask(shape: str, size: int) -> NDArray[np.bool_]:
    """Return the mask ``[size, size]`` of a shape."""
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    if shape == "circle":
        return rows**2 + columns**2 <= (size / 2) ** 2
    if shape == "square":
        return np.ones((size, size), bool)
    if shape == "triangle":
        return np.abs(columns) <= (rows + size / 2) / 2
    arm = (size - 2 * round(size / 3)) / 2
    return (np.abs(rows) < arm) | (np.abs(columns) < arm)


def gap(first: tuple[float, float, float, float], second: tuple[float, float, float, float], relation: str) -> float:
    """Return the free pixels between boxes (left, top, right, bottom) along the relation; negative for an overlap."""
    if relation in ("right", "below"):
        return gap(second, first, RELATIONS[relation])
    return second[0] - first[2] if relation == "left" else second[1] - first[3]


def box(boxes: list[tuple[float, float, float, float]]) -> tuple[float, float, float, float]:
    """Return the box around boxes (left, top, right, bottom)."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)
