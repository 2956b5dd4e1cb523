# SPDX-License-Identifier: GPL-3.0-or-later
"""The node that shows what a probe measured: plots, a few plain sentences, and all numbers as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..gag_core.measures import MEASURES
from .guidance import CATEGORY
from .host import place_in_list, show_on_node
from .plots import COLOURS, GRID, INK, new_figure, plain, to_image
from .presets import PRESETS
from .probe import ProbeType
from .recording import BRANCHES, Probe, Result

WIDTH, HEIGHT = 1280, 896
FORMAT = 1
_SHARES = ("parallel", "negative", "capped", "mass")
# What the pages show, and under which heading.
_TITLES = {
    "discrepancy": "sparse against own reading, |S - D| / |D|",
    "gain": "change by guidance, |guided - D| / |D|",
    "parallel": "share of S - D along S",
    "negative": "tokens where S - D points back",
    "capped": "tokens at the cap",
    "support": "text tokens in the sparse reading",
    "entropy_sparse": "entropy, sparse (nats)",
    "entropy_dense": "entropy, own reading (nats)",
    "mass": "attention on the text",
    "contraction": "contraction of retrieval",
}
_MOST_NAMES = 14
_MOST_PICTURES = 3
_MOST_WORDS = 6


class GAGReport(io.ComfyNode):
    """Shows what a probe measured in the run before it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGReport",
            display_name="GAG Report",
            category=CATEGORY,
            description="Shows what GAG Probe measured: plots, plain sentences, and a JSON file with all numbers.",
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
                    tooltip="The sampler's latent, where there is no picture to wait for. Connect this or images.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="GAG_report",
                    tooltip="What the JSON file in the output folder is called.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plots", tooltip="One picture per page, all of one size."),
                io.String.Output(display_name="summary", tooltip="What was measured, in sentences."),
                io.String.Output(display_name="json", tooltip="All numbers, as in the file."),
                io.Image.Output(display_name="images", tooltip="The images, unchanged."),
                io.Latent.Output(display_name="latent", tooltip="The latent, unchanged."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, probe: Probe, filename_prefix: str, images: Tensor | None = None, latent: dict[str, Any] | None = None
    ) -> io.NodeOutput:
        if images is None and latent is None:
            raise ValueError("GAG Report needs images or latent, so that it comes after the sampler: connect one.")
        place = place_in_list()
        result = probe.results.get(place, probe.result)
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
        several = [f"Run {place + 1} of {len(probe.results)}."] if len(probe.results) > 1 else []
        summary = " ".join([*several, *sentences(result)])
        text = as_json(result, summary)
        plots = torch.cat(pages(result, images))
        path, shown = _save(text, filename_prefix)
        path.write_text(text, encoding="utf-8")
        show_on_node(f"{summary} All numbers: {shown}", getattr(cls.hidden, "unique_id", None))
        preview = ui.PreviewImage(plots, cls=cls).as_dict()
        return io.NodeOutput(plots, summary, text, images, latent, ui={**preview, "text": (summary, shown)})


def sentences(result: Result) -> list[str]:
    """What was measured, in plain words: of the positive prompt, or of whichever there was."""
    branch = _branches(result)[0]
    layers, steps = len(result.layers), len(result.sigmas)
    guided = result.guided.any(dim=0)
    acted = guided.any()
    said = []
    if acted:
        said.append(
            f"Guidance acted in {int(guided.any(dim=1).sum())} of {layers} text attentions and in "
            f"{int(guided.any(dim=0).sum())} of {steps} steps{_where_in_run(guided.any(dim=0))}."
        )
    else:
        said.append(f"No guidance acted; what follows is what {_settings_in_words(result)} would do.")
    # Of what guidance did, or, where it did nothing, would have done.
    cells = result.guided[branch] if acted and bool(result.guided[branch].any()) else _measured(result, branch)
    gain = _values(result, branch, "gain")
    by_layer = torch.where(cells, gain, torch.nan).nanmean(dim=1)
    strongest = int(by_layer.nan_to_num(nan=-1.0).argmax())
    changed = "changed" if acted else "would change"
    said.append(
        f"It {changed} what is read of the text by {_percent(_mean(gain, cells))} on average, most in "
        f"{result.layers[strongest]} ({_percent(float(by_layer[strongest]))})."
    )
    capped = _mean(_values(result, branch, "capped"), cells)
    if any(settings.rule != "pladis" for settings in result.settings):
        said.append(f"The cap {'cut' if acted else 'would cut'} it in {_percent(capped)} of the tokens.")
    every = _measured(result, branch)
    own, sparse = (_mean(_values(result, branch, name), every) for name in ("entropy_dense", "entropy_sparse"))
    said.append(
        f"By entropy the model reads {math.exp(own):.1f} text tokens at each spot, the sparse reading "
        f"{math.exp(sparse):.1f}."
    )
    mass = _mean(_values(result, branch, "mass"), every)
    if mass < 1.0:
        said.append(f"{_percent(mass)} of the attention falls on the text.")
    negative = _mean(_values(result, branch, "negative"), every)
    said.append(
        f"In {_percent(negative)} of the tokens their difference points back, so that following it would weaken what "
        "the sparse reading finds."
    )
    return [*said, *result.notes]


def as_json(result: Result, summary: str) -> str:
    """All of a result but the maps' pixels; what was not measured is null."""
    branches = [BRANCHES[number] for number in _branches(result)]
    values = {
        name: {
            "definition": definition,
            **{BRANCHES[b]: _numbers(result.values[b, :, :, place]) for b in _branches(result)},
        }
        for place, (name, definition) in enumerate(MEASURES.items())
    }
    data = {
        "format": FORMAT,
        "summary": summary,
        "model": result.model,
        "layers": list(result.layers),
        "step_sigmas": [_number(sigma) for sigma in result.sigmas],
        "model_calls": result.calls,
        "branches": branches,
        "settings": [
            {name: _plain(value) for name, value in asdict(used).items() if name != "strength"}
            for used in result.settings
        ],
        "strengths": list(result.strengths),
        "guided": {BRANCHES[b]: result.guided[b].tolist() for b in _branches(result)},
        "measures": values,
        "words": list(result.words),
        "notes": list(result.notes),
    }
    return json.dumps(data, allow_nan=False)


def pages(result: Result, images: Tensor | None) -> list[Tensor]:
    """The plots, ``[1, HEIGHT, WIDTH, 3]`` each: layers by steps, curves over steps, and words if there are maps."""
    drawn = [_heat_maps(result), _curves(result)]
    if result.maps:
        drawn.append(_words(result, images))
    return drawn


def _heat_maps(result: Result) -> Tensor:
    """Each measure over layers and steps, of the positive prompt or whichever there was."""
    branch = _branches(result)[0]
    figure = new_figure(WIDTH, HEIGHT)
    figure.suptitle(
        f"Layers and steps, {BRANCHES[branch]} prompt" + ("; pale: not guided" if result.guided.any() else ""),
        color=INK,
    )
    names = ["gain", "discrepancy", "capped", "negative", "support", "entropy_dense", "parallel", "contraction"]
    if bool((_values(result, branch, "mass") < 1.0).any()):
        names[-2] = "mass"
    for axes, name in zip(figure.subplots(2, 4).flat, names, strict=True):
        plain(axes).grid(visible=False)
        values = _values(result, branch, name)
        top = 1.0 if name in _SHARES else None
        layers, steps = values.shape
        # Steps are counted from 1.
        place = {"aspect": "auto", "interpolation": "nearest", "extent": (0.5, steps + 0.5, layers - 0.5, -0.5)}
        drawn = axes.imshow(values.numpy(), cmap="viridis", vmin=0.0, vmax=top, **place)
        if name in ("gain", "capped") and result.guided.any():
            pale = [[(1.0, 1.0, 1.0, 0.0 if cell else 0.65) for cell in row] for row in result.guided[branch].tolist()]
            axes.imshow(pale, **place)
        axes.set_facecolor(GRID)
        axes.set_title(_TITLES[name], fontsize=8, color=INK)
        axes.tick_params(labelsize=7)
        every = max(1, math.ceil(len(result.layers) / _MOST_NAMES))
        axes.set_yticks(range(0, len(result.layers), every), result.layers[::every])
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.9, aspect=25)
        bar.ax.tick_params(labelsize=7, colors=INK)
        bar.outline.set_visible(False)
    for axes in figure.axes[4:8]:
        axes.set_xlabel("step", fontsize=8, color=INK)
    return to_image(figure)


def _curves(result: Result) -> Tensor:
    """Each measure over steps: the mean over layers, a line for each prompt and a band from quarter to quarter."""
    figure = new_figure(WIDTH, HEIGHT)
    figure.suptitle("Over the run: median layer, and the middle half of the layers", color=INK)
    names = ["gain", "discrepancy", "support", "entropy_dense", "capped", "negative", "parallel", "contraction"]
    if bool((result.values[..., list(MEASURES).index("mass")] < 1.0).any()):
        names[-2] = "mass"
    steps = list(range(1, len(result.sigmas) + 1))
    for axes, name in zip(figure.subplots(2, 4).flat, names, strict=True):
        plain(axes)
        for branch in _branches(result):
            values = _values(result, branch, name)
            low, middle, high = (values.nanquantile(part, dim=0).tolist() for part in (0.25, 0.5, 0.75))
            colour = COLOURS[branch]
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(steps, middle, color=colour, marker="o", markersize=2.5, label=BRANCHES[branch])
        axes.set_title(_TITLES[name], fontsize=8, color=INK)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0.0)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for axes in figure.axes[4:8]:
        axes.set_xlabel("step", fontsize=8, color=INK)
    if len(_branches(result)) > 1:
        figure.axes[0].legend(fontsize=7, frameon=False, labelcolor=INK)
    return to_image(figure)


def _words(result: Result, images: Tensor | None) -> Tensor:
    """Where the words are read: a row for each picture, a column for each word; over the pictures where given."""
    maps = _combined(result.maps)
    pictures = min(maps.shape[0], _MOST_PICTURES)
    words = result.words[:_MOST_WORDS]
    figure = new_figure(WIDTH, HEIGHT)
    # For pictures, whose shape is fixed: no wide gaps between their rows.
    figure.set_layout_engine("compressed")
    left_out = len(result.words) - len(words)
    figure.suptitle(
        "Where each word is read: share of the reading of the text, mean over layers and steps"
        + (f"; {left_out} more words are not shown" if left_out else ""),
        color=INK,
    )
    beside = 0 if images is None else 1
    grid = figure.subplots(pictures, len(words) + beside, squeeze=False)
    for row in range(pictures):
        under = None if images is None or row >= images.shape[0] else images[row, ..., :3].detach().cpu().clamp(0, 1)
        if beside:
            grid[row][0].set_axis_off()
            if under is not None:
                grid[row][0].imshow(under.numpy(), interpolation="nearest")
        for column, word in enumerate(words):
            axes, share = grid[row][column + beside], maps[row, column].numpy()
            axes.set_axis_off()
            extent = (0.0, 1.0, 0.0, 1.0)
            aspect = share.shape[0] / share.shape[1] if under is None else under.shape[0] / under.shape[1]
            if under is not None:
                grey = under.mean(dim=-1).mul(0.75).add(0.15)
                axes.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
            low, high = float(share.min()), float(share.max())
            axes.imshow(
                share,
                cmap="inferno",
                extent=extent,
                alpha=1.0 if under is None else 0.6,
                interpolation="bilinear",
            )
            axes.set_aspect(aspect)
            if row == 0:
                axes.set_title(word, color=INK)
            axes.text(
                0.5, -0.03, f"{_percent(low)} to {_percent(high)}", ha="center", va="top", fontsize=8, color=INK,
                transform=axes.transAxes,
            )  # fmt: skip
    return to_image(figure)


def _combined(maps: tuple[tuple[Tensor, int], ...]) -> Tensor:
    """One map ``[pictures, words, height, width]`` of all resolutions, each attention counting the same."""
    finest = maps[0][0]
    total = torch.zeros_like(finest)
    number = 0
    for share, count in maps:
        if share.shape[0] == finest.shape[0]:
            total += count * torch.nn.functional.interpolate(share, size=finest.shape[-2:], mode="bilinear")
            number += count
    return total / number


def _save(text: str, filename_prefix: str) -> tuple[Path, str]:
    """Where the JSON goes, as the host's save nodes number their files, and how to tell it."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    file = f"{name}_{counter:05}_.json"
    return Path(folder, file), str(Path("output", subfolder, file))


def _branches(result: Result) -> list[int]:
    """The branches of which something was measured, the positive prompt first."""
    return [b for b in range(len(BRANCHES)) if not result.values[b].isnan().all()]


def _values(result: Result, branch: int, name: str) -> Tensor:
    return result.values[branch, :, :, list(MEASURES).index(name)]


def _measured(result: Result, branch: int) -> Tensor:
    return ~result.values[branch, :, :, 0].isnan()


def _mean(values: Tensor, cells: Tensor) -> float:
    return float(values[cells & ~values.isnan()].mean())


def _settings_in_words(result: Result) -> str:
    settings = result.settings[-1]
    for name, preset in PRESETS.items():
        if replace(settings, strength=preset.strength) == preset:
            return f"the preset {name} at strength {result.strength:g}"
    return (
        f"rule {settings.rule} with guidance_scale {settings.guidance_scale:g}, alpha {settings.alpha:g} and strength "
        f"{result.strength:g}"
    )


def _where_in_run(steps: Tensor) -> str:
    """Which stretch of the run, if it is not all of it."""
    numbers = steps.nonzero().flatten().tolist()
    if len(numbers) == len(steps):
        return ""
    return f", from step {numbers[0] + 1} to {numbers[-1] + 1}"


def _percent(share: float) -> str:
    return f"{100.0 * share:.0f} %" if share >= 0.1 else f"{100.0 * share:.2g} %"


def _numbers(values: Tensor) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in values.tolist()]


def _number(value: float) -> float | None:
    """To six digits; None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    return _number(value) if isinstance(value, float) else value
