# SPDX-License-Identifier: GPL-3.0-or-later
"""A small joint-attention transformer over image and text tokens, in PyTorch alone and with autograd.

Weights have the names of ComfyUI's ``comfy.ldm.flux.model.Flux``, and both classes give the same output for the same
weights (tests/training). ComfyUI's class adds in place, which cannot be differentiated.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from training import demo_architecture

CONFIG = demo_architecture.TRANSFORMER_CONFIG
_HIDDEN: int = CONFIG["hidden_size"]
_HEADS: int = CONFIG["num_heads"]
_MLP = int(_HIDDEN * CONFIG["mlp_ratio"])
_PATCH: int = CONFIG["patch_size"]
_PIXELS = CONFIG["in_channels"] * _PATCH**2


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(_HIDDEN // _HEADS))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.scale.shape, self.scale, 1e-6)


class _Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = _Norm(), _Norm()

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``[B, N, 3 * hidden]`` into queries, keys and values ``[B, heads, N, d]``."""
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=_HEADS)
        return self.query_norm(q), self.key_norm(k), v


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(_HIDDEN, 3 * _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN)
        self.norm = _Norms()


class _Modulation(nn.Module):
    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(_HIDDEN, parts * _HIDDEN)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(nn.functional.silu(vec))[:, None].chunk(self.parts, dim=-1)


class _Embedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(width, _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(nn.functional.silu(self.in_layer(x)))


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(_HIDDEN, _MLP), nn.GELU(approximate="tanh"), nn.Linear(_MLP, _HIDDEN))


def _normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (_HIDDEN,), eps=1e-6) * (1 + scale) + shift


def _attend(q: Tensor, k: Tensor, v: Tensor, rotations: Tensor) -> Tensor:
    # For so few tokens this is faster on a CPU than scaled_dot_product_attention, above all backward.
    logits = _rotate(q * q.shape[-1] ** -0.5, rotations) @ _rotate(k, rotations).transpose(-1, -2)
    return rearrange(logits.softmax(-1) @ v, "b h n d -> b n (h d)")


def _rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Apply a rotary embedding, complex unit numbers ``[N, d / 2]``, to neighbouring pairs of ``[B, heads, N, d]``."""
    real, imaginary = rearrange(x, "... (pairs two) -> two ... pairs", two=2)  # complex products would not be compiled
    cos, sin = rotations.real, rotations.imag
    rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return rearrange(rotated, "... pairs two -> ... (pairs two)")


class _Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = _Modulation(6), _Modulation(6)
        self.img_attn, self.txt_attn = _Attention(), _Attention()
        self.img_mlp, self.txt_mlp = _mlp(), _mlp()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2 = self.img_mod(vec)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = self.txt_mod(vec)
        i_parts = self.img_attn.norm.split(self.img_attn.qkv(_normed(img, i_shift, i_scale)))
        t_parts = self.txt_attn.norm.split(self.txt_attn.qkv(_normed(txt, t_shift, t_scale)))
        q, k, v = (torch.cat((t, i), dim=2) for t, i in zip(t_parts, i_parts, strict=True))
        attended = _attend(q, k, v, rotations)
        img = img + i_gate * self.img_attn.proj(attended[:, txt.shape[1] :])
        img = img + i_gate2 * self.img_mlp(_normed(img, i_shift2, i_scale2))
        txt = txt + t_gate * self.txt_attn.proj(attended[:, : txt.shape[1]])
        return img, txt + t_gate2 * self.txt_mlp(_normed(txt, t_shift2, t_scale2))


class _Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(_HIDDEN, 3 * _HIDDEN + _MLP), nn.Linear(_HIDDEN + _MLP, _HIDDEN)
        self.norm, self.modulation = _Norms(), _Modulation(3)

    def forward(self, x: Tensor, vec: Tensor, rotations: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(_normed(x, shift, scale)).split((3 * _HIDDEN, _MLP), dim=-1)
        attended = _attend(*self.norm.split(qkv), rotations)
        return x + gate * self.linear2(torch.cat((attended, nn.functional.gelu(mlp, approximate="tanh")), dim=-1))


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_HIDDEN, _PIXELS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(_HIDDEN, 2 * _HIDDEN))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(_normed(x, shift, scale))


class MMDiT(nn.Module):
    """Predicts the velocity (noise - picture) ``[B, 3, H, W]`` from a noised picture, its noise level and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(_PIXELS, _HIDDEN), nn.Linear(demo_architecture.WIDTH, _HIDDEN)
        self.time_in, self.vector_in = _Embedder(256), _Embedder(CONFIG["vec_in_dim"])
        self.double_blocks = nn.ModuleList(_Double() for _ in range(CONFIG["depth"]))
        self.single_blocks = nn.ModuleList(_Single() for _ in range(CONFIG["depth_single_blocks"]))
        self.final_layer = _Last()
        # Every block starts as the identity.
        for name, module in self.named_modules():
            if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")) and isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Return the velocity of ``x`` ``[B, 3, H, W]``; noise levels 0..1 ``[B]``, ``context`` ``[B, 77, WIDTH]``."""
        height, width = x.shape[-2] // _PATCH, x.shape[-1] // _PATCH
        img = self.img_in(rearrange(nn.functional.pixel_unshuffle(x, _PATCH), "b c h w -> b (h w) c"))
        half = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=x.device) / 128)
        waves = 1000 * timesteps[:, None] * half
        vec = self.time_in(torch.cat((waves.cos(), waves.sin()), dim=-1))
        vec = vec + self.vector_in(x.new_zeros(len(x), CONFIG["vec_in_dim"]))
        txt = self.txt_in(context)
        rotations = _rotations(txt.shape[1], height, width).to(x.device)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rotations)
        both = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            both = block(both, vec, rotations)
        out = self.final_layer(both[:, txt.shape[1] :], vec)
        return nn.functional.pixel_shuffle(rearrange(out, "b (h w) c -> b c h w", h=height), _PATCH)


def _rotations(text: int, height: int, width: int) -> Tensor:
    """Return the rotary embedding ``[text + height * width, d / 2]`` as complex unit numbers; text is at (0, 0)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = rearrange([torch.zeros_like(rows), rows, columns], "coordinate h w -> (h w) coordinate")
    positions = torch.cat((torch.zeros(text, 3, dtype=positions.dtype), positions)).double()
    theta = float(CONFIG["theta"])
    parts = [
        positions[:, axis, None] * theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for axis, dim in enumerate(CONFIG["axes_dim"])
    ]
    angles = torch.cat(parts, dim=-1).float()
    return torch.polar(torch.ones_like(angles), angles)
