# SPDX-License-Identifier: GPL-3.0-or-later
"""Tiny CLIP models of the host's own classes, with random weights, loaded by the host's own loaders.

Only sizes are passed to the loaders, because ComfyUI has the usual sizes built in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

import host_process as host

WIDTH = 64
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**LAYERS, "hidden_size": WIDTH}
VISION = {
    **LAYERS, "hidden_size": WIDTH, "image_size": 28, "patch_size": 14, "num_channels": 3,
    "hidden_act": "quick_gelu", "model_type": "clip_vision_model",
    "projection_dim": WIDTH,
}  # fmt: skip
_REST = {"hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407}


def text_model(config: dict[str, Any]) -> torch.nn.Module:
    """Return ComfyUI's text model, without weights."""
    model: torch.nn.Module = comfy.clip_model.CLIPTextModel(
        {**config, **_REST}, torch.float32, "cpu", comfy.ops.manual_cast
    )
    return model


def vision_model(config: dict[str, Any] = VISION) -> torch.nn.Module:
    """Return ComfyUI's vision model, without weights."""
    model: torch.nn.Module = comfy.clip_model.CLIPVisionModelProjection(
        config, torch.float32, "cpu", comfy.ops.manual_cast
    )
    return model


def filled(module: torch.nn.Module, seed: int, prefix: str = "") -> dict[str, Tensor]:
    """Return random weights of a model in half precision."""
    host.fill(module, seed)
    return {prefix + name: tensor.half().contiguous().clone() for name, tensor in module.state_dict().items()}


def load_text(weights: dict[str, Tensor]) -> Any:
    """Return the CLIP that Load CLIP makes of a file with these weights."""
    width = weights["text_model.final_layer_norm.weight"].shape[0]
    return comfy.sd.load_text_encoder_state_dicts(
        [dict(weights)],
        clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION,
        model_options={"model_config": {**TEXT, "hidden_size": width}},
    )


def load_vision(weights: dict[str, Tensor], folder: Path, config: dict[str, Any] = VISION) -> Any:
    """Return the CLIP_VISION that Load CLIP Vision makes of a file with these weights."""
    file = folder / "vision.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    model = comfy.clip_vision.ClipVisionModel(str(file))
    missing, _ = model.load_sd(weights)
    assert not missing
    return model
