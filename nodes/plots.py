# SPDX-License-Identifier: GPL-3.0-or-later
"""The look of all plots, and plots as ComfyUI's images. matplotlib is loaded when the first plot is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# An opaque light background, so that a plot looks the same on a dark and on a light page.
BACKGROUND = "#f6f6f3"
INK = "#24292f"
GRID = "#d5d7d6"
# Distinct with any colour vision, and by their brightness too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
# A power of two, so that pixels divided by it and multiplied again are the same pixels.
_DPI = 128


def new_figure(width: int, height: int) -> Figure:
    """Return an empty figure of ``width`` by ``height`` pixels. pyplot does not know it and so does not keep it.

    Raises:
        RuntimeError: matplotlib is not installed; the message says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
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
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(1, height, width, 4)[..., :3].float() / 255.0
