# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes for the soak test, which its server loads: tiny transformers of the host's own classes, and digests of results.

The loader makes a new model each time it runs, as loaders of checkpoints do. So memory grows if a model is not freed.
"""

from __future__ import annotations

import gc
import hashlib
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams

_WIDTH = 64
_FLUX = {
    "image_model": "flux",
    "axes_dim": [4, 6, 6],
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "theta": 10000,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "qkv_bias": True,
    "hidden_size": 32,
    "context_in_dim": _WIDTH,
    "vec_in_dim": 48,
    "depth": 2,
    "depth_single_blocks": 2,
    "guidance_embed": True,
    # Later hosts require the dimensions of positions that the text uses.
    **({"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}),
}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 128,
    "out_dim": 16,
    "in_dim": 16,
    "num_heads": 2,
    "ffn_dim": 64,
    "num_layers": 2,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "text_dim": _WIDTH,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {"flux": ("Flux", _FLUX), "wan": ("WAN21_T2V", _WAN)}
_LATENTS = {"flux": (1, 16, 8, 8), "wan": (1, 16, 2, 8, 8)}
_NAME = {"required": {"name": (list(_MODELS),)}}


class _Node:
    CATEGORY = "GAG/tests"
    FUNCTION = "run"


class SoakModel(_Node):
    """Load a model of a family with seeded weights."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return _NAME

    def run(self, name: str) -> tuple[Any]:
        class_name, config = _MODELS[name]
        configured = getattr(comfy.supported_models, class_name)(dict(config))
        configured.set_inference_dtype(torch.float32, None)
        model = configured.get_model({}, "")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter_name, parameter in sorted(model.diffusion_model.named_parameters()):
                if parameter.ndim >= 2:
                    std = parameter[0].numel() ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                else:
                    parameter.fill_(1.0 if parameter_name.endswith(("weight", "scale")) else 0.0)
        model.eval()
        load, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        return (comfy.model_patcher.ModelPatcher(model, load_device=load, offload_device=offload),)


class SoakPrompt(_Node):
    """Make a random prompt."""

    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"seed": ("INT", {"max": 10**9}), "tokens": ("INT", {"max": 1000})}}

    def run(self, seed: int, tokens: int) -> tuple[Any]:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, _WIDTH, generator=generator)
        return ([[text, {"pooled_output": torch.randn(1, 48, generator=generator)}]],)


class SoakLatent(_Node):
    """Make an empty latent for a model."""

    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return _NAME

    def run(self, name: str) -> tuple[Any]:
        return ({"samples": torch.zeros(_LATENTS[name])},)


class SoakDigest(_Node):
    """Output a digest of a latent's bits. ``tidy`` collects garbage first, so that only referenced objects remain."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"samples": ("LATENT",), "tidy": ("BOOLEAN", {"default": False})}}

    def run(self, samples: dict[str, Any], tidy: bool) -> dict[str, Any]:
        if tidy:
            gc.collect()
        latent = samples["samples"].contiguous()
        digest = hashlib.sha256(latent.numpy().tobytes()).hexdigest()
        return {"ui": {"digest": [digest], "finite": [bool(torch.isfinite(latent).all())]}}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (SoakModel, SoakPrompt, SoakLatent, SoakDigest)}
