# SPDX-License-Identifier: GPL-3.0-or-later
"""From the sparse and the dense read-out to the guided one: decomposition, cap, extrapolation, blend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import GuidanceConfig, check_config

_PER_HEAD = (-1,)
_MERGED_HEADS = (-3, -1)


@torch.no_grad()
def combine(sparse: Tensor, dense: Tensor, config: GuidanceConfig) -> Tensor:
    """Combine two read-outs of the same queries into the guided one.

    With ``r = S - D``, ``r_par`` its part along S and ``r_perp`` the rest::

        g   = r_par + orthogonal_scale * r_perp
        g   = g * min(1, cap / ||g||)          cap = norm_threshold, times ||S|| if norm_mode is "relative"
        out = S + guidance_scale * g           rule "gag"
        out = D + guidance_scale * r           rule "pladis": no decomposition, no cap
        out = D + strength * (out - D)

    Args:
        sparse: S, ``[B, H, N, D]``, floating point.
        dense: D, the same shape, dtype and device.
        config: the settings; ``merge_heads`` takes norms and inner products over H and D instead of D alone.

    Returns:
        ``[B, H, N, D]`` in the dtype of the inputs; computed in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: the two read-outs differ in shape, dtype or device, or are not of rank 4; or the rule is
            "anderson", whose coefficients come from queries and keys.
        TypeError: they are not floating-point tensors, or config is not a GuidanceConfig.

    Source: arXiv 2603.02531 v2, eq. 12-13; rule "pladis": arXiv 2503.07677.
    """
    for name, tensor in (("sparse", sparse), ("dense", dense)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            given = f"{tensor.dtype} of layout {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a dense floating-point tensor, got {given}.")
    check_config(config)
    if config.rule == "anderson":
        raise ValueError(
            "rule must be 'gag' or 'pladis' where two read-outs are all there is ('anderson' needs queries and keys: "
            "call guided_attention), got 'anderson'."
        )
    if sparse.ndim != 4 or sparse.shape != dense.shape:
        raise ValueError(
            "sparse and dense must both be [batch, heads, tokens, head_dim] of one shape, "
            f"got {tuple(sparse.shape)} and {tuple(dense.shape)}."
        )
    if sparse.dtype != dense.dtype or sparse.device != dense.device:
        raise ValueError(
            "sparse and dense must have one dtype and one device, "
            f"got {sparse.dtype} on {sparse.device} and {dense.dtype} on {dense.device}."
        )
    work = torch.float64 if sparse.dtype == torch.float64 else torch.float32
    wide = dense.to(work)
    return to_dtype(correction_(sparse.to(work, copy=True), wide, config).add_(wide), sparse.dtype)


def correction_(sparse: Tensor, dense: Tensor, config: GuidanceConfig, signal: Tensor | None = None) -> Tensor:
    """What guidance adds to the dense read-out: ``strength * (guided - dense)``, in the (wide) dtype of the inputs.

    ``signal`` is what the guidance vector is made of where that is not the discrepancy ``S - D``. Writes over
    ``sparse``, and returns that or another tensor that nobody else holds.
    """
    if config.rule == "pladis":
        return _finite_(sparse.sub_(dense).mul_(config.strength * config.guidance_scale))
    discrepancy = sparse - dense
    signal = discrepancy if signal is None else signal
    axes = _MERGED_HEADS if config.merge_heads else _PER_HEAD
    scaled, scaled_norm, size = _scaled_(sparse, axes)
    inverse = scaled_norm.clamp_min(torch.finfo(sparse.dtype).tiny).reciprocal_()
    along = (signal * scaled).sum(dim=axes, keepdim=True).mul_(inverse)
    sparse_norm = size.mul_(scaled_norm)
    orthogonal = config.orthogonal_scale
    # A product and a sum: on a CPU addcmul with a number per row takes three times as long.
    if orthogonal == 0.0:
        reach = _capped(along.abs(), sparse_norm, config).mul_(config.guidance_scale)
        change = discrepancy.add_(scaled.mul_(along.mul_(reach).mul_(inverse)))
    else:
        guidance = scaled.mul_(along.mul_(1.0 - orthogonal).mul_(inverse)).add_(signal * orthogonal)
        guidance, guidance_norm, guidance_size = _scaled_(guidance, axes)
        reach = _capped(guidance_norm.mul_(guidance_size), sparse_norm, config).mul_(config.guidance_scale)
        change = discrepancy.add_(guidance.mul_(guidance_size).mul_(reach))
    return _finite_(change if config.strength == 1.0 else change.mul_(config.strength))


def _finite_(change: Tensor) -> Tensor:
    """What left the range of the dtype saturates, and where that left no direction nothing is changed; in place."""
    return change.nan_to_num_(nan=0.0)


def _scaled_(vectors: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors over their size, in place, the norm of that, and their size: squares neither over- nor underflow."""
    info = torch.finfo(vectors.dtype)
    # On a CPU the sum of 40 takes half the time of the largest of them, and torch's infinity norm takes far longer.
    size = vectors.abs().sum(dim=axes, keepdim=True).clamp_(info.tiny, info.max)
    scaled = vectors.div_(size)
    return scaled, torch.linalg.vector_norm(scaled, dim=axes, keepdim=True), size


def _capped(guidance_norm: Tensor, sparse_norm: Tensor, config: GuidanceConfig) -> Tensor:
    """The factor, at most 1, that keeps the guidance vector within the cap."""
    if math.isinf(config.norm_threshold):
        return torch.ones_like(guidance_norm)
    limit = sparse_norm * config.norm_threshold if config.norm_mode == "relative" else config.norm_threshold
    return (limit / guidance_norm.clamp_min(torch.finfo(guidance_norm.dtype).tiny)).clamp_(max=1.0)


def to_dtype(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor that nobody else holds, saturating where the dtype ends: an extrapolation may leave its range."""
    limit = torch.finfo(dtype).max
    return wide.clamp_(-limit, limit).to(dtype)
