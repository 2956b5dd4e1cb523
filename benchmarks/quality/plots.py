# SPDX-License-Identifier: GPL-3.0-or-later
"""Plots of the results, as small PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality.comparisons import Row
from benchmarks.quality.methods import BASELINE, CFG, MAIN, METHODS
from benchmarks.quality.records import TUNE, Cell, Key, Results
from benchmarks.quality.statistics import Paired, mean, paired

_DPI = 90
# Families with axes of their own: beside their large differences those of the others would not be visible.
_OWN_AXIS = (CFG, "preset paper")


class Point(NamedTuple):
    """One scale of a curve on ``tune``: share of right captions, the comparison, and mean side effects."""

    scale: float
    share: float
    versus: Paired
    saturation: float
    off_palette: float


def curves(results: Results, cell: Cell) -> dict[str, list[Point]]:
    """Return the curves over scale by name, each from the smallest scale to the largest."""
    baseline = results.outcome(Key(cell, TUNE, BASELINE.family, BASELINE.setting))
    found: dict[str, list[Point]] = {}
    for method in METHODS:
        outcome = results.outcome(Key(cell, TUNE, method.family, method.setting))
        if baseline is None or outcome is None or method.scale is None:
            continue
        captions = min(len(outcome), len(baseline))
        outcome, without = outcome.first(captions), baseline.first(captions)
        point = Point(
            method.scale, float(outcome.right().mean()), paired(without.right(), outcome.right()),
            mean(outcome.saturation)[0], mean(outcome.off_palette)[0],
        )  # fmt: skip
        found.setdefault(method.curve, []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def scales(results: Results, cell: Cell, path: Path) -> Path:
    """Plot right captions, saturation and pixels off the palette over scale."""
    figure, axes = _figure(11.0, 3.8, 3)
    baseline = results.outcome(Key(cell, TUNE, BASELINE.family, BASELINE.setting))
    assert baseline is not None
    titles = ("all right", "saturation", "off palette")
    for axis, title, values in zip(
        axes, titles, (baseline.right().astype(float), baseline.saturation, baseline.off_palette), strict=True
    ):
        middle, error = mean(values)
        axis.axhline(middle, color="black", linewidth=0.8)
        axis.axhspan(middle - 1.96 * error, middle + 1.96 * error, color="black", alpha=0.12, linewidth=0)
        axis.set(xlabel="scale (sharper softmax: 1 / temperature)", xscale="log")
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25, linewidth=0.5)
    for index, (name, points) in enumerate(curves(results, cell).items()):
        style = {"linewidth": 1.1, "markersize": 3, "marker": "osv^Dx*"[index % 7], "color": f"C{index % 10}"}
        style["linestyle"] = "-" if index < 7 else "--"
        x = [point.scale for point in points]
        errors = [1.96 * point.versus.error for point in points]
        axes[0].errorbar(x, [point.share for point in points], errors, label=name, elinewidth=0.6, **style)
        axes[1].plot(x, [point.saturation for point in points], **style)
        axes[2].plot(x, [point.off_palette for point in points], **style)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.suptitle(f"{cell.title}: on {len(baseline)} captions of `tune`; the line is no guidance", fontsize=9)
    return _saved(figure, path)


def differences(by_cell: Mapping[Cell, Sequence[Row]], path: Path) -> Path:
    """Plot the difference that each main family makes in each cell, on held-out captions, with 95 % intervals."""
    families = [name for name in MAIN if any(row.family == name for rows in by_cell.values() for row in rows)]
    figure, axes = _figure(1.4 + 1.5 * len(families), 1.3 + 0.34 * len(by_cell), len(families), sharey=True)
    for axis, family in zip(axes, families, strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for y, rows in enumerate(by_cell.values()):
            for row in rows:
                if row.family == family:
                    x, error = 100 * row.versus.difference, 196 * row.versus.error
                    colour = "C2" if x - error > 0 else "C3" if x + error < 0 else "0.45"
                    axis.errorbar(x, y, xerr=error, fmt="o", markersize=3, color=colour, elinewidth=1)
        axis.set_title(family, fontsize=8)
        axis.grid(alpha=0.25, linewidth=0.5, axis="x")
        if family not in _OWN_AXIS:
            axis.sharex(next(a for a, name in zip(axes, families, strict=True) if name not in _OWN_AXIS))
    axes[0].set_yticks(range(len(by_cell)), [cell.title for cell in by_cell], fontsize=7)
    axes[0].set_ylim(len(by_cell) - 0.5, -0.5)
    figure.supxlabel("points of all-right captions more than without guidance", fontsize=8)
    return _saved(figure, path)


def _figure(width: float, height: float, columns: int, **more: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False, **more)[0]
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.xaxis.label.set_fontsize(8)
    return figure, axes


def _saved(figure: Any, path: Path) -> Path:
    """Save the figure in few colours, so that the file is small."""
    import io

    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(64).save(path, optimize=True)
    return path
