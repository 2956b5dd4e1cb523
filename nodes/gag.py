# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG": guidance by a preset."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .input_checks import check_option
from .presets import DEFAULT_PRESET, PRESETS
from .shared_inputs import (
    guidance_schema,
    guided_output,
    schedule_input,
    strength_input,
)


class GAGuidance(io.ComfyNode):
    """Node that guides a model by a preset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return guidance_schema(
            node_id="GAGuidance",
            display_name="GAG: Attention Guidance",
            description="Geometry-Aware Attention Guidance: strengthens the model's attention to the prompt, at no "
            "extra model evaluation, with CFG or without. Goes between the model loader and the sampler.",
            settings=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=DEFAULT_PRESET,
                    tooltip="All settings in one name. auto: for models that run without CFG (cfg 1); rests beside "
                    "CFG; good to begin with. no CFG: GAG itself for cfg 1; harms pictures beside CFG. beside CFG: GAG "
                    "itself, very mild. paper: exactly the published settings for SDXL at CFG 5; can distort pictures.",
                ),
                strength_input(),
                schedule_input(),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str,
        strength: float,
        schedule: Any = None,
    ) -> io.NodeOutput:
        check_option("preset", preset, PRESETS)
        chosen = PRESETS[preset]
        return guided_output(
            cls,
            model,
            chosen.scaled(strength),
            start_percent=chosen.start_percent,
            end_percent=chosen.end_percent,
            adapt_to_cfg=chosen.adapt_to_cfg,
            schedule=schedule,
        )
