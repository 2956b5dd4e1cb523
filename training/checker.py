# SPDX-License-Identifier: GPL-3.0-or-later
"""What a picture shows, exactly: things by colour and shape, and whether they are what a scene says.

A pixel belongs to the palette colour whose direction from the background it has, if it is at least half way there: so
blur at an edge, which mixes with the background, neither changes a colour nor moves an edge. Things are connected
pixels of one colour; their shape is the drawn one that they overlap best.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.pictures import BACKGROUND, COLOURS, RELATIONS, SHAPES, SIZE, SIZES, Scene, box, gap, mask

# The smallest thing drawn, a cross of 8, has 28 pixels; less than this is a speck, not a thing.
_SPECK = 12
# Overlap (intersection over union) under which a thing has no shape.
_LEAST_OVERLAP = 0.6
_WINDOW = SIZE // 2
_NAMES = tuple(COLOURS)
_TOWARDS = np.array([COLOURS[name] for name in _NAMES]) - np.array(BACKGROUND)
_LENGTHS = np.linalg.norm(_TOWARDS, axis=1)
# Further than this from every palette colour a pixel is off the palette.
_OFF = 0.15
ATTRIBUTES = ("colour", "shape", "count", "relation")


@dataclass(frozen=True)
class Seen:
    """A thing found: colour, shape (None if it is like none), and its box (left, top, right, bottom) in pixels."""

    colour: str
    shape: str | None
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Verdict:
    """What is right about a picture; ``relation`` is None where the scene has none."""

    colour: bool
    shape: bool
    count: bool
    relation: bool | None
    everything: bool


def _templates() -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Every shape at every size (and one smaller and larger), at nine places about the window's corner."""
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
    """The things in a picture ``[3, 32, 32]`` in 0..1."""
    away = np.moveaxis(np.asarray(picture, np.float64), 0, -1) - np.array(BACKGROUND)
    along = away @ _TOWARDS.T / _LENGTHS  # how far in each colour's direction
    nearest = along.argmax(-1)
    there = np.take_along_axis(along, nearest[..., None], -1)[..., 0] >= 0.5 * _LENGTHS[nearest]
    things = []
    for number, name in enumerate(_NAMES):
        labels, _ = ndimage.label(there & (nearest == number))
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            pixels = labels[rows, columns] == label
            if pixels.sum() >= _SPECK:
                where = tuple(float(edge) for edge in (columns.start, rows.start, columns.stop, rows.stop))
                things.append(Seen(name, _shape(pixels), where))  # type: ignore[arg-type]
    return things


def check(picture: NDArray[np.floating], scene: Scene) -> Verdict:
    """Whether a picture ``[3, 32, 32]`` in 0..1 shows a scene.

    Colours and shapes are right if there are the scene's and no others, the count if each group has its number and
    nothing is over. Groups are told apart by what differs between them, so that one wrong attribute does not fail the
    others. Everything is right only if each thing has its colour, its shape and its group's number, and the relation
    holds.
    """
    seen = look(picture)
    colours = {group.colour for group in scene.groups}
    shapes = {group.shape for group in scene.groups}
    members = [[thing for thing in seen if _same(thing, number, scene)] for number in range(len(scene.groups))]
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


def saturation(picture: NDArray[np.floating]) -> float:
    """Mean of largest minus smallest channel over the coloured pixels of a picture in 0..1; 0 if there are none."""
    spread = np.asarray(picture).max(0) - np.asarray(picture).min(0)
    coloured = spread > 0.3
    return float(spread[coloured].mean()) if coloured.any() else 0.0


def off_palette(picture: NDArray[np.floating]) -> float:
    """The share of pixels that are near neither the background nor a palette colour."""
    palette = np.array([BACKGROUND, *COLOURS.values()])
    pixels = np.moveaxis(np.asarray(picture, np.float64), 0, -1)[..., None, :]
    return float((np.linalg.norm(pixels - palette, axis=-1).min(-1) > _OFF).mean())


def _shape(pixels: NDArray[np.bool_]) -> str | None:
    if max(pixels.shape) > _WINDOW - 2:
        return None
    window = np.zeros((_WINDOW, _WINDOW), np.float32)
    window[1 : 1 + pixels.shape[0], 1 : 1 + pixels.shape[1]] = pixels
    common = _MASKS @ window.ravel()
    overlap = common / (_AREAS + window.sum() - common)
    best = int(overlap.argmax())
    return _MASK_NAMES[best] if overlap[best] >= _LEAST_OVERLAP else None


def _same(thing: Seen, number: int, scene: Scene) -> bool:
    """Whether a thing belongs to a group, by what tells the groups apart."""
    group = scene.groups[number]
    if len({other.colour for other in scene.groups}) == len(scene.groups) > 1:
        return thing.colour == group.colour
    if len({other.shape for other in scene.groups}) == len(scene.groups) > 1:
        return thing.shape == group.shape
    return len(scene.groups) == 1 or (thing.colour, thing.shape) == (group.colour, group.shape)


def _holds(first: list[Seen], second: list[Seen], relation: str) -> bool:
    """Apart in the said direction (a pixel of overlap is forgiven), and more so than in any other."""
    a, b = box([thing.box for thing in first]), box([thing.box for thing in second])
    said = gap(a, b, relation)
    return said >= -1 and all(said > gap(a, b, other) for other in RELATIONS if other != relation)
