# SPDX-License-Identifier: GPL-3.0-or-later
"""Tiny transformers of the host's own classes, one per family, and where their attention reads the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import comfy.sample
import torch
from torch import Tensor

import host_process as host

WIDTH = 64


@dataclass(frozen=True)
class Tiny:
    """A model's class and configuration, and the facts that its tests check.

    ``guided`` is the number of text attentions. In a joint sequence the text comes first or last, behind
    ``before_text`` tokens of the model's own, and padded to ``padded_to``: at its front, or, where the padding is
    refined with it, at its end, and the image to a multiple of that as well. ``text_first`` None is a family with text
    cross-attention, whose calls come from modules named ``text_modules``.
    """

    class_name: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    guided: int
    text_first: bool | None = True
    before_text: int = 0
    padded_to: int = 0
    padding_is_refined: bool = False
    text_modules: str = ""
    cond: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> Any:
        return host.build(self.class_name, self.config, seed)

    def prompt(self, seed: int, tokens: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        return [[torch.randn(1, tokens, WIDTH, generator=generator), dict(self.cond)]]

    def text(self, sequence: int, tokens: int) -> slice:
        """The text with its padding in a joint sequence of a length."""
        if self.text_first:
            return slice(self.before_text, self.before_text + max(tokens, self.padded_to))
        return slice(sequence - tokens, sequence)

    def words(self, sequence: int, tokens: int) -> slice:
        """The tokens that a prompt changes: the text without padding that no refiner has touched."""
        text = self.text(sequence, tokens)
        return text if self.padding_is_refined else slice(text.stop - tokens, text.stop)

    def image_tokens(self) -> int:
        """How many tokens of the sequence the noise changes."""
        *frames, height, width = self.latent[1:]
        area = height * width // (1 if self.class_name in ("Flux2", "LTXV") else 4)
        tokens = area * (frames[0] if frames else 1)
        return -(-tokens // self.padded_to) * self.padded_to if self.padding_is_refined else tokens

    def sample(self, model: Any, *, tokens: int = 12, cfg: float = 1.0, seed: int = 1, prompt: int = 10) -> Tensor:
        latent = torch.zeros(1, *self.latent)
        out: Tensor = comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, seed),
            2,
            cfg,
            "euler",
            "simple",
            self.prompt(prompt, tokens),
            self.prompt(11, tokens),
            latent,
            disable_pbar=True,
            seed=seed,
        )
        return out


_FLUX = dict(host.CONFIGS["flux"][1])
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
    "text_dim": WIDTH,
}
_SD3: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 48,
    "num_patches": 64 * 64,
    "pos_embed_max_size": 64,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": WIDTH, "out_features": 128},
    },
    "x_block_self_attn_layers": [],
}
_LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 32,
    "cap_feat_dim": WIDTH,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "axes_dims": [4, 6, 6],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 16,
}
_POOLED = {"pooled_output": torch.zeros(1, 48)}
_PICTURE = SimpleNamespace(
    penultimate_hidden_states=torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(2))
)

TRANSFORMERS = {
    "flux": Tiny("Flux", _FLUX, (16, 8, 8), 5, cond=_POOLED),
    "flux2": Tiny(
        "Flux2",
        {
            **_FLUX,
            "image_model": "flux2",
            "axes_dim": [4, 4, 4, 4],
            "mlp_ratio": 3.0,
            "theta": 2000,
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "qkv_bias": False,
            "ops_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "vec_in_dim": None,
        },
        (128, 4, 4),
        5,
        padded_to=512,
        cond={"pooled_output": None},
    ),
    "chroma": Tiny(
        "Chroma",
        {
            **{k: v for k, v in _FLUX.items() if k not in ("vec_in_dim", "guidance_embed")},
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 32,
            "hidden_dim": 32,
            "n_layers": 1,
        },
        (16, 8, 8),
        5,
        cond={"pooled_output": None},
    ),
    "sd3": Tiny("SD3", _SD3, (16, 8, 8), 2, cond=_POOLED),
    "sd3.5-medium": Tiny("SD3", {**_SD3, "x_block_self_attn_layers": [0]}, (16, 8, 8), 2, cond=_POOLED),
    "auraflow": Tiny(
        "AuraFlow",
        {
            "cond_seq_dim": WIDTH,
            "dim": 64,
            "n_heads": 2,
            "n_layers": 4,
            "n_double_layers": 2,
            "global_conddim": 32,
            "max_seq": 64,
        },
        (4, 8, 8),
        4,
        before_text=8,
    ),
    "qwen-image": Tiny(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (4, 6, 6),
        },
        (16, 1, 8, 8),
        2,
    ),
    "hunyuan-video": Tiny(
        "HunyuanVideo",
        {
            "image_model": "hunyuan_video",
            "in_channels": 16,
            "patch_size": [1, 2, 2],
            "out_channels": 16,
            "vec_in_dim": 48,
            "axes_dim": [4, 6, 6],
            "meanflow": False,
            "context_in_dim": WIDTH,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 2,
            "theta": 256,
            "qkv_bias": True,
            "byt5": False,
            "guidance_embed": True,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
        },
        (16, 2, 8, 8),
        3,
        text_first=False,
        cond=_POOLED,
    ),
    "wan-t2v": Tiny("WAN21_T2V", _WAN, (16, 2, 8, 8), 2, text_first=None, text_modules="cross_attn"),
    "wan-i2v": Tiny(
        "WAN21_I2V",
        {**_WAN, "model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": None},
        (16, 2, 8, 8),
        2,
        text_first=None,
        text_modules="cross_attn",
        cond={"clip_vision_output": _PICTURE},
    ),
    "ltx-video": Tiny(
        "LTXV",
        {
            "image_model": "ltxv",
            "in_channels": 16,
            "cross_attention_dim": 32,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": WIDTH,
            "num_layers": 2,
        },
        (16, 2, 4, 4),
        2,
        text_first=None,
        text_modules="attn2",
        cond={"attention_mask": torch.tensor([[1] * 10 + [0] * 2])},
    ),
    "lumina2": Tiny("Lumina2", _LUMINA, (16, 8, 8), 2, cond={"num_tokens": 12}),
    "z-image": Tiny(
        "ZImage",
        {
            **_LUMINA,
            "dim": 256,
            "n_heads": 16,
            "n_kv_heads": 16,
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        (16, 8, 8),
        2,
        padded_to=32,
        padding_is_refined=True,
        cond={"num_tokens": 12},
    ),
    "cosmos-predict2": Tiny(
        "CosmosT2IPredict2",
        {
            "image_model": "cosmos_predict2",
            "max_img_h": 240,
            "max_img_w": 240,
            "max_frames": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 64,
            "num_blocks": 2,
            "num_heads": 2,
            "crossattn_emb_channels": WIDTH,
            "pos_emb_cls": "rope3d",
            "use_adaln_lora": True,
            "adaln_lora_dim": 16,
        },
        (16, 1, 8, 8),
        2,
        text_first=None,
        text_modules="cross_attn",
    ),
}
