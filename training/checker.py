# SPDX-License-Identifier: GPL-3.0-or-later
"""The check of a picture against its scene, which comes with the pack, and two signs of too much guidance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training import demo_scene_check
from training.pictures import BACKGROUND, COLOURS

ATTRIBUTES = demo_scene_check.ATTRIBUTES
check, look = demo_scene_check.check, demo_scene_check.look
# Largest distance of a pixel from a palette colour; pixels further away are off the palette.
_PALETTE_RADIUS = 0.15


def saturation(picture: NDArray[np.floating]) -> float:
    """Return the mean of largest minus smallest channel over coloured pixels of a picture in 0..1, or 0 if none."""
    spread = np.asarray(picture).max(0) - np.asarray(picture).min(0)
    coloured = spread > 0.3
    return float(spread[coloured].mean()) if coloured.any() else 0.0


def off_palette(picture: NDArray[np.floating]) -> float:
    """Return the share of pixels that are near neither the background nor a palette colour."""
    palette = np.array([BACKGROUND, *COLOURS.values()])
    pixels = np.moveaxis(np.asarray(picture, np.float64), 0, -1)[..., None, :]
    return float((np.linalg.norm(pixels - palette, axis=-1).min(-1) > _PALETTE_RADIUS).mean())
