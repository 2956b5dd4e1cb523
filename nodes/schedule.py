# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG Schedule": the strength over the steps of a run, and a plot of it."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .output_files import NotSavedError, save_preview
from .patching.strength_curve import KINDS, OVER, Curve
from .plots import NotDrawnError, draw, new_figure, style, to_image
from .shared_inputs import CATEGORY, ScheduleType, search_aliases

log = logging.getLogger("comfyui-gag")

_WIDTH, _HEIGHT = 480, 300
_POINTS = 201
_HIGHEST_SIGMA = 1000.0


class GAGSchedule(io.ComfyNode):
    """Node that makes a schedule of the strength, and shows its curve."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = Curve()
        return io.Schema(
            node_id="GAGSchedule",
            display_name="GAG Schedule (strength over steps)",
            category=CATEGORY,
            description="Changes the strength of a GAG node during the run, and shows the curve. Connect it to the "
            "schedule input of that node.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=default.kind,
                    tooltip="Shape of the curve. constant: end_value all the time. linear: straight from start_value "
                    "to end_value. cosine: smoothly from start_value to end_value. interval: end_value between start "
                    "and end, else start_value. bump: smoothly from start_value to end_value halfway, and back.",
                ),
                io.Combo.Input(
                    "over",
                    options=list(OVER),
                    default=default.over,
                    tooltip="Unit of start and end. steps: shares of this run's steps, 0 the first and 1 the last. "
                    "sigma: noise levels, which mean the same in runs of any number of steps.",
                ),
                io.Float.Input(
                    "start_value",
                    default=default.start_value,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Factor of strength before start. Higher is stronger: 1 is as set on the GAG node, 0 "
                    "leaves the step exactly as without GAG. Early steps decide the composition.",
                ),
                io.Float.Input(
                    "end_value",
                    default=default.end_value,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Factor of strength that the curve leads to: after end, or with interval and bump between "
                    "start and end. Higher is stronger: 1 is as set, 0 is off. Late steps decide fine detail.",
                ),
                io.Float.Input(
                    "start",
                    default=default.start,
                    min=0.0,
                    max=_HIGHEST_SIGMA,
                    step=0.01,
                    tooltip="Point at which the curve begins to change. Over steps 0 is the first step; higher begins "
                    "later and leaves more steps at start_value. Over sigma it is a noise level: higher begins "
                    "sooner.",
                ),
                io.Float.Input(
                    "end",
                    default=default.end,
                    min=0.0,
                    max=_HIGHEST_SIGMA,
                    step=0.01,
                    tooltip="Point at which the change ends. Over steps 1 is the last step; higher changes more "
                    "slowly. Over sigma it is a noise level, not above start, because noise falls during a run.",
                ),
            ],
            outputs=[
                ScheduleType.Output(display_name="schedule", tooltip="For the schedule input of a GAG node."),
            ],
            **search_aliases("strength schedule", "guidance schedule", "strength curve", "keyframes"),
        )

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        curve = Curve(**settings)
        try:
            preview = save_preview(draw(lambda: picture_of(curve)))
        except (NotDrawnError, NotSavedError) as error:  # the run needs the curve, not its picture
            log.warning(str(error))
            return io.NodeOutput(curve)
        return io.NodeOutput(curve, ui=preview)


def picture_of(curve: Curve) -> Tensor:
    """Return a plot of the curve ``[1, H, W, 3]``. It runs from left to right, as the run does."""
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = style(figure.add_subplot())
    shares = [i / (_POINTS - 1) for i in range(_POINTS)]
    if curve.over == "steps":
        # With start and end among the points a jump shows as a vertical edge, wherever it lies between two others.
        positions = sorted({*shares, curve.start, curve.end})
        axes.plot(positions, [curve.factor(position, 0.0) for position in positions], linewidth=2.5)
        axes.set_xlabel("share of the steps")
    else:
        highest = 1.25 * curve.start or 1.0
        levels = sorted({*(share * highest for share in shares), curve.start, curve.end}, reverse=True)
        axes.plot(levels, [curve.factor(0.0, level) for level in levels], linewidth=2.5)
        axes.set_xlim(highest, 0.0)
        axes.set_xlabel("sigma (noise level)")
    low, high = sorted((0.0, curve.start_value, curve.end_value))[::2]
    margin = 0.08 * (max(high, 1.0) - low)
    axes.set_ylim(low - margin, max(high, 1.0) + margin)
    axes.set_ylabel("factor of strength")
    return to_image(figure)
