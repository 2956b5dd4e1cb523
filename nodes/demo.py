# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes that run the small text-to-image models that come with the pack: nothing to download."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from .demo_architecture import CHANNELS, POOLED, SIZE, DemoTextEncoder
from .demo_model import WEIGHTS, load_demo

CATEGORY = "GAG/demo"
DemoText = io.Custom("GAG_DEMO_TEXT")


class GAGDemoLoader(io.ComfyNode):
    """A demo model, its text encoder and its (trivial) VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGDemoLoader",
            display_name="GAG demo",
            category=CATEGORY,
            description=f"A tiny text-to-image model, {SIZE}x{SIZE} pixels, that knows coloured shapes. It comes with "
            "the pack and runs in seconds on any machine.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(WEIGHTS),
                    default="standard",
                    optional=True,
                    tooltip="standard draws in 8 to 20 steps and follows the prompt better with cfg 3 to 5. few-step "
                    "was made from it and draws in 4 steps without CFG, as Turbo and Lightning models do: steps 4, "
                    "cfg 1. transformer is of Flux's kind, in which text and picture share one attention: settings "
                    "as for standard.",
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


class GAGDemoPrompt(io.ComfyNode):
    """Encodes a prompt for the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGDemoPrompt",
            display_name="GAG demo prompt",
            category=CATEGORY,
            description="Encodes a prompt for the demo model.",
            inputs=[
                DemoText.Input("text_encoder", tooltip="From GAG demo."),
                io.String.Input(
                    "text",
                    default="a red circle left of a blue square",
                    multiline=True,
                    tooltip="One to three shapes: red, green, blue, yellow, purple or white circles, squares, "
                    "triangles or crosses, left of, right of, above or below others. Leave it empty for the "
                    "negative prompt.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For the sampler.")],
        )

    @classmethod
    def execute(cls, text_encoder: DemoTextEncoder, text: str) -> io.NodeOutput:
        # Flux wants a pooled text; UNets of this kind do not look at it.
        pooled = torch.zeros(1, POOLED)
        return io.NodeOutput([[text_encoder.encode([text]), {"pooled_output": pooled}]])


class GAGDemoEmptyLatent(io.ComfyNode):
    """An empty latent of the demo model's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGDemoEmptyLatent",
            display_name="GAG demo empty latent",
            category=CATEGORY,
            description="An empty picture of the demo model's size, for the sampler to fill.",
            inputs=[
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures to make in one run."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler.")],
        )

    @classmethod
    def execute(cls, batch_size: int) -> io.NodeOutput:
        device = comfy.model_management.intermediate_device()
        latent: dict[str, Any] = {"samples": torch.zeros(batch_size, CHANNELS, SIZE, SIZE, device=device)}
        return io.NodeOutput(latent)
