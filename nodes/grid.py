# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG Grid": pictures side by side with labels."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from einops import rearrange
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn

from ..gag_core.echo import echo, plain
from .input_checks import MAX_PIXELS, check_pictures, check_whole
from .plots import BACKGROUND, INK
from .shared_inputs import CATEGORY, search_aliases

MAX_COLUMNS = 64
# Pictures are magnified to at least this many pixels on the longer side, so that there is room for their labels.
_MIN_SIDE = 256
_MAX_GRID_SIDE = 8192
_GAP = 8
_GAP_IN_BATCH = 2
_MIN_CELL_WIDTH = 128
# A label's text is as high as its cell's width divided by this number, within the two bounds.
_CELL_WIDTH_PER_TEXT_SIZE = 18
_MIN_TEXT_SIZE, _MAX_TEXT_SIZE = 16, 64
_LINE_HEIGHT = 1.3
_MAX_LINES = 8
_MAX_CHARACTERS = 500


class GAGGrid(io.ComfyNode):
    """Node that puts pictures, such as those of a sweep, into one picture with labels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGGrid",
            display_name="GAG Grid (labelled pictures)",
            category=CATEGORY,
            description="Puts pictures side by side with their labels, to compare them at a glance.",
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures, from VAE Decode behind the sampler of a GAG Sweep. A batch stays together "
                    "in one cell of the grid.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=MAX_COLUMNS,
                    tooltip="Number of pictures in a row. Connect columns of GAG Sweep. Higher makes the grid wider "
                    "and lower. 0 makes the grid about square.",
                ),
                io.String.Input(
                    "labels",
                    force_input=True,
                    optional=True,
                    tooltip="One label for each picture: connect labels of GAG Sweep. If nothing is connected, the "
                    "grid has no labels.",
                ),
            ],
            outputs=[io.Image.Output(display_name="grid", tooltip="One picture, for Save Image or Preview Image.")],
            is_input_list=True,
            **search_aliases("XY plot", "image grid", "contact sheet", "compare images", "labels"),
        )

    @classmethod
    def execute(cls, images: list[Tensor], columns: list[int], labels: list[str] | None = None) -> io.NodeOutput:
        # With is_input_list ComfyUI passes every input as a list, a single value as a list of length 1.
        count: Any = columns[0] if isinstance(columns, list) and columns else columns
        return io.NodeOutput(grid_of(images, count, labels))


def grid_of(images: list[Tensor], columns: int, labels: list[str] | None = None) -> Tensor:
    """Return pictures in a grid of cells, each under its label.

    All pictures are magnified by one whole factor, by repeating pixels, until the largest has at least 256 pixels on
    its longer side. A picture that is smaller than the largest is centred. A batch stays together in one cell, as a
    block that is about square. A single batch is spread over the cells, unless there is exactly one label. If the last
    row would hold a single picture, the first picture stands alone in the top row instead: in a sweep over two settings
    that is the picture without GAG. If the grid, without labels, would be longer than 8192 pixels, its pictures are
    shrunk by averaging pixels.

    Args:
        images: batches ``[B, H, W, C]`` in 0..1, of any size and floating-point dtype. The first three channels count;
            a single channel is grey.
        columns: number of cells in a row; 0 for about as many as there are rows.
        labels: one label for each of the images.

    Returns:
        ``[1, height, width, 3]`` fp32 in 0..1 on the CPU.

    Raises:
        ValueError: no pictures, too many or too large ones, another number of labels, or columns out of range; the
            message says which.
        TypeError: labels are not a list.
    """
    check_pictures("images", images)
    check_whole("columns", columns, 0, MAX_COLUMNS)
    images = cells_of(images, labels)
    rows = _rows(len(images), columns)
    layout = _Layout.fit(images, rows)
    texts = [layout.wrapped([labels[index] for index in row]) for row in rows] if labels is not None else []
    heights = [layout.height_of(lines) for lines in texts] or [0] * len(rows)
    grid_height = _GAP + sum(heights) + len(rows) * (layout.cell_height + _GAP)
    if grid_height * layout.grid_width > MAX_PIXELS:
        raise ValueError(
            f"The grid must have at most {MAX_PIXELS} pixels, got {layout.grid_width} x {grid_height}; give fewer "
            "pictures or other columns."
        )
    progress = comfy.utils.ProgressBar(len(images))
    grid = torch.tensor(ImageColor.getrgb(BACKGROUND)).div(255.0).repeat(grid_height, layout.grid_width, 1)
    top = _GAP
    for number, (row, label_height) in enumerate(zip(rows, heights, strict=True)):
        if label_height:
            grid[top : top + label_height] = layout.draw_labels(texts[number])
        top += label_height
        for column, index in enumerate(row):
            comfy.model_management.throw_exception_if_processing_interrupted()
            layout.paste(images[index], grid[top : top + layout.cell_height], column)
            progress.update(1)
        top += layout.cell_height + _GAP
    return grid[None]


def cells_of(images: list[Tensor], labels: list[str] | None) -> list[Tensor]:
    """Return the pictures of each cell: batches, or the single pictures of one batch unless it has exactly one label.

    Raises:
        ValueError: there is another number of labels.
        TypeError: labels are not a list.
    """
    if labels is not None and not isinstance(labels, (list, tuple)):
        raise TypeError(f"labels must be a list of texts, got {echo(labels)}.")
    if len(images) == 1 and (labels is None or len(labels) > 1):
        images = list(images[0].split(1))
    if labels is not None and len(labels) != len(images):
        raise ValueError(
            f"labels must be one for each of the pictures, got {len(labels)} for {len(images)}; connect the pictures "
            "and the labels of one GAG Sweep."
        )
    return images


def _rows(count: int, columns: int) -> list[range]:
    """Return the indices of the pictures in each row."""
    first_is_alone = columns > 1 and count > 1 and count % columns == 1
    columns = columns or math.ceil(math.sqrt(count))
    first = [range(1)] if first_is_alone else []
    return first + [range(i, min(i + columns, count)) for i in range(len(first), count, columns)]


@dataclass(frozen=True)
class _Layout:
    """Sizes of a grid in pixels.

    Attributes:
        scale: factor of the pictures' sizes.
        slot_height, slot_width: size of the largest picture in the grid.
        across: number of slots in a row of a cell, one slot for each picture of a batch.
        cell_height, cell_width: size of a cell.
        grid_width: width of the grid.
    """

    scale: float
    slot_height: int
    slot_width: int
    across: int
    cell_height: int
    cell_width: int
    grid_width: int

    @classmethod
    def fit(cls, images: list[Tensor], rows: list[range]) -> _Layout:
        """Return the layout in which all images fit."""
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        batch = max(image.shape[0] for image in images)
        columns = max(map(len, rows))
        across = math.ceil(math.sqrt(batch))
        down = math.ceil(batch / across)
        scale: float = math.ceil(_MIN_SIDE / max(height, width))
        # Pixels that the gaps leave for pictures, down and across.
        room = [_MAX_GRID_SIDE - (count + 1) * _GAP for count in (len(rows) * down, columns * across)]
        scale = min(scale, room[0] / (len(rows) * down * height), room[1] / (columns * across * width))
        scale = math.floor(scale) if scale >= 1.0 else scale
        slot_height, slot_width = _scaled(height, scale), _scaled(width, scale)
        cell_width = max(_length_of(across, slot_width), _MIN_CELL_WIDTH)
        return cls(
            scale=scale,
            slot_height=slot_height,
            slot_width=slot_width,
            across=across,
            cell_height=_length_of(down, slot_height),
            cell_width=cell_width,
            grid_width=columns * (cell_width + _GAP) + _GAP,
        )

    def paste(self, batch: Tensor, strip: Tensor, column: int) -> None:
        """Paste a batch ``[B, H, W, C]`` into a cell of a row ``[height, width, 3]``, which is changed in place."""
        size = _scaled(batch.shape[1], self.scale), _scaled(batch.shape[2], self.scale)
        mode = "nearest-exact" if self.scale >= 1.0 else "area"
        colours = batch[..., :3] if batch.shape[3] >= 3 else batch[..., :1].expand(*batch.shape[:3], 3)
        cell_left = self._left(column) + (self.cell_width - _length_of(self.across, self.slot_width)) // 2
        for index, image in enumerate(colours):
            pixels = image.detach().to("cpu", torch.float32).nan_to_num().clamp_(0.0, 1.0)
            scaled = nn.functional.interpolate(rearrange(pixels, "h w c -> 1 c h w"), size=size, mode=mode)
            down, across = divmod(index, self.across)
            top = down * (self.slot_height + _GAP_IN_BATCH) + (self.slot_height - size[0]) // 2
            left = cell_left + across * (self.slot_width + _GAP_IN_BATCH) + (self.slot_width - size[1]) // 2
            strip[top : top + size[0], left : left + size[1]] = rearrange(scaled, "1 c h w -> h w c")

    @property
    def text_size(self) -> int:
        """Height of the labels' letters."""
        return min(max(self.cell_width // _CELL_WIDTH_PER_TEXT_SIZE, _MIN_TEXT_SIZE), _MAX_TEXT_SIZE)

    @property
    def line_height(self) -> int:
        """Height of a line of a label."""
        return math.ceil(self.text_size * _LINE_HEIGHT)

    def wrapped(self, labels: list[Any]) -> list[list[str]]:
        """Return the lines of each label of a row."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        font = ImageFont.load_default(self.text_size)
        texts = [label if isinstance(label, str) else plain(label) for label in labels]
        return [wrap(text, font.getlength, self.cell_width) for text in texts]

    def height_of(self, wrapped: list[list[str]]) -> int:
        """Return the height of a row of labels, as high as the longest label needs."""
        return max(map(len, wrapped)) * self.line_height + _GAP

    def draw_labels(self, wrapped: list[list[str]]) -> Tensor:
        """Return a row of labels ``[height, width, 3]``, one per cell."""
        font = ImageFont.load_default(self.text_size)
        height = self.height_of(wrapped)
        strip = Image.new("RGB", (self.grid_width, height), BACKGROUND)
        draw = ImageDraw.Draw(strip)
        for column, lines in enumerate(wrapped):
            for index, line in enumerate(lines):
                draw.text((self._left(column), index * self.line_height), line, fill=INK, font=font)
        pixels = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
        return pixels.view(height, self.grid_width, 3).float() / 255.0

    def _left(self, column: int) -> int:
        """Return the left edge of a column."""
        return _GAP + column * (self.cell_width + _GAP)


def _scaled(length: int, scale: float) -> int:
    return max(1, int(length * scale))


def _length_of(count: int, slot: int) -> int:
    """Return the length of ``count`` slots with the gaps between them."""
    return count * (slot + _GAP_IN_BATCH) - _GAP_IN_BATCH


def _fitting(line: str, width_of: Callable[[str], float], width: float) -> int:
    """Return the number of first characters of a line that are no wider than ``width``, but not all and at least 1."""
    return max(1, bisect_right(range(1, len(line)), width, key=lambda count: width_of(line[:count])))


def wrap(text: str, width_of: Callable[[str], float], width: float) -> list[str]:
    """Return a text in lines that are no wider than ``width``, at most eight of them.

    Lines break between words, and inside a word only if the word is too long for a line. A longer text ends in dots.
    """
    lines: list[str] = []
    for paragraph in text[:_MAX_CHARACTERS].splitlines() or [""]:
        line = ""
        for word in (plain(part, _MAX_CHARACTERS) for part in paragraph.split()):
            joined = f"{line} {word}" if line else word
            if width_of(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while width_of(line) > width and len(line) > 1 and len(lines) <= _MAX_LINES:
                fits = _fitting(line, width_of, width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], lines[_MAX_LINES - 1][:-3] + "..."]
    return lines
