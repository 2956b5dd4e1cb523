# SPDX-License-Identifier: GPL-3.0-or-later
"""Draw assets/icon.png and assets/banner.png, which the Comfy Registry shows: ``python dev.py run generate.artwork``.

The motif shows the method: the dense read-out (blue) and the sparse read-out (orange) of the same attention, and the
step from one to the other, continued (white). The bars are weights that gag_core computes.
"""

from __future__ import annotations

import cmath
import sys

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from comfy_host import ROOT
from gag_core import entmax

GROUND, FAINT, DENSE, SPARSE, GUIDED = "#16202b", "#31445a", "#56b4e9", "#e69f00", "#ffffff"
DPI = 100
# Points of the motif in units of its square: the common start, and the ends of dense, sparse and guided read-out.
START, DENSE_END, SPARSE_END, GUIDED_END = (0.13, 0.13), (0.40, 0.88), (0.645, 0.61), (0.89, 0.34)
LOGITS = (0.5, 1.2, 2.0, 0.9, 2.9, 1.6, 0.4, 2.5, 1.1, 0.8, 1.8, 0.6)


def icon() -> Figure:
    """Draw the motif alone, 400 by 400 pixels."""
    figure, axes = _canvas(400, 400)
    _motif(axes, 0.0, 0.0, 1.0, thickness=1.0)
    return figure


def banner() -> Figure:
    """Draw the motif, the weights of both read-outs and the name, 1260 by 540 pixels (21:9)."""
    figure, axes = _canvas(1260, 540)
    _motif(axes, 0.13, 0.05, 0.90, thickness=1.2)
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    for bottom, weights, colour in (
        (0.215, logits.softmax(0), DENSE),
        (0.075, entmax(logits, 1.5), SPARSE),
    ):
        for index, weight in enumerate(weights.tolist()):
            x, width = 1.13 + 0.089 * index, 0.055
            axes.bar(x, 0.004, width, bottom, align="edge", color=FAINT, linewidth=0)
            axes.bar(x, 0.21 * weight, width, bottom, align="edge", color=colour, linewidth=0)
    axes.text(1.115, 0.615, "GAG", color=GUIDED, fontsize=96, fontweight="bold", va="baseline")
    for height, line in ((0.49, "Geometry-Aware"), (0.385, "Attention Guidance")):
        axes.text(1.125, height, line, color="#c9d5e0", fontsize=37, va="baseline")
    return figure


def _canvas(width: int, height: int) -> tuple[Figure, Axes]:
    """Return a figure of this size in pixels, whose axes are in units of its height."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=GROUND)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width / height)
    axes.set_ylim(0, 1)
    axes.axis("off")
    return figure, axes


def _motif(axes: Axes, left: float, bottom: float, size: float, thickness: float) -> None:
    def position(point: tuple[float, float]) -> tuple[float, float]:
        return left + size * point[0], bottom + size * point[1]

    # The faint rays are the many tokens that a dense read-out mixes.
    for step in (-2, -1, 1, 2):
        turned = complex(*DENSE_END) - complex(*START)
        turned *= cmath.rect(1 - 0.06 * abs(step), 0.15 * step)
        tip = complex(*START) + turned
        ray = zip(position(START), position((tip.real, tip.imag)), strict=True)
        axes.plot(*ray, color=FAINT, linewidth=3 * thickness, solid_capstyle="round", zorder=0)
    for end, colour in ((DENSE_END, DENSE), (SPARSE_END, SPARSE)):
        _arrow(axes, position(START), position(end), colour, 9 * thickness)
    axes.plot(
        *zip(position(DENSE_END), position(SPARSE_END), strict=True),
        color=GUIDED,
        linewidth=4 * thickness,
        linestyle=(0, (0.1, 1.9)),
        dash_capstyle="round",
    )
    _arrow(axes, position(SPARSE_END), position(GUIDED_END), GUIDED, 9 * thickness)
    axes.plot(*position(START), marker="o", markersize=17 * thickness, color=GUIDED)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> None:
    head = f"-|>,head_length={1.3 * width / 9},head_width={0.62 * width / 9}"
    arrow = FancyArrowPatch(start, end, arrowstyle=head, mutation_scale=20, shrinkA=0, shrinkB=0, capstyle="round")
    arrow.set(color=colour, linewidth=width, joinstyle="miter")
    axes.add_patch(arrow)


def main() -> int:
    """Write both pictures."""
    for name, figure in (("icon", icon()), ("banner", banner())):
        path = ROOT / "assets" / f"{name}.png"
        figure.savefig(path, dpi=DPI, facecolor=GROUND, metadata={"Software": None})
        print(f"artwork: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
