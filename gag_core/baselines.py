# SPDX-License-Identifier: GPL-3.0-or-later
"""Baselines for measurements: attention calls of real models, guidance by sorting, and exact guidance in fp64.

``check.py`` and the developers' benchmark compare the implementations of this package with these. Nothing here runs
when a model is guided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import combine, guided_attention
from .config import GuidanceConfig
from .geometry import cap

Entmax = Callable[[Tensor], Tensor]
Guide = Callable[..., None]  # the arguments of gag_core.eager.guide; joint_lse may be missing

_BISECTIONS = 60


class Shape(NamedTuple):
    """One attention call: ``q [batch, heads, queries, dim]``, ``k`` and ``v`` ``[batch, heads, keys, dim]``.

    With ``text`` it is a joint attention of one sequence, whose first ``text`` tokens are the text. ``cpu_heads`` is
    the number of heads that are enough for a measurement on a CPU.
    """

    model: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    text: int = 0
    cpu_heads: int = 0

    def __str__(self) -> str:
        joint = f", text {self.text}" if self.text else ""
        return f"{self.model}: {self.queries} x {self.keys}{joint}, B{self.batch} H{self.heads} d{self.dim}"

    def fewer_heads(self) -> Shape:
        """Return the shape with the number of heads that are enough on a CPU."""
        return self._replace(heads=self.cpu_heads or self.heads)


# UNets run both branches of CFG in one batch. Flux has no CFG, and the branches of Wan run one at a time.
SHAPES = {
    "sd15-512": [
        Shape("SD1.5 512", 2, 8, 4096, 77, 40, cpu_heads=8),
        Shape("SD1.5 512", 2, 8, 1024, 77, 80, cpu_heads=8),
        Shape("SD1.5 512", 2, 8, 256, 77, 160, cpu_heads=8),
    ],
    "sd15-768": [Shape("SD1.5 768", 2, 8, 9216, 77, 40, cpu_heads=4)],
    "sdxl-1024": [
        Shape("SDXL 1024", 2, 10, 4096, 77, 64, cpu_heads=5),
        Shape("SDXL 1024", 2, 20, 1024, 77, 64, cpu_heads=20),
    ],
    "flux-1024": [
        Shape("Flux 1024", 1, 24, 4096 + 256, 4096 + 256, 128, text=256, cpu_heads=2),
        Shape("Flux 1024", 1, 24, 4096 + 512, 4096 + 512, 128, text=512, cpu_heads=2),
    ],
    "wan-480p": [Shape("Wan 480p", 1, 12, 32760, 512, 128, cpu_heads=1)],
}


def random_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with the same numbers on every machine; the logits have a deviation of about 2.

    They are views of ``[batch, tokens, heads * dim]``, as in models.
    """
    generator = torch.Generator().manual_seed(0)

    def heads(tokens: int, std: float) -> Tensor:
        flat = std * torch.randn(shape.batch, tokens, shape.heads * shape.dim, generator=generator)
        return flat.to(device, dtype).unflatten(2, (shape.heads, shape.dim)).transpose(1, 2)

    return heads(shape.queries, 2**0.5), heads(shape.keys, 2**0.5), heads(shape.keys, 1.0)


# --- guidance as it is usually computed ---------------------------------------------------------------------------


def all_at_once(entmax: Entmax) -> Guide:
    """Return guidance as other packs compute it: all logits at once, both weight matrices, two products.

    It takes the place of :func:`gag_core.eager.guide`, for calls without a mask.
    """

    def guide(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: GuidanceConfig,
        *,
        base: Tensor | None,
        mask: Tensor | None,
        scale: float,
        joint_lse: Tensor | None = None,
    ) -> None:
        assert mask is None, "the measurements have no masks"
        logits = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
        dense_weights = logits.softmax(dim=-1)
        sparse_weights = entmax(logits)
        dense = torch.matmul(dense_weights, v.float())
        sparse = torch.matmul(sparse_weights, v.float())
        guided = combine(sparse, dense, config)
        if base is not None and joint_lse is not None:
            mass = (logits.logsumexp(dim=-1) - joint_lse).exp().unsqueeze(-1)
            guided = base + mass * (guided - dense)
        out.copy_(guided)

    return guide


def sort_based_entmax15(logits: Tensor) -> Tensor:
    """Compute 1.5-entmax of the last axis from sorted rows (Peters et al. 2019, arXiv 1905.05702): ``[..., n]``."""
    x = (logits - logits.amax(dim=-1, keepdim=True)) / 2
    ordered, _ = torch.sort(x, dim=-1, descending=True)
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean = ordered.cumsum(-1) / count
    mean_of_squares = (ordered**2).cumsum(-1) / count
    # Threshold for a support of the k largest entries, for every k. Where k * variance > 1 there is none: clamped.
    missing = (1 - count * (mean_of_squares - mean**2)) / count
    threshold = mean - missing.clamp(min=0).sqrt()
    support = (threshold <= ordered).sum(dim=-1, keepdim=True)
    return (x - threshold.gather(-1, support - 1)).clamp(min=0) ** 2


# --- exact guidance -----------------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """Plain and guided attention in fp64."""

    plain: Tensor
    guided: Tensor


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    *,
    text: int = 0,
    rows: slice = slice(None),
    mask: Tensor | None = None,
) -> Exact:
    """Compute plain and guided attention of some queries in fp64, with the formulas written out and nothing fused.

    Rule "anderson" and merged heads are computed by this package in fp64 instead.

    Args:
        q, k, v: ``[B, H, N_q, D]``, ``[B, H, N_k, D]``, ``[B, H, N_k, D]``, any dtype.
        config: the settings.
        text: number of text tokens at the start of a joint sequence; 0 for cross-attention.
        rows: the queries to compute.
        mask: bool, broadcastable to ``[B, H, 1, N_k]``: True where all queries may read a key.

    Returns:
        Two tensors ``[B, H, rows, D]`` in fp64.

    Source: arXiv 2603.02531 v2, eq. 12-13.
    """
    q, k, v = q[:, :, rows].double(), k.double(), v.double()
    logits = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    weights = logits.softmax(dim=-1)
    plain = torch.matmul(weights, v)
    if not text:
        return Exact(plain, _guided(logits, plain, q, k, v, config, mask))
    text_keys, text_values = k[:, :, :text], v[:, :, :text]
    dense = torch.matmul(logits[..., :text].softmax(dim=-1), text_values)
    text_mask = None if mask is None else mask[..., :text]
    text_guided = _guided(logits[..., :text], dense, q, text_keys, text_values, config, text_mask)
    guided = plain + weights[..., :text].sum(dim=-1, keepdim=True) * (text_guided - dense)
    is_text = torch.arange(k.shape[2], device=q.device)[rows, None] < text
    return Exact(plain, torch.where(is_text, plain, guided))


def _guided(
    logits: Tensor, dense: Tensor, q: Tensor, k: Tensor, v: Tensor, config: GuidanceConfig, mask: Tensor | None
) -> Tensor:
    """Compute the guided read-out ``[B, H, N, D]`` from the logits ``[B, H, N, N_k]`` and the dense read-out."""
    if config.rule == "uniform":
        allowed = torch.ones_like(logits) if mask is None else mask.to(logits.dtype).expand_as(logits)
        mean = torch.matmul(allowed / allowed.sum(dim=-1, keepdim=True).clamp_min(1.0), v)
        return dense + config.strength * config.guidance_scale * (dense - mean)
    if config.rule == "anderson" or config.merge_heads:
        return guided_attention(q, k, v, config, mask=mask)
    sparse = torch.matmul(_entmax_by_bisection(logits, config.alpha), v)
    difference = sparse - dense
    if config.rule == "pladis":
        return dense + config.strength * config.guidance_scale * difference
    square = (sparse * sparse).sum(dim=-1, keepdim=True)
    parallel = (difference * sparse).sum(dim=-1, keepdim=True) / square * sparse
    guidance = parallel + config.orthogonal_scale * (difference - parallel)
    length = guidance.norm(dim=-1, keepdim=True)
    limit = config.norm_threshold * (square.sqrt() if config.norm_mode == "relative" else torch.ones_like(square))
    guidance = guidance * cap(length, limit) / length.clamp_min(1e-300)
    return dense + config.strength * (difference + config.guidance_scale * guidance)


def _entmax_by_bisection(logits: Tensor, alpha: float) -> Tensor:
    """Compute alpha-entmax of the last axis, for alpha above 1, by halving the interval of its threshold."""
    x = (alpha - 1.0) * (logits - logits.amax(dim=-1, keepdim=True))
    low = torch.full_like(x[..., :1], -1.0)
    high = torch.zeros_like(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        too_heavy = ((x - middle).clamp_min(0.0) ** (1.0 / (alpha - 1.0))).sum(dim=-1, keepdim=True) >= 1.0
        low, high = torch.where(too_heavy, middle, low), torch.where(too_heavy, high, middle)
    weights = (x - low).clamp_min(0.0) ** (1.0 / (alpha - 1.0))
    return weights / weights.sum(dim=-1, keepdim=True)
