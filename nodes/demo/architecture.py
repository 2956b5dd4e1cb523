# SPDX-License-Identifier: GPL-3.0-or-later
"""Architecture of the demo models: sizes, and the settings of ComfyUI's model classes. Imports nothing of ComfyUI.

The training imports this file too, so that the trained and the shipped models cannot differ.
"""

from __future__ import annotations

from typing import Any

SIZE = 32
CHANNELS = 3
PATCH = 4
TOKENS = 77
WIDTH = 96
POOLED = 4
# Pixels of a picture for each value of a latent, along each side: as in most models, so that Empty Latent Image fits.
PIXELS_PER_VALUE = 8
PIXELS = SIZE * PIXELS_PER_VALUE

UNET_CONFIG: dict[str, Any] = {
    "image_size": SIZE // PATCH,
    "in_channels": CHANNELS * PATCH**2,
    "out_channels": CHANNELS * PATCH**2,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [0, 1, 0, 1],
    "transformer_depth_middle": 1,
    "context_dim": WIDTH,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_checkpoint": False,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
# A minimal Flux.1: text and image tokens share one attention, first with separate weights, then with common ones.
TRANSFORMER_CONFIG: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": PATCH,
    "hidden_size": 96,
    "num_heads": 3,
    "mlp_ratio": 3.0,
    "depth": 2,
    "depth_single_blocks": 4,
    "context_in_dim": WIDTH,
    "vec_in_dim": POOLED,  # ComfyUI's class requires a pooled text; here it is always zero
    "axes_dim": [8, 12, 12],
    "theta": 100,  # with 8 tokens along an axis the slowest angle still turns visibly
    "qkv_bias": True,
    "guidance_embed": False,
}
