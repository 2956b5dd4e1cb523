# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG Demo": loads one of the small text-to-image models that come with the pack."""

from __future__ import annotations

from comfy_api.latest import io

from .demo.architecture import PIXELS
from .demo.models import WEIGHTS, load_demo
from .shared_inputs import search_aliases


class GAGDemoLoader(io.ComfyNode):
    """Node that loads a demo model, its text encoder and its VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGDemoLoader",
            display_name="GAG Demo (tiny model)",
            category="GAG/demo",
            description="Loads a tiny text-to-image model that comes with the pack. It draws coloured shapes, "
            f"{PIXELS}x{PIXELS} pixels in blocks, in seconds on any machine. Wire it like Load Checkpoint.",
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
                io.Model.Output(display_name="model", tooltip="For GAG or the sampler."),
                io.Clip.Output(display_name="clip", tooltip="For CLIP Text Encode, and for GAG Probe."),
                io.Vae.Output(display_name="vae", tooltip="For VAE Decode."),
            ],
            **search_aliases("demo model", "tiny model", "test model", "example model", "load checkpoint"),
        )

    @classmethod
    def execute(cls, kind: str = "standard") -> io.NodeOutput:
        return io.NodeOutput(*load_demo(kind))
