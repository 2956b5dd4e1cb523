# SPDX-License-Identifier: GPL-3.0-or-later
"""Stand-ins for the model files that the workflows name: tiny models of the right class with random weights.

ComfyUI recognises a model's class by the names and shapes in its file. Image models and VAEs are the smallest that it
recognises as the right class. Text encoders have only one size: the CLIPs are written with holes in the file, where all
weights are zero, and the T5 and language models are too large for that.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import host_process as host  # starts ComfyUI, which the imports below need

# isort: split
import comfy.cldm.cldm
import comfy.ldm.wan.vae
import comfy.ops
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.taesd.taesd
import torch
from torch import Tensor

# Tensors by name. A shape stands for a tensor of zeros.
Weights = dict[str, "Tensor | torch.Size"]

_UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_temporal_attention": False,
}
_SD15 = {
    **_UNET,
    "adm_in_channels": None,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 768,
}
# ComfyUI recognises SDXL by the depths of its transformers; these are the smallest that it recognises (KOALA).
_SDXL = {
    **_UNET,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 2, 5],
    "transformer_depth_output": [0, 0, 2, 2, 5, 5],
    "transformer_depth_middle": 5,
    "use_linear_in_transformer": True,
    "num_head_channels": 64,
    "context_dim": 2048,
}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 256,
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
    "text_dim": 4096,
}


def sd15() -> Weights:
    """Return a checkpoint of SD1.5."""
    clip = {name.removeprefix("clip_l."): w for name, w in _clip(comfy.sd1_clip.SD1ClipModel).items()}
    return {
        **_named("model.diffusion_model.", _unet("SD15", _SD15)),
        **_named("first_stage_model.", _tiny_autoencoder(4)),
        **_named("cond_stage_model.", clip),
    }


def sdxl() -> Weights:
    """Return a checkpoint that ComfyUI recognises as SDXL."""
    return {
        **_named("model.diffusion_model.", _unet("SDXL", _SDXL)),
        **_named("first_stage_model.", _tiny_autoencoder(4)),
        **{
            name.replace("clip_l.", "conditioner.embedders.0.").replace("clip_g.", "conditioner.embedders.1.model."): w
            for name, w in _clip(comfy.sdxl_clip.SDXLClipModel).items()
        },
    }


def sdxl_lora() -> Weights:
    """Return a LoRA that fits ``sdxl``."""
    down, up = torch.randn(2, 2048) / 45, torch.randn(320, 2)
    name = "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k"
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def sdxl_control_lora() -> Weights:
    """Return a control LoRA that fits ``sdxl``: the weights of a ControlNet that are not a copy of the model's own."""
    config = {**_SDXL, "hint_channels": 3, "operations": comfy.ops.disable_weight_init}
    config.pop("out_channels")
    net = comfy.cldm.cldm.ControlNet(**config)
    host.fill(net, 5)
    own = ("input_hint_block.", "zero_convs.", "middle_block_out.")
    weights: Weights = {name: w for name, w in net.state_dict().items() if name.startswith(own)}
    return {"lora_controlnet": torch.zeros(1), **weights}


def wan(seed: int) -> Weights:
    """Return the diffusion model of Wan 2.1 and 2.2."""
    return dict(host.build("WAN21_T2V", _WAN, seed).model.diffusion_model.state_dict())


def wan_vae() -> Weights:
    """Return the VAE of Wan 2.1."""
    dim = 8 if host.version_of(host.VERSION) >= (0, 3, 75) else 96  # earlier hosts do not read it from the file
    vae = comfy.ldm.wan.vae.WanVAE(dim=dim, z_dim=16, num_res_blocks=2, temperal_downsample=[False, True, True])
    host.fill(vae, 6)
    return dict(vae.state_dict())


FILES: Mapping[str, Callable[[], Weights]] = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": sd15,
    "checkpoints/sd_xl_base_1.0.safetensors": sdxl,
    "loras/sdxl_lightning_4step_lora.safetensors": sdxl_lora,
    "controlnet/control-lora-canny-rank256.safetensors": sdxl_control_lora,
    "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors": lambda: wan(1),
    "vae/wan_2.1_vae.safetensors": wan_vae,
}


def write(path: Path, weights: Weights) -> None:
    """Write a safetensors file in half precision, with holes where tensors are zero."""
    header: dict[str, Any] = {}
    end = 0
    for name, weight in weights.items():
        shape = weight.shape if isinstance(weight, Tensor) else weight
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data = file.tell()
        file.truncate(data + end)
        for name, weight in weights.items():
            if isinstance(weight, Tensor):
                file.seek(data + header[name]["data_offsets"][0])
                file.write(weight.detach().half().contiguous().numpy().tobytes())


def _unet(class_name: str, config: dict[str, Any]) -> Weights:
    return dict(host.build(class_name, config).model.diffusion_model.state_dict())


def _tiny_autoencoder(channels: int) -> Weights:
    autoencoder = comfy.taesd.taesd.TAESD(latent_channels=channels)
    host.fill(autoencoder, 4)
    return dict(autoencoder.state_dict())


def _clip(model: Callable[..., torch.nn.Module]) -> Weights:
    """Return CLIPs whose layers pass their input on: the random vectors of each token and of each position."""
    shapes = {name: weight.shape for name, weight in model(device="meta").state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    weights: Weights = {}
    for name, shape in shapes.items():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            weights[name] = torch.randn(shape, generator=generator)
        elif "norm" in name and name.endswith(".weight"):
            weights[name] = torch.ones(shape)
        else:
            weights[name] = shape
    return weights


def _named(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: weight for name, weight in weights.items()}
