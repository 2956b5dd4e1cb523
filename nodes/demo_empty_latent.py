# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG demo empty latent": an empty picture of the demo models' size."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from .demo.architecture import CHANNELS, SIZE
from .demo_loader import DEMO_CATEGORY
from .input_checks import check_whole

_MOST_PICTURES = 64


class GAGDemoEmptyLatent(io.ComfyNode):
    """Node that makes an empty latent of the demo models' size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGDemoEmptyLatent",
            display_name="GAG demo empty latent",
            category=DEMO_CATEGORY,
            description="An empty picture of the demo model's size, for the sampler to fill.",
            inputs=[
                io.Int.Input(
                    "batch_size", default=1, min=1, max=_MOST_PICTURES, tooltip="Number of pictures to make in one run."
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler.")],
        )

    @classmethod
    def execute(cls, batch_size: int) -> io.NodeOutput:
        check_whole("batch_size", batch_size, 1, _MOST_PICTURES)
        device = comfy.model_management.intermediate_device()
        latent: dict[str, Any] = {"samples": torch.zeros(batch_size, CHANNELS, SIZE, SIZE, device=device)}
        return io.NodeOutput(latent)
