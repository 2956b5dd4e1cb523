# SPDX-License-Identifier: GPL-3.0-or-later
"""The node that puts pictures side by side with their labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import comfy.utils
import torch
from comfy_api.latest import io
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn

from .guidance import CATEGORY
from .plots import BACKGROUND, INK

MOST_COLUMNS = 64
# Smaller pictures are magnified to at least this, so that there is room for their labels.
_SMALLEST = 256
_LARGEST_SIDE = 8192
_GAP = 8
_GAP_IN_BATCH = 2
_NARROWEST = 128
_TEXT_OF_WIDTH = 18
_SMALLEST_TEXT, _LARGEST_TEXT = 16, 64
_LINE = 1.3
_MOST_LINES = 8
_MOST_CHARACTERS = 500


class GAGGrid(io.ComfyNode):
    """All pictures of a sweep as one, with labels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGGrid",
            display_name="GAG Grid",
            category=CATEGORY,
            description="Puts pictures side by side with their labels, to compare them at a glance.",
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures, from VAE Decode behind the sampler of a GAG Sweep. A batch stays together "
                    "in one field of the grid.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=MOST_COLUMNS,
                    tooltip="How many go in a row. Connect columns of GAG Sweep. Higher makes the grid wider and "
                    "lower. 0 makes it about square.",
                ),
                io.String.Input(
                    "labels",
                    force_input=True,
                    optional=True,
                    tooltip="One label for each picture: connect labels of GAG Sweep. Without it there are none.",
                ),
            ],
            outputs=[io.Image.Output(display_name="grid", tooltip="One picture, for Save Image or Preview Image.")],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, images: list[Tensor], columns: list[int], labels: list[str] | None = None) -> io.NodeOutput:
        # The host hands over everything as lists, a single value as a list of one.
        return io.NodeOutput(grid_of(images, columns[0], labels))


def grid_of(images: list[Tensor], columns: int, labels: list[str] | None = None) -> Tensor:
    """Pictures in a grid, each under its label.

    All are magnified by one whole number, the nearest pixel each, until the largest has 256 pixels on its longer side;
    one that is smaller than the largest stands in the middle of its place. A batch stays together in one field, as a
    block that is about square; one batch alone is spread over the fields, unless it has one label. If the last row
    would hold one picture only, the first one stands alone on top instead: the one without GAG of a sweep over two
    settings. A grid that would be longer than 8192 pixels, labels apart, is made of pictures that are shrunk, by the
    mean of their pixels.

    Args:
        images: ``[B, H, W, C]`` in 0..1 each, of any sizes and floating-point dtypes; of four channels the first three
            count, one is grey.
        columns: how many fields in a row, 0 for about as many as there are rows.
        labels: one for each of the images.

    Returns:
        ``[1, height, width, 3]`` fp32 in 0..1 on the CPU.

    Raises:
        ValueError: no pictures, another number of labels, or columns out of range; the message says which.
    """
    if not images or not all(isinstance(image, Tensor) and image.ndim == 4 and image.numel() for image in images):
        given = [tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__ for image in images]
        raise ValueError(f"images must be pictures [batch, height, width, channels], got {given or 'none'}.")
    if isinstance(columns, bool) or not isinstance(columns, int) or not 0 <= columns <= MOST_COLUMNS:
        raise ValueError(f"columns must be a whole number from 0 to {MOST_COLUMNS}, got {columns!r}.")
    if len(images) == 1 and (labels is None or len(labels) > 1):
        images = list(images[0].split(1))
    if labels is not None and len(labels) != len(images):
        raise ValueError(
            f"labels must be one for each of the pictures, got {len(labels)} for {len(images)}; connect the pictures "
            "and the labels of one GAG Sweep."
        )
    rows = _rows(len(images), columns)
    layout = _Layout.of(images, rows)
    progress = comfy.utils.ProgressBar(len(images))
    ground = torch.tensor(ImageColor.getrgb(BACKGROUND)) / 255.0
    strips: list[Tensor] = []
    for row in rows:
        if labels is not None:
            strips.append(layout.labels([str(labels[number]) for number in row]))
        strip = ground.repeat(layout.field_height + _GAP, layout.grid_width, 1)
        for column, number in enumerate(row):
            layout.place(strip, column, images[number])
            progress.update(1)
        strips.append(strip)
    strips.insert(0, ground.repeat(_GAP, layout.grid_width, 1))
    return torch.cat(strips)[None]


def _rows(number: int, columns: int) -> list[range]:
    """The numbers of the pictures in each row."""
    alone = columns > 1 and number > 1 and number % columns == 1
    columns = columns or math.ceil(math.sqrt(number))
    first = [range(1)] if alone else []
    return first + [range(i, min(i + columns, number)) for i in range(len(first), number, columns)]


@dataclass(frozen=True)
class _Layout:
    """Sizes in pixels. A field holds a block of ``across`` by ``down`` places, each for one picture of a batch."""

    scale: float
    place_height: int
    place_width: int
    across: int
    field_height: int
    field_width: int
    grid_width: int

    @classmethod
    def of(cls, images: list[Tensor], rows: list[range]) -> _Layout:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        batch = max(image.shape[0] for image in images)
        columns = max(map(len, rows))
        across = math.ceil(math.sqrt(batch))
        down = math.ceil(batch / across)
        scale: float = math.ceil(_SMALLEST / max(height, width))
        # What is left for the pictures when the gaps between them are taken off.
        room = [_LARGEST_SIDE - (count + 1) * _GAP for count in (len(rows) * down, columns * across)]
        scale = min(scale, room[0] / (len(rows) * down * height), room[1] / (columns * across * width))
        scale = math.floor(scale) if scale >= 1.0 else scale
        place_height, place_width = _scaled(height, scale), _scaled(width, scale)
        field_width = max(across * (place_width + _GAP_IN_BATCH) - _GAP_IN_BATCH, _NARROWEST)
        return cls(
            scale=scale,
            place_height=place_height,
            place_width=place_width,
            across=across,
            field_height=down * (place_height + _GAP_IN_BATCH) - _GAP_IN_BATCH,
            field_width=field_width,
            grid_width=columns * (field_width + _GAP) + _GAP,
        )

    def place(self, strip: Tensor, column: int, images: Tensor) -> None:
        """Put a batch ``[B, H, W, C]`` into a field of a row ``[height, width, 3]``."""
        size = _scaled(images.shape[1], self.scale), _scaled(images.shape[2], self.scale)
        colours = images[..., :3] if images.shape[3] >= 3 else images[..., :1].expand(*images.shape[:3], 3)
        for number, image in enumerate(colours):
            picture = image.detach().to("cpu", torch.float32).nan_to_num().clamp(0.0, 1.0)
            mode = "nearest-exact" if self.scale >= 1.0 else "area"
            scaled = nn.functional.interpolate(picture.movedim(2, 0)[None], size=size, mode=mode)[0].movedim(0, 2)
            down, across = divmod(number, self.across)
            block = self.across * (self.place_width + _GAP_IN_BATCH) - _GAP_IN_BATCH
            top = down * (self.place_height + _GAP_IN_BATCH) + (self.place_height - size[0]) // 2
            left = self._left(column) + (self.field_width - block) // 2
            left += across * (self.place_width + _GAP_IN_BATCH) + (self.place_width - size[1]) // 2
            strip[top : top + size[0], left : left + size[1]] = scaled

    def labels(self, texts: list[str]) -> Tensor:
        """A row of labels ``[height, width, 3]``, as high as the longest needs, each over its field."""
        size = min(max(self.field_width // _TEXT_OF_WIDTH, _SMALLEST_TEXT), _LARGEST_TEXT)
        font = ImageFont.load_default(size)
        wrapped = [wrap(text, font.getlength, self.field_width) for text in texts]
        line = math.ceil(size * _LINE)
        height = max(map(len, wrapped)) * line + _GAP
        strip = Image.new("RGB", (self.grid_width, height), BACKGROUND)
        draw = ImageDraw.Draw(strip)
        for column, lines in enumerate(wrapped):
            for number, text in enumerate(lines):
                draw.text((self._left(column), number * line), text, fill=INK, font=font)
        pixels = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
        return pixels.view(height, self.grid_width, 3).float() / 255.0

    def _left(self, column: int) -> int:
        return _GAP + column * (self.field_width + _GAP)


def _scaled(length: int, scale: float) -> int:
    return max(1, int(length * scale))


def wrap(text: str, width_of: Callable[[str], float], width: float) -> list[str]:
    """A text in lines no wider than ``width``: broken between words, in a word that is too long itself where it must
    be, and cut off with dots after eight lines."""
    lines: list[str] = []
    for paragraph in text[:_MOST_CHARACTERS].splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if width_of(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while width_of(line) > width and len(line) > 1:
                fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or width_of(line[:n]) <= width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], lines[_MOST_LINES - 1][:-3] + "..."]
    return lines
