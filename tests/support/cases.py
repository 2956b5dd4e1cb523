# SPDX-License-Identifier: GPL-3.0-or-later
"""Inputs of the tests of ``gag_core``: shapes, memory layouts, masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Sizes of one attention call."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch}-H{self.heads}-{self.queries}x{self.keys}-d{self.dim}"


# Keys of one, two and three prompts of 77 tokens, the smallest, an odd and a long text; heads and dims of real models.
SHAPES = [
    Shape(1, 1, 1, 1, 4),
    Shape(2, 3, 5, 2, 8),
    Shape(2, 8, 64, 77, 40),
    Shape(1, 20, 33, 77, 64),
    Shape(4, 2, 17, 154, 16),
    Shape(1, 5, 40, 231, 64),
    Shape(1, 2, 300, 512, 128),
    Shape(3, 1, 9, 700, 160),
    Shape(1, 4, 1, 77, 32),
]
shape_id = str


def random(*size: int, seed: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw normal numbers, the same for all dtypes at one seed."""
    generator = torch.Generator().manual_seed(seed)
    return (std * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype)


def qkv(
    shape: Shape, *, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 1.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Make q, k and v, ``[B, H, N, D]`` each; the logits at the default scale have a deviation of ``std**2``."""
    batch, heads, queries, keys, dim = shape
    # Values have a mean, as real ones do, so that S and D share a direction.
    offset = random(batch, heads, 1, dim, seed=seed + 3)
    return (
        random(batch, heads, queries, dim, seed=seed, std=std, dtype=dtype),
        random(batch, heads, keys, dim, seed=seed + 1, std=std, dtype=dtype),
        (random(batch, heads, keys, dim, seed=seed + 2) + offset).to(dtype),
    )


def ties_at_the_edge(keys: int, alpha: float) -> Tensor:
    """Make logits ``[rows, keys]``: a few keys on top, and many about as far below them as the threshold."""
    rows = []
    for top in (1, 2, 4):
        # Distance of the threshold below the top keys if these have all the weight.
        edge = top ** (1.0 - alpha) / (alpha - 1.0)
        for near in (edge * (1.0 + sign * step) for sign in (-1, 1) for step in (0.0, 1e-3, 1e-2, 0.03, 0.1, 0.3)):
            tied = torch.arange(keys - top) < (keys - top) * 0.75
            rows.append(torch.cat((torch.zeros(top), torch.where(tied, -near, -1.1 * near - 0.05))))
    return torch.stack(rows)


def with_logits(logits: Tensor, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Make q, k and v whose logits at scale 1 are these rows, one head each: ``[1, rows, 1 or keys, dim]``."""
    rows, keys = logits.shape
    q, k = torch.zeros(1, rows, 1, dim), torch.zeros(1, rows, keys, dim)
    q[..., 0], k[..., 0] = 1.0, logits
    return q, k, random(1, rows, keys, dim, seed=seed)


# --- layouts: the same numbers, other strides -------------------------------------------------------------------


def as_contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def as_merged_heads(x: Tensor) -> Tensor:
    """Return a view of ``[B, N, H * D]``, as UNet attention gets its heads."""
    batch, heads, tokens, dim = x.shape
    merged = x.transpose(1, 2).reshape(batch, tokens, heads * dim)
    return merged.view(batch, tokens, heads, dim).transpose(1, 2)


def as_fused_qkv(x: Tensor) -> Tensor:
    """Return a view of ``[B, N, 3, H, D]``, as transformers split one projection."""
    fused = torch.stack([torch.full_like(x, math.nan), x, torch.full_like(x, math.nan)])
    return fused.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)[1]


def as_every_other(x: Tensor) -> Tensor:
    """Return a view with steps in every axis and NaN between, so that a read outside of the view shows."""
    wide = torch.full([2 * size for size in x.shape], math.nan, dtype=x.dtype)
    view = wide[::2, ::2, ::2, ::2]
    view.copy_(x)
    return view


def as_channels_first(x: Tensor) -> Tensor:
    """Return a view of ``[B, H, D, N]``, as a 1x1 convolution gives it."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": as_contiguous,
    "merged-heads": as_merged_heads,
    "fused-qkv": as_fused_qkv,
    "every-other": as_every_other,
    "channels-first": as_channels_first,
}


# --- masks ------------------------------------------------------------------------------------------------------


def _allowed(*size: int, seed: int) -> Tensor:
    """Make a random bool mask in which each row may read at least its first key."""
    mask = random(*size, seed=seed) > 0
    mask[..., 0] = True
    return mask


def bool_full(s: Shape) -> Tensor:
    return _allowed(s.batch, s.heads, s.queries, s.keys, seed=11)


def bool_per_key(s: Shape) -> Tensor:
    """``[B, 1, 1, Nk]``: padding of the prompt."""
    return _allowed(s.batch, 1, 1, s.keys, seed=12)


def bool_two_dims(s: Shape) -> Tensor:
    """``[Nq, Nk]``, as torch takes it too."""
    return _allowed(s.queries, s.keys, seed=13)


def bool_per_head(s: Shape) -> Tensor:
    return _allowed(1, s.heads, s.queries, s.keys, seed=14)


def bool_some_rows_empty(s: Shape) -> Tensor:
    """Every third query, and all queries of the first head of the last batch row, may read nothing."""
    mask = _allowed(s.batch, s.heads, s.queries, s.keys, seed=15)
    mask[:, :, ::3] = False
    mask[-1, 0] = False
    return mask


def bool_per_query(s: Shape) -> Tensor:
    """``[B, 1, Nq, 1]``: a query may read all keys or none."""
    return random(s.batch, 1, s.queries, 1, seed=19) > 0


def additive_bias(s: Shape) -> Tensor:
    return random(s.batch, s.heads, s.queries, s.keys, seed=16)


def additive_three_dims(s: Shape) -> Tensor:
    return random(s.heads, s.queries, s.keys, seed=17)


def additive_inf(s: Shape) -> Tensor:
    """Make a bias with ``-inf`` at masked keys, including whole rows."""
    return random(s.batch, 1, s.queries, s.keys, seed=18).masked_fill(~bool_some_rows_empty(s)[:, :1], -math.inf)


def additive_lowest(s: Shape) -> Tensor:
    """Make a mask with the lowest finite number instead of ``-inf``, as masks of text encoders have."""
    return torch.zeros(s.batch, 1, 1, s.keys).masked_fill(~bool_per_key(s), torch.finfo(torch.float32).min)


MASKS: dict[str, Callable[[Shape], Tensor]] = {
    "bool-full": bool_full,
    "bool-per-key": bool_per_key,
    "bool-2d": bool_two_dims,
    "bool-per-head": bool_per_head,
    "bool-some-rows-empty": bool_some_rows_empty,
    "bool-per-query": bool_per_query,
    "additive": additive_bias,
    "additive-3d": additive_three_dims,
    "additive-inf": additive_inf,
    "additive-lowest": additive_lowest,
}


def cast_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an additive mask to the dtype of the call, as torch requires; a bool mask stays as it is."""
    if mask.dtype == torch.bool:
        return mask
    if torch.finfo(dtype).bits < 32:
        mask = torch.where(mask == -math.inf, mask, mask.clamp_min(torch.finfo(dtype).min))
    return mask.to(dtype)
