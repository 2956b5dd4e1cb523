# SPDX-License-Identifier: GPL-3.0-or-later
"""The look of all plots, and plots as ComfyUI's images. matplotlib is loaded when the first plot is drawn."""

from __future__ import annotations

import logging
import textwrap
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..gag_core.echo import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# An opaque light background, so that a plot looks the same on a dark and on a light page.
BACKGROUND = "#f6f6f3"
INK = "#24292f"
GRID = "#d5d7d6"
# Distinct with any colour vision, and by their brightness too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
# Arguments for texts that come from elsewhere, such as words of a prompt: neither mathtext nor LaTeX reads them.
AS_IT_IS = {"parse_math": False, "usetex": False}
_MAX_LABEL = 40
# A power of two, so that pixels divided by it and multiplied again are the same pixels.
_DPI = 128

log = logging.getLogger("comfyui-gag")
_MAX_TRACE = 4000


class NotDrawnError(Exception):
    """A plot could not be drawn. The message is one sentence that says why."""


def draw(page: Callable[[], Tensor]) -> Tensor:
    """Return the plot that a function draws.

    Raises:
        NotDrawnError: matplotlib is missing, or failed; then the log has its traceback.
    """
    try:
        return page()
    except NotDrawnError:
        raise
    except Exception as error:  # a plot is never worth the run that it shows
        # As text, because half of a surrogate pair in it would end the host's thread that runs prompts.
        trace = traceback.format_exc().encode("utf-8", "backslashreplace").decode()
        log.warning("GAG: a plot could not be drawn. %s", trace[-_MAX_TRACE:])
        reason = plain(f"{type(error).__name__}: {error}").rstrip(".")
        raise NotDrawnError(f"A plot could not be drawn: {reason}.") from error


def label_of(word: object) -> str:
    """Return a word as a label: short, on one line, of characters that can be drawn."""
    return plain(word, _MAX_LABEL)


def picture_of_text(text: str, width: int, height: int) -> Tensor:
    """Return a picture of a text in the place of a plot: ``[1, height, width, 3]``, fp32, 0 to 1. matplotlib rests."""
    picture = Image.new("RGB", (width, height), BACKGROUND)
    size = width // 40
    lines = textwrap.fill(text, 60)
    ImageDraw.Draw(picture).multiline_text((size, size), lines, fill=INK, font=ImageFont.load_default(size))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, height, width, 3).float() / 255.0


def new_figure(width: int, height: int) -> Figure:
    """Return an empty figure of ``width`` by ``height`` pixels. pyplot does not know it and so does not keep it.

    Raises:
        NotDrawnError: matplotlib is not installed; the message says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotDrawnError(
            "GAG draws its plots with matplotlib, which is missing here: install it with "
            '"python -m pip install matplotlib", using the Python that runs ComfyUI, and restart ComfyUI.'
        ) from error
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Any) -> Any:
    """Give matplotlib axes the pack's look, and return them: no box, a faint grid behind the data, distinct colours."""
    axes.set_facecolor(BACKGROUND)
    axes.set_prop_cycle(color=COLOURS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def to_image(figure: Figure) -> Tensor:
    """Return the drawn figure as an image of ComfyUI: ``[1, height, width, 3]``, fp32, 0 to 1, on the CPU."""
    canvas: Any = figure.canvas
    with warnings.catch_warnings():
        # Characters that the font does not have are drawn as boxes; a warning for each would flood the log.
        warnings.simplefilter("ignore")
        canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(1, height, width, 4)[..., :3].float() / 255.0
