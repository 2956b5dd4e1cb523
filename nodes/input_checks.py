# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks of single inputs: a value that is not allowed is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..gag_core.echo import echo, plain

MOST_CHARACTERS = 20_000
_DEEPEST_BRACKETS = 32
MAX_PICTURES = 4096
# Number of pixels of one picture, at most: 1.2 GB in fp32.
MAX_PIXELS = 100_000_000


def check_option(name: str, value: object, options: Iterable[str]) -> None:
    """Refuse a value that is not one of the options.

    Raises:
        ValueError: one sentence with the options.
    """
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {echo(value)}.")


def check_text(name: str, value: object, most: int = MOST_CHARACTERS) -> None:
    """Refuse a value that is no text, or a text that is too long or cannot be encoded.

    Raises:
        ValueError, TypeError: one sentence with the value or its length.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {echo(value)}.")
    if len(value) > most:
        raise ValueError(f"{name} must have at most {most} characters, got {len(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} must not have half a character (a lone surrogate), got {echo(value)}.") from None


def check_brackets(name: str, text: str) -> None:
    """Refuse a prompt with brackets in so many others that ComfyUI's parser of weights, which is recursive, could fail.

    Raises:
        ValueError: one sentence with the depth.
    """
    depths = accumulate((character == "(") - (character == ")") for character in text)
    if (depth := max(map(abs, depths), default=0)) > _DEEPEST_BRACKETS:
        raise ValueError(
            f"{name} must not nest brackets more than {_DEEPEST_BRACKETS} deep, got {depth}; leave brackets out."
        )


def check_switch(name: str, value: object) -> None:
    """Refuse a value that is neither True nor False.

    Raises:
        TypeError: one sentence with the value.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {echo(value)}.")


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """Refuse a value that is not a whole number within the bounds.

    Raises:
        ValueError: one sentence with the value and the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {echo(value)}.")


def check_pictures(name: str, images: Any) -> None:
    """Refuse what is no list of batches of pictures ``[B, H, W, C]``, and too many or too large pictures.

    Raises:
        ValueError: one sentence with the shapes or the numbers.
    """
    if not isinstance(images, (list, tuple)) or not images or not all(map(_is_picture, images)):
        given = images if isinstance(images, (list, tuple)) else [images]
        shapes = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in given[:9]]
        raise ValueError(
            f"{name} must be pictures [batch, height, width, channels], got {plain(shapes) if shapes else 'none'}."
        )
    count = sum(image.shape[0] for image in images)
    if count > MAX_PICTURES:
        raise ValueError(f"{name} must be at most {MAX_PICTURES} pictures, got {count}; leave pictures out.")
    largest = max(image.shape[1] * image.shape[2] for image in images)
    if largest > MAX_PIXELS:
        raise ValueError(f"{name} must have at most {MAX_PIXELS} pixels each, got {largest}; make them smaller.")


def _is_picture(image: Any) -> bool:
    return (
        isinstance(image, Tensor)
        and image.ndim == 4
        and image.numel() > 0
        and image.layout == torch.strided
        and not (image.is_complex() or image.is_quantized or image.is_meta)
    )
