# SPDX-License-Identifier: GPL-3.0-or-later
"""The grid of pictures: every pixel of every picture at its position, room for the labels, and a bounded size."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from PIL import ImageFont
from torch import Tensor

import host_process as host
from properties import examples

grid = host.pack_module("nodes.grid")
plots = host.pack_module("nodes.plots")
grid_of, wrap = grid.grid_of, grid.wrap
plain = host.pack_module("gag_core.echo").plain
BACKGROUND = torch.tensor([int(plots.BACKGROUND[i : i + 2], 16) for i in (1, 3, 5)]) / 255.0


def pictures(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    """Return pictures ``[1, height, width, 3]`` without any pixel of the background colour."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(*((1, *shape, 3) if len(shape) == 2 else shape), generator=generator) * 0.5 for _ in range(count)
    ]


def magnified(picture: Tensor, times: int) -> Tensor:
    return picture.repeat_interleave(times, 0).repeat_interleave(times, 1)


def find(image: Tensor, part: Tensor) -> list[tuple[int, int]]:
    """Return the corners ``(y, x)`` at which ``part`` ``[h, w, 3]`` occurs in ``image`` ``[H, W, 3]``, bit for bit."""
    height, width = part.shape[:2]
    corners = (image[: image.shape[0] - height + 1, : image.shape[1] - width + 1] == part[0, 0]).all(dim=-1)
    found = [(int(y), int(x)) for y, x in corners.nonzero()]
    return [(y, x) for y, x in found if torch.equal(image[y : y + height, x : x + width], part)]


def positions(image: Tensor, parts: list[Tensor], times: int = 1) -> list[tuple[int, int]]:
    """Return the corner of each part in a grid; each must occur once, magnified ``times`` times."""
    found = [find(image[0], magnified(part, times)) for part in parts]
    assert all(len(corners) == 1 for corners in found), "a picture is missing, changed or there twice"
    return [corners[0] for corners in found]


def in_rows(corners: list[tuple[int, int]]) -> list[list[int]]:
    """Return the indices of the pictures in each row, from left to right."""
    tops = sorted({top for top, _ in corners})
    return [[n for n, (y, _) in sorted(enumerate(corners), key=lambda e: e[1][1]) if y == top] for top in tops]


@pytest.mark.parametrize("labels", [None, "some"])
@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [
        (1, 0, [[0]]),
        (6, 3, [[0, 1, 2], [3, 4, 5]]),
        (5, 3, [[0, 1, 2], [3, 4]]),
        (7, 3, [[0], [1, 2, 3], [4, 5, 6]]),
        (3, 2, [[0], [1, 2]]),
        (3, 1, [[0], [1], [2]]),
        (3, 64, [[0, 1, 2]]),
        (7, 0, [[0, 1, 2], [3, 4, 5], [6]]),
    ],
)
def test_every_picture_is_at_its_position(count: int, columns: int, rows: list[list[int]], labels: Any) -> None:
    """Pictures are magnified to 256 pixels by a whole factor. A single picture beside full rows has the top row."""
    parts = pictures(count, 32, 32)
    texts = None if labels is None else [f"guidance_scale {number}" for number in range(count)]
    image = grid_of(parts, columns, texts)
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[3] == 3
    assert image.dtype == torch.float32 and float(image.min()) >= 0.0 and float(image.max()) <= 1.0
    found = positions(image, [part[0] for part in parts], 8)
    assert in_rows(found) == rows
    lefts = sorted({x for _, x in found})
    assert lefts == [8 + column * 264 for column in range(max(map(len, rows)))]


def test_large_pictures_keep_their_pixels() -> None:
    parts = pictures(4, 300, 280)
    found = positions(grid_of(parts, 2), [part[0] for part in parts])
    assert in_rows(found) == [[0, 1], [2, 3]]


def test_pictures_of_other_sizes_are_magnified_alike_and_centred() -> None:
    parts = [*pictures(1, 64, 64), *pictures(1, 32, 16, seed=1)]
    (y0, x0), (y1, x1) = positions(grid_of(parts, 2), [part[0] for part in parts], 4)
    assert (y0, x0) == (8, 8)
    assert (y1, x1) == (8 + (256 - 128) // 2, 272 + (256 - 64) // 2)


def test_a_batch_is_a_square_with_its_pictures_in_order() -> None:
    parts = [torch.cat(pictures(4, 128, 128, seed=seed)) for seed in (0, 1)]
    image = grid_of(parts, 2, ["one", "other"])
    all_pictures = [picture for part in parts for picture in part]
    found = positions(image, all_pictures, 2)
    assert in_rows(found) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_single_batch_is_spread_over_the_grid() -> None:
    (batch,) = pictures(1, 4, 256, 256, 3)
    image = grid_of([batch], 4, ["a", "b", "c", "d"])
    assert in_rows(positions(image, list(batch))) == [[0, 1, 2, 3]]


def test_a_single_batch_with_one_label_stays_together() -> None:
    """A sweep over a single value makes such a batch."""
    (batch,) = pictures(1, 4, 128, 128, 3)
    assert in_rows(positions(grid_of([batch], 4, ["strength 1"]), list(batch), 2)) == [[0, 1], [2, 3]]


def test_other_channels_and_dtypes_and_invalid_colours_are_converted() -> None:
    """The pictures are grey, transparent, in half precision, and with numbers that are not colours."""
    grey = torch.full((1, 256, 256, 1), 0.25)
    clear = torch.cat([torch.full((1, 256, 256, 3), 0.5), torch.zeros(1, 256, 256, 1)], dim=-1)
    half = torch.full((1, 256, 256, 3), 0.75, dtype=torch.float16)
    broken = torch.tensor([math.nan, 7.0, -3.0]).expand(1, 256, 256, 3)
    image = grid_of([grey, clear, half, broken], 4)
    assert torch.isfinite(image).all()
    middles = [image[0, 100, 100 + column * 264] for column in range(4)]
    expected = [[0.25] * 3, [0.5] * 3, [0.75] * 3, [0.0, 1.0, 0.0]]
    assert [middle.tolist() for middle in middles] == expected


@pytest.mark.parametrize(("height", "width"), [(2048, 512), (512, 2048)])
def test_a_grid_that_would_be_too_large_is_shrunk(height: int, width: int) -> None:
    parts = [torch.full((1, height, width, 3), 0.1 + number / 40) for number in range(18)]
    columns = 1 if height > width else 18
    image = grid_of(parts, columns)
    assert 8000 < max(image.shape[1:3]) <= 8192
    colours = {round(float(colour), 4) for colour in image[0].flatten(0, 1).unique(dim=0)[:, 0]}
    assert colours >= {round(0.1 + number / 40, 4) for number in range(18)}


def test_shrunk_pixels_are_means() -> None:
    stripes = torch.zeros(1, 9000, 90, 3)
    stripes[:, :, ::2] = 1.0
    image = grid_of([stripes], 1)
    assert max(image.shape[1:3]) <= 8192
    assert float(image[0, 100:-100, 40:100].mean()) == pytest.approx(0.5, abs=0.01)


# --- labels -------------------------------------------------------------------------------------------------------


def strips(image: Tensor, columns: int, height: int) -> list[Tensor]:
    """Return the labels of the top row, one image each."""
    cell = (image.shape[2] - 8) // columns
    top = image.shape[1] - height - 16
    return [image[0, 8 : 8 + top - 8, 8 + c * cell : 8 + (c + 1) * cell - 8] for c in range(columns)]


@pytest.mark.parametrize("size", [32, 64, 256, 512, 1024])
def test_labels_are_visible_and_scale_with_the_pictures(size: int) -> None:
    parts = pictures(2, size, size)
    times = math.ceil(256 / size)
    image = grid_of(parts, 2, ["guidance_scale 1", "guidance_scale 10"])
    first, second = strips(image, 2, size * times)
    for strip in (first, second):
        ink = (strip - BACKGROUND).abs().amax(dim=-1) > 0.3
        assert ink.any()
        rows = ink.any(dim=1).nonzero()
        assert int(rows.max() - rows.min()) + 1 >= 10
        columns = ink.any(dim=0).nonzero()
        assert int(columns.max() - columns.min()) > 0.3 * size * times
    assert not torch.equal(first, second)


def test_long_labels_are_wrapped_and_do_not_change_the_pictures() -> None:
    parts = pictures(2, 32, 32)
    long = "guidance_scale 10, norm_threshold 0.25, orthogonal_scale 0.5, blocks d0,d1,u3"
    image, short = grid_of(parts, 2, [long, "a"]), grid_of(parts, 2, ["b", "a"])
    assert image.shape[1] > short.shape[1]
    assert in_rows(positions(image, [part[0] for part in parts], 8)) == [[0, 1]]


@examples(200)
@hypothesis.given(text=st.text(max_size=200) | st.text("abcdefgh ", max_size=400), width=st.integers(128, 600))
def test_wrapped_lines_fit_and_keep_all_words(text: str, width: int) -> None:
    font = ImageFont.load_default(16)
    lines = wrap(text, font.getlength, width)
    assert 1 <= len(lines) <= 8
    for line in lines[:7]:
        assert font.getlength(line) <= width or len(line) == 1
    if not lines[-1].endswith("..."):
        assert "".join("".join(lines).split()) == "".join(map(plain, text.split()))


WRONG: dict[str, tuple[Any, Any, Any, str]] = {
    "none": ([], 2, None, "images must be pictures .*, got none."),
    "no pictures": (["a"], 2, None, r"images must be pictures .*, got \['str'\]."),
    "a mask": ([torch.zeros(1, 8, 8)], 2, None, r"images must be pictures .*, got \[\(1, 8, 8\)\]."),
    "empty": ([torch.zeros(0, 8, 8, 3)], 2, None, r"images must be pictures"),
    "labels": (pictures(2, 8, 8), 2, ["a"], "labels must be one for each of the pictures, got 1 for 2; connect"),
    "columns": (pictures(2, 8, 8), 65, None, "columns must be a whole number from 0 to 64, got 65."),
    "half a column": (pictures(2, 8, 8), 1.5, None, "columns must be a whole number from 0 to 64, got 1.5."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused_in_a_sentence(case: str) -> None:
    images, columns, labels, sentence = WRONG[case]
    with pytest.raises(ValueError, match=sentence):
        grid_of(images, columns, labels)


def test_the_node_takes_lists_as_the_host_passes_them() -> None:
    parts = pictures(3, 32, 32)
    node = host.NODES["GAGGrid"]
    assert node.INPUT_IS_LIST
    (image,) = node.execute(images=parts, columns=[3], labels=["a", "b", "c"]).result
    assert torch.equal(image, grid_of(parts, 3, ["a", "b", "c"]))
    (plain,) = node.execute(images=parts, columns=[0]).result
    assert torch.equal(plain, grid_of(parts, 0))
