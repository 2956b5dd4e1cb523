# SPDX-License-Identifier: GPL-3.0-or-later
"""Scenes of coloured shapes and their exact 32x32 pictures.

Scenes and pictures depend on (DATA_VERSION, split, seed, index) alone, so training data is reproducible without files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from training import demo_architecture, demo_scenes

# Fixed before any guidance was measured. Another version has other pictures and other captions.
DATA_VERSION = 1
SIZE = demo_architecture.SIZE
MARGIN = 2
SIZES, COLOURS, BACKGROUND = demo_scenes.SIZES, demo_scenes.COLOURS, demo_scenes.BACKGROUND
SHAPES, RELATIONS = demo_scenes.SHAPES, demo_scenes.RELATIONS
Group = demo_scenes.Group
Scene = demo_scenes.Scene
mask, gap, box = demo_scenes.mask, demo_scenes.gap, demo_scenes.box


@dataclass(frozen=True)
class Thing:
    """One drawn shape: the index of its group, its upper left corner and its width, in pixels."""

    group: int
    x: int
    y: int
    size: int


def stream(split: str, seed: int, index: int) -> random.Random:
    """Return the random number generator of one picture of a split."""
    return random.Random(f"{DATA_VERSION}:{split}:{seed}:{index}")


def make_scene(rng: random.Random) -> Scene:
    """Return a random scene of one to three things; about half of the scenes are two groups in a relation."""
    kind = rng.choices(("one", "alike", "pair", "pair and more", "two", "three"), (15, 15, 35, 20, 5, 10))[0]
    counts = {
        "one": (1,),
        "alike": (rng.choice((2, 3)),),
        "pair": (1, 1),
        "pair and more": rng.choice(((1, 2), (2, 1))),
        "two": (1, 1),
        "three": (1, 1, 1),
    }[kind]
    looks: list[tuple[str, str]] = []
    while len(looks) < len(counts):
        look = (rng.choice(tuple(COLOURS)), rng.choice(SHAPES))
        if look not in looks:
            looks.append(look)
    groups = tuple(Group(count, *look) for count, look in zip(counts, looks, strict=True))
    return Scene(groups, rng.choice(tuple(RELATIONS)) if kind.startswith("pair") else None)


def lay_out(scene: Scene, rng: random.Random) -> tuple[Thing, ...]:
    """Return random positions of a scene's things. No things touch, and a relation holds along its own axis only."""
    owners = [index for index, group in enumerate(scene.groups) for _ in range(group.count or 1)]
    while True:
        things: list[Thing] = []
        for owner in owners:
            size = rng.choice(SIZES)
            positions = SIZE - size - 1
            thing = Thing(owner, 1 + int(rng.random() * positions), 1 + int(rng.random() * positions), size)
            if any(_touch(thing, other) for other in things):
                break
            things.append(thing)
        else:
            if scene.relation is None or _related(things, scene.relation):
                return tuple(things)


def draw(scene: Scene, things: tuple[Thing, ...]) -> NDArray[np.float32]:
    """Draw the picture ``[3, 32, 32]`` in 0..1."""
    picture = np.empty((3, SIZE, SIZE), np.float32)
    picture[:] = np.array(BACKGROUND, np.float32)[:, None, None]
    for thing in things:
        group = scene.groups[thing.group]
        assert group.colour is not None and group.shape is not None
        part = picture[:, thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        part[:, mask(group.shape, thing.size)] = np.array(COLOURS[group.colour], np.float32)[:, None]
    return picture


def changed(scene: Scene, index: int, **values: int | str | None) -> Scene:
    """Return the scene with other values in one group."""
    groups = list(scene.groups)
    groups[index] = replace(groups[index], **values)  # type: ignore[arg-type]
    return Scene(tuple(groups), scene.relation)


def _touch(a: Thing, b: Thing) -> bool:
    return (
        a.x < b.x + b.size + MARGIN
        and b.x < a.x + a.size + MARGIN
        and a.y < b.y + b.size + MARGIN
        and b.y < a.y + a.size + MARGIN
    )


def _related(things: list[Thing], relation: str) -> bool:
    first, second = (
        box([(t.x, t.y, t.x + t.size, t.y + t.size) for t in things if t.group == index]) for index in (0, 1)
    )
    across = ("above", "below") if relation in ("left", "right") else ("left", "right")
    return gap(first, second, relation) >= MARGIN and all(gap(first, second, other) < 0 for other in across)
