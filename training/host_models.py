# SPDX-License-Identifier: GPL-3.0-or-later
"""The UNet of ComfyUI's own class so that it can be trained, and both models as the pack loads them.

Importing this module puts the host on ``sys.path`` and sets it to the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from training import pack_module
from training.mmdit import CONFIG as MMDIT_CONFIG

sys.path.insert(0, str(Path(__file__).parents[1] / "dev"))

from comfy_host import find_host

if str(find_host()) not in sys.path:
    sys.path.insert(0, str(find_host()))

from comfy.cli_args import args

args.cpu = True  # before comfy.model_management is imported, which looks for devices then

import comfy.ldm.modules.attention  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.supported_models_base  # noqa: E402

_demo_model = pack_module("demo_model")


class _MMDiTSettings(comfy.supported_models_base.BASE):
    unet_config = MMDIT_CONFIG
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 0.0}  # of log odds: none
    latent_format = _demo_model.PixelLatent


def load_in_host(name: str, weights: dict[str, Tensor]) -> Any:
    """The host's ModelPatcher of ``unet`` or ``mmdit``, in fp32, with the weights whose keys have that prefix."""
    if name == "unet":
        return _demo_model.load_in_host(weights)
    settings: Any = _MMDiTSettings(dict(MMDIT_CONFIG))
    settings.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.unet_offload_device()
    model = comfy.model_base.Flux(settings, model_type=comfy.model_base.ModelType.FLUX, device=device)
    return _demo_model.patcher_of(model, name, weights)


class _Trainable:
    """PyTorch's own layers for the host's classes, whose layers skip their initialisation."""

    Linear = nn.Linear
    Conv2d = nn.Conv2d
    GroupNorm = nn.GroupNorm
    LayerNorm = nn.LayerNorm

    @staticmethod
    def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
        """A convolution over two dimensions, the only ones used."""
        assert dims == 2
        return nn.Conv2d(*args, **kwargs)


def trainable_unet() -> nn.Module:
    """A freshly initialised UNet that can be differentiated; residual branches begin at zero."""
    # The chunked attention that the host takes on CPUs writes into its scores in place; scaled_dot_product_attention
    # takes four times as long as this one in bfloat16, backward above all.
    comfy.ldm.modules.attention.optimized_attention = comfy.ldm.modules.attention.attention_basic
    model: nn.Module = _demo_model.PixelUNet(**_demo_model.UNET_CONFIG, operations=_Trainable)
    for name, module in model.named_modules():
        if name.endswith(("out_layers.3", "proj_out", "out.2")) and isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    made: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made
