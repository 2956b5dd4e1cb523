# SPDX-License-Identifier: GPL-3.0-or-later
"""The node whose guidance solves for how far to push: MODEL in, guided MODEL out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..gag_core import GuidanceConfig
from ..gag_core.config import MOST_ANDERSON_DEPTH, NORM_MODES
from .guidance import CATEGORY, END, NEWER_FIELDS, STRENGTH, guide, node_id_of, schedule_input, start_input

# Mild, as the plain node's: what is solved for as it is, in a bound that it often stays within, and a brake behind it.
DEFAULT = GuidanceConfig(
    rule="anderson", guidance_scale=3.0, norm_threshold=0.5, norm_mode="relative", orthogonal_scale=1.0
)


class GAGAnderson(io.ComfyNode):
    """Guidance by the rule "anderson" of :class:`gag_core.GuidanceConfig`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGAnderson",
            display_name="GAG Anderson",
            category=CATEGORY,
            description="GAG that works out how far to push, anew at each spot of the picture and each step, by "
            "Anderson acceleration. Experimental. Goes between the model loader and the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. It is not changed; a guided copy comes out."),
                io.Float.Input(
                    "guidance_scale",
                    default=DEFAULT.guidance_scale,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The most it may push. Higher lets single spots change more, and break; the others stay "
                    "as they are. 0 is plain sparse attention.",
                ),
                io.Int.Input(
                    "depth",
                    default=DEFAULT.anderson_depth,
                    min=1,
                    max=MOST_ANDERSON_DEPTH,
                    tooltip="How many readings of the prompt the model's own is compared with. 1 is the sparse one "
                    "alone. Each more reads again with what the last one found: higher changes the picture more, and "
                    "is slower.",
                ),
                io.Float.Input(
                    "regularization",
                    default=DEFAULT.anderson_regularization,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="How cautious it is where readings hardly differ. Higher is calmer: nearer to plain "
                    "sparse attention. 0.001 to 0.1 are usual.",
                ),
                io.Float.Input(
                    "norm_threshold",
                    default=DEFAULT.norm_threshold,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="The brake: the most that guidance may add, before scaling. Lower is safer and weaker.",
                ),
                io.Combo.Input(
                    "norm_mode",
                    options=list(NORM_MODES),
                    default=DEFAULT.norm_mode,
                    tooltip="How the brake measures. relative: as a share of what the model reads, so that one "
                    "setting means the same on every model. absolute: in the model's own units.",
                ),
                io.Float.Input(
                    "orthogonal_scale",
                    default=DEFAULT.orthogonal_scale,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the sideways part of the guidance is kept. 1 applies what was worked out as "
                    "it is, 0 only makes the model's own direction stronger or weaker; above 1 changes content more "
                    "and adds artefacts.",
                ),
                io.Float.Input(
                    "alpha",
                    default=DEFAULT.alpha,
                    min=1.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How picky the second reading of the prompt is. Higher listens to fewer words at each "
                    "spot of the picture. 1 is the model's own reading: no guidance.",
                ),
                io.Float.Input("strength", default=DEFAULT.strength, min=0.0, max=2.0, step=0.05, tooltip=STRENGTH),
                start_input(),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=END),
                schedule_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # else the host hands on what an equal node made, which reports on that other node
            **NEWER_FIELDS,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        depth: int,
        regularization: float,
        start_percent: float,
        end_percent: float,
        schedule: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        config = GuidanceConfig(
            rule="anderson", anderson_depth=depth, anderson_regularization=regularization, **settings
        )
        return io.NodeOutput(
            guide(
                model,
                config,
                start_percent=start_percent,
                end_percent=end_percent,
                node_id=node_id_of(cls),
                schedule=schedule,
            )
        )
