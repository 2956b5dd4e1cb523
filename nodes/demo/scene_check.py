# SPDX-License-Identifier: GPL-3.0-or-later
"""Exact check of a picture against its scene: colours, shapes, counts and relation of the things it shows.

A pixel belongs to the palette colour in whose direction from the background it lies, if it is at least half way to that
colour. So blur at an edge, which mixes colours with the background, changes no colour and moves no edge. Things are
connected pixels of one colour. Their shape is the drawn shape that they overlap best. Imports nothing of ComfyUI.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .architecture import SIZE
from .scenes import BACKGROUND, COLOURS, RELATIONS, SHAPES, SIZES, Scene, box, gap, mask

# Smallest number of pixels of a thing. The smallest thing drawn, a cross of width 8, has 28.
_LEAST_PIXELS = 12
# Smallest overlap (intersection over union) of a thing with a shape.
_LEAST_OVERLAP = 0.6
_WINDOW = SIZE // 2
_NAMES = tuple(COLOURS)
_DIRECTIONS = np.array([COLOURS[name] for name in _NAMES]) - np.array(BACKGROUND)
_LENGTHS = np.linalg.norm(_DIRECTIONS, axis=1)
ATTRIBUTES = ("colour", "shape", "count", "relation")


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture: colour, shape (None if unknown) and box (left, top, right, bottom) in pixels."""

    colour: str
    shape: str | None
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Verdict:
    """Attributes of a picture that are right; ``relation`` is None if the scene has none."""

    colour: bool
    shape: bool
    count: bool
    relation: bool | None
    everything: bool


def _templates() -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Return masks of every shape at every size, also one smaller and one larger, at nine positions near a corner."""
    masks, names = [], []
    for shape in SHAPES:
        for size in range(SIZES[0] - 1, SIZES[-1] + 2):
            for dy in range(3):
                for dx in range(3):
                    window = np.zeros((_WINDOW, _WINDOW), bool)
                    window[dy : dy + size, dx : dx + size] = mask(shape, size)
                    masks.append(window)
                    names.append(shape)
    return np.stack(masks).reshape(len(masks), -1).astype(np.float32), tuple(names)


_MASKS, _MASK_NAMES = _templates()
_AREAS = _MASKS.sum(1)


def look(picture: NDArray[np.floating]) -> list[Seen]:
    """Return the things in a picture ``[3, 32, 32]`` in 0..1."""
    offset = np.moveaxis(np.asarray(picture, np.float64), 0, -1) - np.array(BACKGROUND)
    along = offset @ _DIRECTIONS.T / _LENGTHS  # component in the direction of each colour
    nearest = along.argmax(-1)
    coloured = np.take_along_axis(along, nearest[..., None], -1)[..., 0] >= 0.5 * _LENGTHS[nearest]
    things = []
    for index, name in enumerate(_NAMES):
        labels, _ = ndimage.label(coloured & (nearest == index))
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            pixels = labels[rows, columns] == label
            if pixels.sum() >= _LEAST_PIXELS:
                edges = tuple(float(edge) for edge in (columns.start, rows.start, columns.stop, rows.stop))
                things.append(Seen(name, _shape(pixels), edges))  # type: ignore[arg-type]
    return things


def check(picture: NDArray[np.floating], scene: Scene) -> Verdict:
    """Check a picture ``[3, 32, 32]`` in 0..1 against its scene.

    Colours and shapes are right if the picture has those of the scene and no others. The count is right if each group
    has its number of things and no thing is left. Groups are told apart by the attribute that differs between them, so
    that one wrong attribute does not fail the others. Everything is right only if each thing has its colour, its shape
    and its group's number, and the relation holds.
    """
    seen = look(picture)
    colours = {group.colour for group in scene.groups}
    shapes = {group.shape for group in scene.groups}
    members = [[thing for thing in seen if _is_of_group(thing, index, scene)] for index in range(len(scene.groups))]
    wanted: Counter[tuple[str | None, str | None]] = Counter()
    for group in scene.groups:
        wanted[group.colour, group.shape] += group.count or 0
    relation = None
    if scene.relation is not None:
        relation = all(members) and _holds(members[0], members[1], scene.relation)
    total = sum(group.count or 0 for group in scene.groups)
    return Verdict(
        colour={thing.colour for thing in seen} == colours,
        shape={thing.shape for thing in seen} == shapes,
        count=len(seen) == total and all(len(m) == g.count for m, g in zip(members, scene.groups, strict=True)),
        relation=relation,
        everything=Counter((thing.colour, thing.shape) for thing in seen) == wanted and relation is not False,
    )


def _shape(pixels: NDArray[np.bool_]) -> str | None:
    if max(pixels.shape) > _WINDOW - 2:
        return None
    window = np.zeros((_WINDOW, _WINDOW), np.float32)
    window[1 : 1 + pixels.shape[0], 1 : 1 + pixels.shape[1]] = pixels
    common = _MASKS @ window.ravel()
    overlap = common / (_AREAS + window.sum() - common)
    best = int(overlap.argmax())
    return _MASK_NAMES[best] if overlap[best] >= _LEAST_OVERLAP else None


def _is_of_group(thing: Seen, index: int, scene: Scene) -> bool:
    """True if a thing belongs to a group, by an attribute that tells the groups apart."""
    group = scene.groups[index]
    if len({other.colour for other in scene.groups}) == len(scene.groups) > 1:
        return thing.colour == group.colour
    if len({other.shape for other in scene.groups}) == len(scene.groups) > 1:
        return thing.shape == group.shape
    return len(scene.groups) == 1 or (thing.colour, thing.shape) == (group.colour, group.shape)


def _holds(first: list[Seen], second: list[Seen], relation: str) -> bool:
    """True if the groups are apart in the given direction, more than in any other; a pixel of overlap is allowed."""
    a, b = box([thing.box for thing in first]), box([thing.box for thing in second])
    distance = gap(a, b, relation)
    return distance >= -1 and all(distance > gap(a, b, other) for other in RELATIONS if other != relation)
