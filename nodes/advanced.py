# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG (advanced)": guidance with every setting."""

from __future__ import annotations

from typing import Any, Literal

from comfy_api.latest import io

from ..gag_core import GuidanceConfig
from ..gag_core.config import RULES
from .input_checks import check_option, check_switch, check_text
from .presets import DEFAULT
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

APPLY_TO = ("both", "positive")
# Rule "anderson" has settings and a node of its own.
_RULES = [rule for rule in RULES if rule != "anderson"]


class GAGuidanceAdvanced(io.ComfyNode):
    """Node that guides a model with every setting of :class:`gag_core.GuidanceConfig`, under the same names."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return guidance_schema(
            node_id="GAGuidanceAdvanced",
            display_name="GAG (advanced): Attention Guidance",
            description="Geometry-Aware Attention Guidance with every setting, and PLADIS. The defaults are those of "
            "GAG.",
            settings=[
                io.Combo.Input(
                    "rule",
                    options=_RULES,
                    default=DEFAULT.config.rule,
                    tooltip="gag: geometry-aware, with a cap. uniform: away from the mean of all words; the fastest, "
                    "with guidance_scale and strength alone. pladis: the plain extrapolation of the preceding method, "
                    "which changes the picture more and breaks it sooner.",
                ),
                io.Float.Input(
                    "guidance_scale",
                    default=DEFAULT.config.guidance_scale,
                    min=-100.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How far guidance pushes. Higher follows the prompt harder, up to burnt or broken "
                    "pictures. With uniform 0 is no change, and 0.25 to 1 are usual. With gag 0 is plain sparse "
                    "attention; with pladis 0 is no change and 1 plain sparse attention.",
                ),
                norm_threshold_input(DEFAULT.config.norm_threshold, note=" gag only."),
                norm_mode_input(DEFAULT.config.norm_mode),
                orthogonal_scale_input(
                    DEFAULT.config.orthogonal_scale,
                    "0 makes the attention output only stronger or weaker; higher changes content more and adds "
                    "artefacts. gag only.",
                ),
                alpha_input(DEFAULT.config.alpha),
                strength_input(),
                io.Boolean.Input(
                    "merge_heads",
                    default=DEFAULT.config.merge_heads,
                    tooltip="Measure all attention heads of a query token together instead of each alone. On is "
                    "calmer: heads that disagree hold each other back.",
                ),
                io.Combo.Input(
                    "apply_to",
                    options=list(APPLY_TO),
                    default=APPLY_TO[0],
                    tooltip="both: guide the attention to the positive and to the negative prompt, as the paper does. "
                    "positive: guide the attention to the positive prompt only.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Blocks to guide. UNets (SD1.5, SDXL): d0,d1,m,u or d2.0-3. Transformers (Flux): double "
                    "0-18, single 20-37, or numbers that count through all parts: 0,1,47-49. Fewer blocks change the "
                    "picture less. Empty is the default of the model family: all blocks, for UNets without the "
                    "middle.",
                ),
                start_input(),
                end_input(),
                io.Boolean.Input(
                    "adapt_to_cfg",
                    default=DEFAULT.adapt_to_cfg,
                    tooltip="On: guidance rests where the sampler uses CFG. Full at cfg 1, less up to cfg 2, none from "
                    "there on: beside CFG it did no good in our measurements. Off: strength stays as set at every cfg.",
                ),
                io.Boolean.Input(
                    "verbose",
                    default=False,
                    tooltip="Write to the log which attentions were guided, and how often. The picture stays the same.",
                ),
                schedule_input(),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        apply_to: Literal["both", "positive"],
        blocks: str,
        start_percent: float,
        end_percent: float,
        adapt_to_cfg: bool,
        verbose: bool,
        schedule: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        check_option("apply_to", apply_to, APPLY_TO)
        check_switch("adapt_to_cfg", adapt_to_cfg)
        check_switch("verbose", verbose)
        check_text("blocks", blocks)
        return guided_output(
            cls,
            model,
            GuidanceConfig(**settings),
            start_percent=start_percent,
            end_percent=end_percent,
            adapt_to_cfg=adapt_to_cfg,
            apply_to=apply_to,
            blocks=blocks,
            verbose=verbose,
            schedule=schedule,
        )
