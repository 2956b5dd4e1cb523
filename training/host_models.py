# SPDX-License-Identifier: GPL-3.0-or-later
"""A trainable UNet of ComfyUI's own class, and both models as the pack loads them.

Importing this module puts ComfyUI on ``sys.path`` and sets it to the CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

import pack
from comfy_host import find_host

if str(find_host()) not in sys.path:
    sys.path.insert(0, str(find_host()))

from comfy.cli_args import args

args.cpu = True  # before comfy.model_management is imported, which looks for devices then

import comfy.ldm.modules.attention  # noqa: E402

_demo_model = pack.module(pack.DEMO_MODELS)
load_in_host = _demo_model.load_in_host


class _Trainable:
    """PyTorch's own layers in place of ComfyUI's, which skip their initialisation."""

    Linear = nn.Linear
    Conv2d = nn.Conv2d
    GroupNorm = nn.GroupNorm
    LayerNorm = nn.LayerNorm

    @staticmethod
    def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
        """Return a convolution over two dimensions; no others are used."""
        assert dims == 2
        return nn.Conv2d(*args, **kwargs)


def trainable_unet() -> nn.Module:
    """Return a newly initialised UNet that can be differentiated; its residual branches start at zero."""
    # ComfyUI's chunked attention for CPUs writes into its scores in place. In bfloat16 scaled_dot_product_attention
    # takes four times as long as attention_basic, above all backward.
    comfy.ldm.modules.attention.optimized_attention = comfy.ldm.modules.attention.attention_basic
    model: nn.Module = _demo_model.PixelUNet(**_demo_model.UNET_CONFIG, operations=_Trainable)
    for name, module in model.named_modules():
        if name.endswith(("out_layers.3", "proj_out", "out.2")) and isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    made: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made
