# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG": guidance by a preset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from .input_checks import check_option
from .presets import DEFAULT_PRESET, PRESETS
from .shared_inputs import (
    end_input,
    guidance_schema,
    guided_output,
    schedule_input,
    start_input,
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
                    tooltip="How far guidance pushes. gentle: small changes, good to begin with. paper: far stronger, "
                    "the published settings for SDXL with CFG 5, which use strength 1; can distort the picture on "
                    "other models.",
                ),
                strength_input(),
                start_input(),
                end_input(),
                schedule_input(),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str,
        strength: float,
        start_percent: float,
        end_percent: float,
        schedule: Any = None,
    ) -> io.NodeOutput:
        check_option("preset", preset, PRESETS)
        return guided_output(
            cls,
            model,
            replace(PRESETS[preset], strength=strength),
            start_percent=start_percent,
            end_percent=end_percent,
            schedule=schedule,
        )
