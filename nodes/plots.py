# SPDX-License-Identifier: GPL-3.0-or-later
"""Pictures of plots, as the host's images. matplotlib is loaded only when the first one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# An opaque light ground of its own, so that a plot reads the same on a dark and on a light page.
BACKGROUND = "#f6f6f3"
INK = "#24292f"
GRID = "#d5d7d6"
# Told apart with any colour vision, and by their brightness too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
# A power of two, so that pixels divided by it and multiplied again are the same pixels.
_DPI = 128


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of ``width`` by ``height`` pixels that is known to nobody else (no pyplot).

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


def plain(axes: Any) -> Any:
    """The pack's look for matplotlib axes: no box, a faint grid behind the data, colours that can be told apart."""
    axes.set_facecolor(BACKGROUND)
    axes.set_prop_cycle(color=COLOURS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def to_image(figure: Figure) -> Tensor:
    """The drawn figure as an image of the host: ``[1, height, width, 3]``, fp32, 0 to 1, on the CPU."""
    canvas: Any = figure.canvas
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(1, height, width, 4)[..., :3].float() / 255.0
