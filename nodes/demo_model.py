# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo model: ComfyUI's own UNet in pixel space, and a two-layer text encoder over a vocabulary of 16 words."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent.parent / "assets" / "tiny_shapes.safetensors"
SIZE = 32
CHANNELS = 3
_PATCH = 4
_TOKENS = 77
_WIDTH = 64
_TEXT_HEADS = 4
_SPECIAL = ("<pad>", "<bos>", "<eos>")
_WORDS = (
    *("a", "of", "red", "green", "blue", "yellow", "circle", "square", "triangle"),
    *("left", "right", "above", "below"),
)
_VOCABULARY = {word: number for number, word in enumerate((*_SPECIAL, *_WORDS))}

_UNET_CONFIG: dict[str, Any] = {
    "image_size": SIZE // _PATCH,
    "in_channels": CHANNELS * _PATCH**2,
    "out_channels": CHANNELS * _PATCH**2,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [0, 1, 0, 1],
    "transformer_depth_middle": 1,
    "context_dim": _WIDTH,
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


class _PixelUNet(UNetModel):
    """The host's UNet over patches of pixels."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(nn.functional.pixel_unshuffle(x, _PATCH), *args, **kwargs)
        return nn.functional.pixel_shuffle(out, _PATCH)


class _PixelLatent(comfy.latent_formats.LatentFormat):
    """Pictures in -1..1, shifted and scaled to what the model was trained on."""

    latent_channels = CHANNELS

    def process_in(self, latent: Tensor) -> Tensor:
        return ((latent + 1.0) / 2.0 - 0.25) * 4.0

    def process_out(self, latent: Tensor) -> Tensor:
        return (latent / 4.0 + 0.25) * 2.0 - 1.0


class _Config(comfy.supported_models_base.BASE):
    unet_config = _UNET_CONFIG
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = _PixelLatent


class _TextBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.o = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.f1, self.f2 = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (_TEXT_HEADS, -1)).transpose(1, 2) for part in self.qkv(self.n1(x)).chunk(3, dim=-1)
        )
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.f2(nn.functional.gelu(self.f1(self.n2(x))))


class DemoTextEncoder(nn.Module):
    """Prompt to context: words of a fixed vocabulary, padded to 77 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(len(_VOCABULARY), _WIDTH)
        self.pos = nn.Parameter(torch.zeros(_TOKENS, _WIDTH))
        self.blocks = nn.ModuleList(_TextBlock() for _ in range(2))
        self.norm = nn.LayerNorm(_WIDTH)

    def encode(self, text: str) -> Tensor:
        """The context ``[1, 77, 64]`` in fp32 of a prompt; an empty one is the unconditional context.

        Raises:
            ValueError: a word the model does not know, or too many words.
        """
        words = text.lower().replace(",", " ").split()
        unknown = [word for word in words if word not in _WORDS]
        if unknown:
            named = ", ".join(map(repr, unknown))
            raise ValueError(f"The demo model does not know {named}; it knows {', '.join(_WORDS)}.")
        most = _TOKENS - 2
        if len(words) > most:
            raise ValueError(f"The demo model reads up to {most} words, got {len(words)}.")
        tokens = ["<bos>", *words, "<eos>"]
        tokens += ["<pad>"] * (_TOKENS - len(tokens))
        with torch.no_grad():
            x = self.table(torch.tensor([[_VOCABULARY[token] for token in tokens]])) + self.pos
            for block in self.blocks:
                x = block(x)
            out: Tensor = self.norm(x)
        return out


def load_demo() -> tuple[Any, DemoTextEncoder, Any]:
    """The demo's ModelPatcher, text encoder and VAE."""
    weights = comfy.utils.load_torch_file(str(WEIGHTS), safe_load=True)
    config = _Config(_UNET_CONFIG)
    config.set_inference_dtype(torch.float32, None)
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    model = comfy.model_base.BaseModel(
        config, model_type=comfy.model_base.ModelType.V_PREDICTION, device=offload_device, unet_model=_PixelUNet
    )
    model.load_model_weights(weights, "unet.")
    encoder = DemoTextEncoder().eval()
    encoder.load_state_dict({k.removeprefix("text."): v.float() for k, v in weights.items() if k.startswith("text.")})
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)
    return patcher, encoder, vae
