# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG Report": plots and sentences of a probe's measures, and all numbers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..gag_core.echo import plain
from ..gag_core.measures import MEASURES
from .input_checks import check_option
from .output_files import NotSavedError, save_json, save_preview
from .panel.browser import BROWSER
from .panel.messages import without_markup
from .patching.measurements import BRANCHES, Probe, Result, list_index
from .patching.observer import Sentence
from .plots import (
    AS_IT_IS,
    COLOURS,
    GRID,
    INK,
    NotDrawnError,
    draw,
    label_of,
    new_figure,
    picture_of_text,
    style,
    to_image,
)
from .presets import PRESETS
from .probe import ProbeType
from .shared_inputs import CATEGORY, node_id_of, search_aliases

WIDTH, HEIGHT = 1280, 896
FORMAT = 1
WORDS, ALL = PAGES = ("words", "all")
# Measures that are shares, whose colours go up to 1.
_SHARES = ("parallel", "negative", "capped", "mass")
# Measures in the plots. In models whose text has no attention of its own, "mass" takes the place of "parallel".
_HEAT_MAPS = ("gain", "discrepancy", "capped", "negative", "support", "entropy_dense", "parallel", "contraction")
_CURVES = ("gain", "discrepancy", "support", "entropy_dense", "capped", "negative", "parallel", "contraction")
_TITLES = {
    "discrepancy": "relative difference, |S - D| / |D|",
    "gain": "change by guidance, |guided - D| / |D|",
    "parallel": "share of S - D along S",
    "negative": "query tokens where S - D opposes S",
    "capped": "query tokens at the cap",
    "support": "text tokens in the sparse attention",
    "entropy_dense": "entropy of the model's attention (nats)",
    "mass": "attention on the text",
    "contraction": "contraction of repeated attention",
}
_MAX_LAYER_NAMES = 14
_MAX_PICTURES = 3
_MAX_WORDS = 6


class GAGReport(io.ComfyNode):
    """Node that shows the measurements of a probe in the run before it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGReport",
            display_name="GAG Report (attention plots)",
            category=CATEGORY,
            description="Shows the measurements of GAG Probe: plots, a summary, and a JSON file with all numbers.",
            inputs=[
                ProbeType.Input("probe", tooltip="From GAG Probe."),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The finished picture, from VAE Decode: the report waits for it, and draws the maps of "
                    "words over it. Connect this or latent.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The sampler's latent, if there is no picture to wait for. Connect this or images.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="GAG_report",
                    tooltip="Beginning of the name of the JSON file in the output folder.",
                ),
                io.Combo.Input(
                    "pages",
                    options=list(PAGES),
                    default=WORDS,
                    optional=True,
                    tooltip="The plots to draw. words: where in the picture the model attends to each word of GAG "
                    "Probe; the other plots if it has no words. all: then every measure too, by layer and by step, for "
                    "experts.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plots", tooltip="One picture per page, all of one size."),
                io.String.Output(display_name="summary", tooltip="The measurements in a few sentences."),
                io.String.Output(display_name="json", tooltip="All numbers, as in the file."),
                io.Image.Output(display_name="images", tooltip="The images, unchanged."),
                io.Latent.Output(display_name="latent", tooltip="The latent, unchanged."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **search_aliases("attention map", "heatmap", "DAAM", "visualize attention"),
        )

    @classmethod
    def execute(
        cls,
        probe: Probe,
        filename_prefix: str,
        images: Tensor | None = None,
        latent: dict[str, Any] | None = None,
        pages: str = WORDS,
    ) -> io.NodeOutput:
        check_option("pages", pages, PAGES)
        if images is None and latent is None:
            raise ValueError("GAG Report needs images or latent, so that it comes after the sampler: connect one.")
        if not isinstance(probe, Probe):
            raise TypeError(f"probe must come from GAG Probe, got {plain(type(probe).__name__)}.")
        index = list_index()
        result = probe.results.get(index, probe.result)
        if result is None:
            raise ValueError(
                "GAG Report has nothing to show: no run with GAG Probe's model has finished; connect that model to the "
                "sampler."
            )
        if not result.layers:
            raise ValueError(
                "GAG Report has nothing to show: in the last run with GAG Probe's model no text attention ran; the "
                "prompts may be empty, or another node may replace the model's blocks."
            )
        which_run = [f"Run {index + 1} of {len(probe.results)}."] if len(probe.results) > 1 else []
        # Words of the prompt are among the notes: a text with half of a surrogate pair could not be sent on.
        summary = " ".join([*which_run, *sentences(result)]).encode("utf-8", "backslashreplace").decode()
        text = as_json(result, summary)
        # Whatever cannot be drawn or saved, everything else is given.
        plots, failures = draw_pages(result, images, everything=pages == ALL)
        shown, preview = "", {}
        try:
            shown = save_json(text, filename_prefix)
        except NotSavedError as error:
            failures.append(str(error))
        try:
            preview = save_preview(plots)
        except NotSavedError as error:
            failures.append(str(error))
        summary = " ".join([summary, *failures])
        on_node = summary
        if shown:
            on_node = f"{summary} All numbers: {shown}"
        BROWSER.send_status(node_id_of(cls), [Sentence("", {}, on_node)])
        texts = tuple(without_markup(part) for part in (summary, shown) if part)
        return io.NodeOutput(plots, summary, text, images, latent, ui={**preview, "text": texts})


def sentences(result: Result) -> list[str]:
    """Return the summary of a result. It is about the positive prompt, or about the negative one if only that ran."""
    branch = _branches(result)[0]
    measured = _measured(result, branch)
    has_acted = bool(result.guided.any())
    # The layers and steps in which guidance acted; all if it acted in none, and the measures say what it would do.
    cells = result.guided[branch] if bool(result.guided[branch].any()) else measured
    found = [_where_guided(result) if has_acted else _not_guided(result), _gain(result, branch, cells, has_acted)]
    if any(settings.rule in ("gag", "anderson") for settings in result.settings):
        capped = _mean(_values(result, branch, "capped"), cells)
        advice = "for more effect raise norm_threshold" if capped >= 0.5 else "for less effect lower norm_threshold"
        held = "held" if has_acted else "would hold"
        found.append(f"The cap {held} it back in {_percent(capped)} of the picture: {advice}.")
    dense, sparse = (_mean(_values(result, branch, name), measured) for name in ("entropy_dense", "entropy_sparse"))
    found.append(
        f"A query token attends to about {math.exp(dense):.1f} tokens of the prompt; guidance pushes towards the "
        f"{math.exp(sparse):.1f} that matter most to it."
    )
    mass = _mean(_values(result, branch, "mass"), measured)
    if mass < 1.0:
        found.append(f"{_percent(mass)} of the attention falls on the text.")
    return [*found, *result.notes]


def _where_guided(result: Result) -> str:
    """Return the sentence about the layers and steps in which guidance acted."""
    cells = result.guided.any(dim=0)
    layers, steps = int(cells.any(dim=1).sum()), int(cells.any(dim=0).sum())
    numbers = cells.any(dim=0).nonzero().flatten().tolist()
    span = "" if steps == len(result.sigmas) else f", from step {numbers[0] + 1} to {numbers[-1] + 1}"
    return (
        f"Guidance acted in {layers} of the model's {len(result.layers)} attentions and in {steps} of "
        f"{len(result.sigmas)} steps{span}."
    )


def _not_guided(result: Result) -> str:
    """Return the sentence that says which settings the measures are for, if guidance did not act."""
    settings = result.settings[-1]
    described = (
        f"rule {settings.rule} with guidance_scale {settings.guidance_scale:g}, alpha {settings.alpha:g} and strength "
        f"{result.strength:g}"
    )
    for name, preset in PRESETS.items():
        if replace(settings, strength=preset.config.strength) == preset.config:
            described = f"the preset {name} at strength {result.strength / preset.config.strength:g}"
    return f"No guidance acted; the numbers are for {described}."


def _gain(result: Result, branch: int, cells: Tensor, has_acted: bool) -> str:
    """Return the sentence about the change by guidance: its mean, and the layer where it is largest."""
    gain = _values(result, branch, "gain")
    by_layer = torch.where(cells, gain, torch.nan).nanmean(dim=1)
    strongest = int(by_layer.nan_to_num(nan=-1.0).argmax())
    return (
        f"Guidance {'changed' if has_acted else 'would change'} the attention output by {_percent(_mean(gain, cells))} "
        f"on average, most in {result.layers[strongest]} ({_percent(float(by_layer[strongest]))})."
    )


def as_json(result: Result, summary: str) -> str:
    """Return a result as JSON, except for the pixels of its maps. A value that was not measured is null."""
    branches = {BRANCHES[branch]: branch for branch in _branches(result)}
    data = {
        "format": FORMAT,
        "summary": summary,
        "model": result.model,
        "layers": list(result.layers),
        "step_sigmas": [_rounded(sigma) for sigma in result.sigmas],
        "model_calls": result.calls,
        "branches": list(branches),
        "settings": [
            {name: _json_value(value) for name, value in asdict(config).items() if name != "strength"}
            for config in result.settings
        ],
        "strengths": list(result.strengths),
        "guided": {name: result.guided[branch].tolist() for name, branch in branches.items()},
        "measures": {
            measure: {
                "definition": definition,
                **{name: _json_rows(_values(result, branch, measure)) for name, branch in branches.items()},
            }
            for measure, definition in MEASURES.items()
        },
        "words": list(result.words),
        "notes": list(result.notes),
    }
    return json.dumps(data, allow_nan=False)


def draw_pages(result: Result, images: Tensor | None, everything: bool) -> tuple[Tensor, list[str]]:
    """Return the plots ``[pages, HEIGHT, WIDTH, 3]``: words if mapped; layers by steps and curves over steps.

    Without ``everything`` the last two are left out where there are words. In the place of plots that cannot be drawn,
    there is one picture of the reason. The reasons are returned too.
    """
    drawings = [lambda: _word_page(result, images)] if result.maps else []
    if everything or not drawings:
        drawings += [lambda: _heat_map_page(result), lambda: _curve_page(result)]
    failures: list[str] = []
    found = [page for drawing in drawings if (page := _page(drawing, failures)) is not None]
    return torch.cat(found), failures


def _page(drawing: Callable[[], Tensor], failures: list[str]) -> Tensor | None:
    """Return a plot, or a picture of the reason why there is none; None if another page shows the same reason."""
    try:
        return draw(drawing)
    except NotDrawnError as error:
        if str(error) in failures:
            return None
        failures.append(str(error))
        return picture_of_text(str(error), WIDTH, HEIGHT)


def _heat_map_page(result: Result) -> Tensor:
    """Draw each measure over layers and steps, for the prompt that :func:`sentences` is about."""
    branch = _branches(result)[0]
    figure = new_figure(WIDTH, HEIGHT)
    pale = "; pale: not guided" if result.guided.any() else ""
    figure.suptitle(f"Layers and steps, {BRANCHES[branch]} prompt{pale}", color=INK)
    measures = _shown(_HEAT_MAPS, _values(result, branch, "mass"))
    for axes, measure in zip(figure.subplots(2, 4).flat, measures, strict=True):
        _draw_heat_map(axes, result, branch, measure)
    for axes in figure.axes[4:8]:
        axes.set_xlabel("step", fontsize=8, color=INK)
    return to_image(figure)


def _draw_heat_map(axes: Any, result: Result, branch: int, measure: str) -> None:
    style(axes).grid(visible=False)
    values = _values(result, branch, measure)
    layers, steps = values.shape
    # Steps are counted from 1.
    extent = (0.5, steps + 0.5, layers - 0.5, -0.5)
    options = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    highest = 1.0 if measure in _SHARES else None
    heat_map = axes.imshow(values.numpy(), cmap="viridis", vmin=0.0, vmax=highest, **options)
    if measure in ("gain", "capped") and result.guided.any():
        guided = result.guided[branch].tolist()
        veil = [[(1.0, 1.0, 1.0, 0.0 if cell else 0.65) for cell in row] for row in guided]
        axes.imshow(veil, **options)
    axes.set_facecolor(GRID)
    _label(axes, measure)
    every = max(1, math.ceil(len(result.layers) / _MAX_LAYER_NAMES))
    names = [label_of(name) for name in result.layers[::every]]
    axes.set_yticks(range(0, len(result.layers), every), names, **AS_IT_IS)
    bar = axes.figure.colorbar(heat_map, ax=axes, shrink=0.9, aspect=25)
    bar.ax.tick_params(labelsize=7, colors=INK)
    bar.outline.set_visible(False)


def _curve_page(result: Result) -> Tensor:
    """Draw each measure over steps: the median over layers, a line for each prompt, and a band between quartiles."""
    figure = new_figure(WIDTH, HEIGHT)
    figure.suptitle("Over the run: median layer, and the middle half of the layers", color=INK)
    measures = _shown(_CURVES, result.values[..., list(MEASURES).index("mass")])
    steps = list(range(1, len(result.sigmas) + 1))
    for axes, measure in zip(figure.subplots(2, 4).flat, measures, strict=True):
        style(axes)
        for branch in _branches(result):
            values = _values(result, branch, measure)
            low, middle, high = (values.nanquantile(part, dim=0).tolist() for part in (0.25, 0.5, 0.75))
            colour = COLOURS[branch]
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(steps, middle, color=colour, marker="o", markersize=2.5, label=BRANCHES[branch])
        _label(axes, measure)
        axes.set_ylim(bottom=0.0)
    for axes in figure.axes[4:8]:
        axes.set_xlabel("step", fontsize=8, color=INK)
    if len(_branches(result)) > 1:
        figure.axes[0].legend(fontsize=7, frameon=False, labelcolor=INK)
    return to_image(figure)


def _shown(measures: tuple[str, ...], mass: Tensor) -> list[str]:
    """Return the measures to plot: "mass" in the place of "parallel" if some attention falls beside the text."""
    has_other_tokens = bool((mass < 1.0).any())
    return ["mass" if has_other_tokens and measure == "parallel" else measure for measure in measures]


def _label(axes: Any, measure: str) -> None:
    axes.set_title(_TITLES[measure], fontsize=8, color=INK)
    axes.tick_params(labelsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _word_page(result: Result, images: Tensor | None) -> Tensor:
    """Draw the maps of the words, over the pictures if given, as large as they fit.

    Several pictures have a row each, with a column for each word. A single picture has as many rows as make its maps
    largest.
    """
    maps = _combined(result.maps)
    pictures = min(maps.shape[0], _MAX_PICTURES)
    words = result.words[:_MAX_WORDS]
    figure = new_figure(WIDTH, HEIGHT)
    # The layout for pictures, whose shape is fixed: no wide gaps between their rows.
    figure.set_layout_engine("compressed")
    left_out = len(result.words) - len(words)
    figure.suptitle(
        "Attention to each word: share of the attention to the text, mean over layers and steps"
        + (f"; {left_out} more words are not shown" if left_out else ""),
        color=INK,
    )
    first = 0 if images is None else 1
    cells = len(words) + first
    columns = _columns(cells, maps.shape[-1] / maps.shape[-2]) if pictures == 1 else cells
    axes_of = figure.subplots(pictures * math.ceil(cells / columns), columns, squeeze=False)
    grid = [axes_of.flat] if pictures == 1 else axes_of
    for axes in axes_of.flat:
        axes.set_axis_off()
    for row in range(pictures):
        picture = None if images is None or row >= images.shape[0] else images[row, ..., :3].detach().cpu().clamp(0, 1)
        if first and picture is not None:
            grid[row][0].imshow(picture.numpy(), interpolation="nearest")
        for column, word in enumerate(words):
            axes = grid[row][column + first]
            _draw_word_map(axes, maps[row, column], picture)
            if row == 0:
                axes.set_title(label_of(word), color=INK, **AS_IT_IS)
    return to_image(figure)


def _columns(cells: int, ratio: float) -> int:
    """Return the number of columns with which cells of this ratio of width to height are largest on a page."""

    def width_of(columns: int) -> float:
        rows = math.ceil(cells / columns)
        return min(WIDTH / columns, ratio * HEIGHT / rows)

    return max(range(1, cells + 1), key=width_of)


def _draw_word_map(axes: Any, share: Tensor, picture: Tensor | None) -> None:
    """Draw the map of a word ``[height, width]``, over a grey version of the picture ``[height, width, 3]`` if any."""
    extent = (0.0, 1.0, 0.0, 1.0)
    height, width = share.shape if picture is None else picture.shape[:2]
    if picture is not None:
        grey = picture.mean(dim=-1).mul(0.75).add(0.15)
        axes.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    alpha = 1.0 if picture is None else 0.6
    axes.imshow(share.numpy(), cmap="inferno", extent=extent, alpha=alpha, interpolation="bilinear")
    axes.set_aspect(height / width)
    span = f"{_percent(float(share.min()))} to {_percent(float(share.max()))}"
    axes.text(0.5, -0.03, span, ha="center", va="top", fontsize=8, color=INK, transform=axes.transAxes)


def _combined(maps: tuple[tuple[Tensor, int], ...]) -> Tensor:
    """Return one map ``[pictures, words, height, width]`` of all resolutions; each attention counts alike."""
    finest = maps[0][0]
    total = torch.zeros_like(finest)
    attentions = 0
    for share, count in maps:
        if share.shape[0] == finest.shape[0]:
            total += count * torch.nn.functional.interpolate(share, size=finest.shape[-2:], mode="bilinear")
            attentions += count
    return total / attentions


def _branches(result: Result) -> list[int]:
    """Return the indices of the branches in which something was measured, the positive prompt first."""
    return [branch for branch in range(len(BRANCHES)) if not result.values[branch].isnan().all()]


def _values(result: Result, branch: int, measure: str) -> Tensor:
    """Return a measure ``[layers, steps]``."""
    return result.values[branch, :, :, list(MEASURES).index(measure)]


def _measured(result: Result, branch: int) -> Tensor:
    """Return ``[layers, steps]``, True where something was measured."""
    return ~result.values[branch, :, :, 0].isnan()


def _mean(values: Tensor, cells: Tensor) -> float:
    """Return the mean of a measure over some layers and steps."""
    return float(values[cells & ~values.isnan()].mean())


def _percent(share: float) -> str:
    return f"{100.0 * share:.0f} %" if share >= 0.1 else f"{100.0 * share:.2g} %"


def _json_rows(values: Tensor) -> list[list[float | None]]:
    return [[_rounded(value) for value in row] for row in values.tolist()]


def _json_value(value: Any) -> Any:
    return _rounded(value) if isinstance(value, float) else value


def _rounded(value: float) -> float | None:
    """Return a number with six digits; None for infinity and NaN, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
