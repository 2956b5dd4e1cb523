# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG demo prompt": encodes a prompt for a demo model."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..gag_core.echo import plain
from .demo.architecture import POOLED
from .demo.text_encoder import DemoTextEncoder
from .demo_loader import DEMO_CATEGORY, DemoText
from .input_checks import check_text


class GAGDemoPrompt(io.ComfyNode):
    """Node that encodes a prompt for a demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGDemoPrompt",
            display_name="GAG demo prompt",
            category=DEMO_CATEGORY,
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
        if not isinstance(text_encoder, DemoTextEncoder):
            raise TypeError(f"text_encoder must come from GAG demo, got {plain(type(text_encoder).__name__)}.")
        check_text("text", text)
        # Flux requires a pooled text. The demo UNets ignore it.
        pooled = torch.zeros(1, POOLED)
        return io.NodeOutput([[text_encoder.encode([text]), {"pooled_output": pooled}]])
