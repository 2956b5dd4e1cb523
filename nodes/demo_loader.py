# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG demo": loads one of the small text-to-image models that come with the pack."""

from __future__ import annotations

from comfy_api.latest import io

from .demo.architecture import SIZE
from .demo.models import WEIGHTS, load_demo

DEMO_CATEGORY = "GAG/demo"
DemoText = io.Custom("GAG_DEMO_TEXT")


class GAGDemoLoader(io.ComfyNode):
    """Node that loads a demo model, its text encoder and its (trivial) VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGDemoLoader",
            display_name="GAG demo",
            category=DEMO_CATEGORY,
            description=f"A tiny text-to-image model, {SIZE}x{SIZE} pixels, that knows coloured shapes. It comes with "
            "the pack and runs in seconds on any machine.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(WEIGHTS),
                    default="standard",
                    optional=True,
                    tooltip="standard draws in 8 to 20 steps and follows the prompt better with cfg 3 to 5. few-step "
                    "is distilled from standard and draws in 4 steps without CFG, as Turbo and Lightning models do: "
                    "steps 4, cfg 1. transformer is built like Flux, where text and picture share one attention; set "
                    "steps and cfg as for standard.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the GAG node or the sampler."),
                DemoText.Output(display_name="text encoder", tooltip="For GAG demo prompt."),
                io.Vae.Output(display_name="vae", tooltip="For VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls, kind: str = "standard") -> io.NodeOutput:
        return io.NodeOutput(*load_demo(kind))
