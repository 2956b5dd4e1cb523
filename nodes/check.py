# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG Check": correctness and speed of guidance on this machine, as a picture, as text for an issue, as JSON."""

from __future__ import annotations

import json
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..gag_core.baselines import Shape
from ..gag_core.check import CASES, PLAIN, SORT, Comparison, Report, check, dtype_name, environment_lines, milliseconds
from .input_checks import check_switch
from .output_files import NotSavedError, save_json, save_preview
from .panel.browser import BROWSER
from .panel.messages import without_markup
from .patching.observer import Sentence
from .plots import AS_IT_IS, COLOURS, INK, NotDrawnError, draw, new_figure, picture_of_text, style, to_image
from .shared_inputs import CATEGORY, node_id_of, search_aliases

WIDTH, HEIGHT = 1280, 896
_PROGRESS_STEPS = 1000
_MARKERS = {"float16": "o", "bfloat16": "s", "float32": "D"}
_PATH_COLOURS = (COLOURS[0], COLOURS[4], COLOURS[2], COLOURS[3])
_SORT_COLOUR, _WRONG = COLOURS[6], COLOURS[1]
# Ends of the axis of errors, as shares of the error that is allowed.
_LEAST_ERROR, _LARGEST_ERROR = 1e-3, 1e4
_LEAST_ROWS = 4


class GAGCheck(io.ComfyNode):
    """Node that checks guidance on this machine. It needs no model and changes none."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGCheck",
            display_name="GAG Check (self-test)",
            category=CATEGORY,
            description="Checks on this machine that GAG computes right, and how fast, in less than a minute. Paste "
            "its text into an issue when you report a fault or a speed.",
            inputs=[
                io.Boolean.Input(
                    "quick",
                    default=False,
                    tooltip="On: the most important cases and one shape alone, in a few seconds. Off: everything, in "
                    "less than a minute.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="GAG_check",
                    tooltip="Beginning of the name of the JSON file in the output folder.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="Errors and times, in one picture."),
                io.String.Output(display_name="text", tooltip="The report in Markdown, to paste into an issue."),
                io.String.Output(display_name="json", tooltip="All numbers, as in the file."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **search_aliases("benchmark", "self test", "speed test", "diagnostics", "triton kernel"),
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        return float("nan")  # equals nothing, so that each run of the queue measures anew

    @classmethod
    def execute(cls, quick: bool, filename_prefix: str) -> io.NodeOutput:
        check_switch("quick", quick)
        bar = comfy.utils.ProgressBar(_PROGRESS_STEPS)

        def progress(share: float, what: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(int(share * _PROGRESS_STEPS))

        try:
            device = comfy.model_management.get_torch_device()
            report = check(device, quick=quick, host=f"ComfyUI {_version_of_host()}", progress=progress)
        finally:
            comfy.model_management.soft_empty_cache()
        bar.update_absolute(_PROGRESS_STEPS)
        data = json.dumps(report.as_json(), indent=2, allow_nan=False)
        text, shown = report.as_text(), ""
        failures: list[str] = []
        # Whatever cannot be drawn or saved, everything else is given.
        try:
            picture = draw(lambda: _picture(report))
        except NotDrawnError as error:
            failures.append(str(error))
            picture = picture_of_text(f"{report.verdict} {error}", WIDTH, HEIGHT)
        try:
            shown = save_json(data, filename_prefix)
        except NotSavedError as error:
            failures.append(str(error))
        preview: dict[str, Any] = {}
        try:
            preview = save_preview(picture)
        except NotSavedError as error:
            failures.append(str(error))
        on_node = "\n\n".join([text, *failures, *([f"All numbers: {shown}"] if shown else [])])
        BROWSER.send_status(node_id_of(cls), [Sentence("", {}, on_node)])
        texts = tuple(without_markup(part) for part in ("\n\n".join([text, *failures]), shown) if part)
        return io.NodeOutput(picture, text, data, ui={**preview, "text": texts})


def _version_of_host() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return "of unknown version"
    return str(__version__)


# --- the picture --------------------------------------------------------------------------------------------------


def _picture(report: Report) -> Tensor:
    """Draw the verdict, the machine, the errors of all paths, and the times: ``[1, HEIGHT, WIDTH, 3]``."""
    figure = new_figure(WIDTH, HEIGHT)
    title = f"GAG Check: {report.verdict} GAG uses the path {report.path} here."
    figure.suptitle(title, fontsize=12, color=INK if report.is_right else _WRONG)
    figure.supxlabel("\n".join(environment_lines(report.environment)), fontsize=8, color=INK, **AS_IT_IS)
    errors, times = figure.subplots(1, 2)
    _draw_errors(style(errors), report)
    _draw_times(style(times), report)
    return to_image(figure)


def _colours(names: list[str]) -> dict[str, str]:
    """Return the colour of each path, and of sorting."""
    return {**dict(zip(names, _PATH_COLOURS, strict=False)), SORT: _SORT_COLOUR}


def _draw_errors(axes: Any, report: Report) -> None:
    """Draw the error of each path in each case and dtype, as a share of the error that is allowed."""
    cases = [case.name for case in CASES if any(one.case == case.name for one in report.comparisons)]
    paths = report.paths()
    rows = {path: (index - (len(paths) - 1) / 2) * 0.25 for index, path in enumerate(paths)}
    axes.axvline(1.0, color=_WRONG, linewidth=1.2, label="allowed")
    for (path, dtype), found in report.by_path().items():
        label = f"{path}, {dtype_name(dtype)}"
        places = [cases.index(one.case) + rows[path] for one in found]
        style_of = {"color": _colours(paths)[path], "markersize": 5, "alpha": 0.8, "label": label}
        axes.plot([_shown_error(one) for one in found], places, _MARKERS[dtype_name(dtype)], **style_of)
    for one in report.comparisons:
        if not one.is_right:
            place = (_shown_error(one), cases.index(one.case) + rows[one.path])
            offset = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            axes.annotate("wrong" if one.is_wrong else "no result", place, fontsize=7, color=_WRONG, **offset)
    axes.set_xscale("log")
    axes.set_xlim(_LEAST_ERROR / 2, _LARGEST_ERROR * 2)
    axes.set_xticks([0.001, 0.01, 0.1, 1, 10, 100, 1000, 10000], ["0.001", "0.01", "0.1", "1", "10", "100", "", "more"])
    axes.minorticks_off()
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    _finish(axes, "Is it right?", "error against fp64, as a share of what is allowed", len(cases))


def _shown_error(one: Comparison) -> float:
    """Return an error as a share of what is allowed, within the axis; a path without a result is at its end."""
    share = _LARGEST_ERROR if one.error is None else one.error / one.limit
    return min(max(share, _LEAST_ERROR), _LARGEST_ERROR)


def _draw_times(axes: Any, report: Report) -> None:
    """Draw the time of each method at each shape, relative to plain attention."""
    shapes = {shape: found for shape, found in report.by_shape().items() if PLAIN in found}
    methods = [name for name in report.methods() if name != PLAIN]
    colours = _colours(report.paths())
    height = 0.8 / max(1, len(methods))
    largest = 2.0
    axes.axvline(1.0, color=INK, linewidth=1.2, label=PLAIN)
    for index, method in enumerate(methods):
        offset = (index - (len(methods) - 1) / 2) * height
        timed = [(row, found) for row, found in enumerate(shapes.values()) if method in found]
        places = [row + offset for row, _ in timed]
        ratios = [found[method].seconds / found[PLAIN].seconds for _, found in timed]
        axes.barh(places, ratios, 0.9 * height, color=colours[method], label=method)
        largest = max([largest, *ratios])
        for place, ratio in zip(places, ratios, strict=True):
            axes.annotate(f"{ratio:.3g}x", (ratio, place), xytext=(3, 0), textcoords="offset points", va="center",
                          fontsize=7, color=INK)  # fmt: skip
    axes.set_xlim(0.0, 1.15 * largest)
    names = [f"{_size(shape)}\nplain: {milliseconds(found[PLAIN].seconds)}" for shape, found in shapes.items()]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    _finish(axes, "How fast is it?", f"time relative to plain attention, {dtype_name(report.dtype)}", len(names))


def _size(shape: Shape) -> str:
    """Return the sizes of a shape on two lines."""
    tokens = f"{shape.queries} tokens, {shape.text} of text" if shape.text else f"{shape.queries} x {shape.keys}"
    heads = f"{shape.heads} head{'' if shape.heads == 1 else 's'}"
    return f"{shape.model}: {tokens}\n{heads} of {shape.dim}, batch {shape.batch}"


def _finish(axes: Any, title: str, about: str, rows: int) -> None:
    """Set the title, the text below the axis, the rows from top to bottom, and the legend above the axes."""
    axes.set_title(title, fontsize=10, color=INK, pad=38)
    axes.set_xlabel(about, fontsize=8, color=INK)
    axes.set_ylim(max(rows, _LEAST_ROWS) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 4, "columnspacing": 1.0, "handletextpad": 0.4}
    axes.legend(fontsize=7, frameon=False, labelcolor=INK, **place).set_in_layout(False)
