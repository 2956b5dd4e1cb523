# SPDX-License-Identifier: GPL-3.0-or-later
"""Error rates of the checker: true, blurred and noisy pictures pass, and every changed attribute is caught."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from training.captions import sample
from training.checker import check, look, off_palette, saturation
from training.pictures import COLOURS, RELATIONS, SHAPES, Group, Scene, Thing, changed, draw

SAMPLES = [sample("tune", 77, index) for index in range(200)]


@pytest.mark.parametrize(("blur", "noise"), [(0.0, 0.0), (0.0, 0.1), (0.8, 0.0), (0.6, 0.07)])
def test_true_pictures_are_right(blur: float, noise: float) -> None:
    rng = np.random.default_rng(0)
    right = 0
    for one in SAMPLES:
        picture = ndimage.gaussian_filter(one.picture, (0, blur, blur)) if blur else one.picture
        right += check(picture + noise * rng.normal(size=picture.shape), one.scene).everything
    assert right / len(SAMPLES) >= 0.97


@pytest.mark.parametrize("attribute", ["colour", "shape", "count", "relation"])
def test_each_changed_attribute_is_caught(attribute: str) -> None:
    everything, alone = [], []
    values: dict[str, tuple[int | str, ...]] = {"colour": tuple(COLOURS), "shape": SHAPES, "count": (1, 2, 3)}
    for one in SAMPLES:
        wrong: list[Scene] = []
        if attribute == "relation":
            if one.scene.relation is not None:
                wrong = [replace(one.scene, relation=other) for other in RELATIONS if other != one.scene.relation]
        else:
            for index, group in enumerate(one.scene.groups):
                others = [value for value in values[attribute] if value != getattr(group, attribute)]
                wrong += [changed(one.scene, index, **{attribute: other}) for other in others]
        for scene in wrong:
            verdict = check(one.picture, scene)
            everything.append(verdict.everything)
            alone.append(getattr(verdict, attribute))
    assert len(everything) > 200
    assert not any(everything)
    # A single attribute checks only which colours and shapes there are, so a few changes pass.
    assert np.mean(alone) <= 0.05


def test_one_wrong_attribute_leaves_the_others_right() -> None:
    scene = Scene((Group(1, "red", "circle"), Group(1, "blue", "square")), "left")
    picture = draw(scene, (Thing(0, 2, 10, 9), Thing(1, 20, 11, 9)))
    assert check(picture, scene).everything
    other = check(picture, changed(scene, 0, shape="cross"))
    assert (other.colour, other.shape, other.count, other.relation) == (True, False, True, True)
    other = check(picture, changed(scene, 0, colour="green"))
    assert (other.colour, other.shape) == (False, True)
    other = check(picture, replace(scene, relation="above"))
    assert (other.colour, other.shape, other.count, other.relation) == (True, True, True, False)
    other = check(picture, changed(scene, 1, count=2))
    assert (other.colour, other.shape, other.count, other.relation) == (True, True, False, True)


@pytest.mark.parametrize("value", [0.0, 0.12, 0.5, 1.0])
def test_plain_pictures_and_noise_show_nothing_of_a_scene(value: float) -> None:
    plain: NDArray[np.float64] = np.full((3, 32, 32), value)
    noise = np.random.default_rng(1).uniform(size=(3, 32, 32))
    for picture in (plain, noise):
        assert not any(check(picture, one.scene).everything for one in SAMPLES[:50])


def test_a_blob_has_no_shape() -> None:
    picture = draw(Scene(()), ())
    picture[:, 4:24, 4:24] = np.array(COLOURS["red"], np.float32)[:, None, None]
    assert [(thing.colour, thing.shape) for thing in look(picture)] == [("red", None)]


def test_the_price_of_too_much_guidance_shows() -> None:
    for one in SAMPLES[:20]:
        assert off_palette(one.picture) == 0.0
        assert off_palette(np.clip((one.picture - 0.5) * 1.6 + 0.5, 0, 1)) >= 0.5
        if {group.colour for group in one.scene.groups} != {"white"}:
            duller = one.picture.mean(0, keepdims=True) + 0.7 * (one.picture - one.picture.mean(0, keepdims=True))
            assert saturation(duller) < saturation(one.picture)
