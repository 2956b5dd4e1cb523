# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG Anderson": guidance that solves for how far to extrapolate."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..gag_core import GuidanceConfig
from ..gag_core.config import MOST_ANDERSON_DEPTH
from .shared_inputs import (
    alpha_input,
    end_input,
    guidance_schema,
    guided_output,
    norm_mode_input,
    norm_threshold_input,
    orthogonal_scale_input,
    schedule_input,
    start_input,
    strength_input,
)

# Mild, as the defaults of the node "GAG": the solution is applied as it is (orthogonal_scale 1), bounded by a
# guidance_scale that it often does not reach, and capped after that.
DEFAULT = GuidanceConfig(
    rule="anderson", guidance_scale=3.0, norm_threshold=0.5, norm_mode="relative", orthogonal_scale=1.0
)
_DEFAULT_START = 0.3


class GAGAnderson(io.ComfyNode):
    """Node that guides a model by the rule "anderson" of :class:`gag_core.GuidanceConfig`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return guidance_schema(
            node_id="GAGAnderson",
            display_name="GAG Anderson: Attention Guidance",
            description="GAG that solves for how far to push, separately for each query token (a small patch of the "
            "picture) and each step, by Anderson acceleration. Experimental. Goes between the model loader and the "
            "sampler.",
            settings=[
                io.Float.Input(
                    "guidance_scale",
                    default=DEFAULT.guidance_scale,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The farthest that guidance may push. Higher lets single query tokens change more, and "
                    "break; the others stay as they are. 0 is plain sparse attention.",
                ),
                io.Int.Input(
                    "depth",
                    default=DEFAULT.anderson_depth,
                    min=1,
                    max=MOST_ANDERSON_DEPTH,
                    tooltip="Number of sparse attention outputs that are compared with the model's own attention "
                    "output. Each after the first repeats the sparse attention from the last result. Higher changes "
                    "the picture more, and is slower.",
                ),
                io.Float.Input(
                    "regularization",
                    default=DEFAULT.anderson_regularization,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="Caution where the attention outputs hardly differ. Higher is calmer: nearer to plain "
                    "sparse attention. 0.001 to 0.1 are usual.",
                ),
                norm_threshold_input(DEFAULT.norm_threshold),
                norm_mode_input(DEFAULT.norm_mode),
                orthogonal_scale_input(
                    DEFAULT.orthogonal_scale,
                    "1 applies the solution as it is; 0 makes the attention output only stronger or weaker; above 1 "
                    "changes content more and adds artefacts.",
                ),
                alpha_input(DEFAULT.alpha),
                strength_input(DEFAULT.strength),
                start_input(_DEFAULT_START),
                end_input(),
                schedule_input(),
            ],
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
        return guided_output(
            cls, model, config, start_percent=start_percent, end_percent=end_percent, schedule=schedule
        )
