# SPDX-License-Identifier: GPL-3.0-or-later
"""How ComfyUI's own classes are configured to hold the two models, and the host's side of both.

Importing this module puts the host on ``sys.path`` and sets it to the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from training.mmdit import CONFIG as MMDIT_CONFIG
from training.pictures import SIZE
from training.text import WIDTH

sys.path.insert(0, str(Path(__file__).parents[1] / "dev"))

from comfy_host import find_host

if str(find_host()) not in sys.path:
    sys.path.insert(0, str(find_host()))

from comfy.cli_args import args

args.cpu = True  # before comfy.model_management is imported, which looks for devices then

import comfy.latent_formats  # noqa: E402
import comfy.ldm.flux.model  # noqa: E402
import comfy.ldm.modules.attention  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models_base  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

CHANNELS = 3
PATCH = 4
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


class PixelUNet(UNetModel):
    """The host's UNet over patches of pixels."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, 3, 32, 32]`` to the same."""
        out = super().forward(nn.functional.pixel_unshuffle(x, PATCH), *args, **kwargs)
        return nn.functional.pixel_shuffle(out, PATCH)


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
    # The chunked attention that the host takes on CPUs writes into its scores in place.
    comfy.ldm.modules.attention.optimized_attention = comfy.ldm.modules.attention.attention_pytorch
    model = PixelUNet(**UNET_CONFIG, operations=_Trainable)
    for name, module in model.named_modules():
        if name.endswith(("out_layers.3", "proj_out", "out.2")) and isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return model.to(memory_format=torch.channels_last)


class PixelLatent(comfy.latent_formats.LatentFormat):
    """Pictures in -1..1 to what the models were trained on: (picture in 0..1 - 0.25) * 4, see training.schedules."""

    latent_channels = CHANNELS

    def process_in(self, latent: Tensor) -> Tensor:
        """From the host's pixel space."""
        return ((latent + 1.0) / 2.0 - 0.25) * 4.0

    def process_out(self, latent: Tensor) -> Tensor:
        """To the host's pixel space."""
        return (latent / 4.0 + 0.25) * 2.0 - 1.0


class _UNetSettings(comfy.supported_models_base.BASE):
    unet_config = UNET_CONFIG
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = PixelLatent


class _MMDiTSettings(comfy.supported_models_base.BASE):
    unet_config = MMDIT_CONFIG
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 0.0}  # of log odds: none
    latent_format = PixelLatent


def load_in_host(name: str, weights: dict[str, Tensor]) -> Any:
    """The host's ModelPatcher of ``unet`` or ``mmdit`` with exported weights (keys with that prefix), in fp32."""
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    settings: Any
    if name == "unet":
        settings = _UNetSettings(UNET_CONFIG)
        settings.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.BaseModel(
            settings, model_type=comfy.model_base.ModelType.V_PREDICTION, device=offload_device, unet_model=PixelUNet
        )
    else:
        settings = _MMDiTSettings(dict(MMDIT_CONFIG))
        settings.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.Flux(settings, model_type=comfy.model_base.ModelType.FLUX, device=offload_device)
    model.load_model_weights(dict(weights), f"{name}.")
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)
