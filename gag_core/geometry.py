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
    if config.strength == 0.0:
        return dense.clone()
    dtype = sparse.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    sparse, dense = sparse.to(work), dense.to(work)
    # Each token in a unit of its own, so that no square over- or underflows.
    unit = torch.maximum(sparse.abs(), dense.abs()).amax(dim=_axes(config), keepdim=True)
    unit.clamp_min_(torch.finfo(work).tiny)
    sparse = sparse / unit
    discrepancy = sparse - dense / unit
    on_sparse, on_discrepancy = extrapolation(sparse, discrepancy, unit, config)
    blended = blended_(unit, (sparse, on_sparse + 1.0), (discrepancy, on_discrepancy - 1.0))
    return write(blended if dtype == work else torch.empty_like(blended, dtype=dtype), blended)


def extrapolation(
    sparse: Tensor, discrepancy: Tensor, unit: Tensor, config: GuidanceConfig, signal: Tensor | None = None
) -> tuple[Tensor | float, Tensor | float]:
    """What guidance adds to the dense read-out, as two numbers of each query: ``a`` and ``b`` of

        strength * (guided - dense) = a * S + b * (S - D)

    For r_par is a multiple of S, and r_perp is what remains of r.

    Args:
        sparse: S, ``[B, H, N, D]``, of the (wide) dtype of the work, in ``unit``.
        discrepancy: ``S - D``, the same.
        unit: how large a 1 of these is, positive, ``[B, H or 1, N or 1, 1]``. The absolute cap does not come in it.
        config: as in :func:`combine`.
        signal: what the guidance vector is made of where that is not the discrepancy, the same.

    Returns:
        a and b, ``[B, H or 1, N, 1]``, or one number where it is the same for all; never NaN for finite vectors. With a
        signal b is its factor, and ``strength * (S - D)`` is added.

    Source: arXiv 2603.02531 v2, eq. 12-13.
    """
    dtype, tiny, zeta = sparse.dtype, torch.finfo(sparse.dtype).tiny, config.orthogonal_scale
    amount, strength = within(config.strength * config.guidance_scale, dtype), within(config.strength, dtype)
    plain = strength if signal is None else 0.0
    if config.rule == "pladis":
        return 0.0, amount
    if amount == 0.0:
        return 0.0, plain
    vector = discrepancy if signal is None else signal
    axes = _axes(config)
    sparse_norm = torch.linalg.vector_norm(sparse, dim=axes, keepdim=True).clamp_min_(tiny)
    along = (vector * sparse).sum(dim=axes, keepdim=True).div_(sparse_norm)
    threshold = within(config.norm_threshold, dtype)
    limit = sparse_norm * threshold if config.norm_mode == "relative" else threshold / unit
    if zeta == 0.0:
        # The guidance vector is r_par alone, as long as r reaches along S.
        capped = along if config.norm_threshold == math.inf else torch.clamp(along, -limit, limit)
        return capped.div_(sparse_norm).mul_(amount), plain
    # In units of the larger of zeta and 1 the guidance vector is in range whatever zeta is.
    larger = max(1.0, abs(zeta))
    norm = along.abs()
    vector_norm = torch.linalg.vector_norm(vector, dim=axes, keepdim=True)
    across = (vector_norm - norm).mul_(vector_norm + norm).clamp_min_(0.0).sqrt_()
    norm = norm.div_(larger).square_().add_(across.mul_(zeta / larger).square_()).sqrt_().clamp_min_(tiny)
    if config.norm_threshold == math.inf:
        reach = torch.full_like(norm, within(larger, dtype))
    else:
        reach = (limit / norm).clamp_(max=within(larger, dtype))
    on_sparse = along.div_(sparse_norm).mul_(reach).mul_(amount * ((1.0 - zeta) / larger)).nan_to_num_(nan=0.0)
    return on_sparse, reach.mul_(amount * (zeta / larger)).nan_to_num_(nan=0.0).add_(plain)


def blended_(unit: Tensor, *parts: tuple[Tensor, Tensor | float]) -> Tensor:
    """``unit`` times the sum of vectors, each times its number, of about 4 at most; written over the first of them.

    Where all of these are finite no product leaves the range of the dtype; so nothing is NaN, but the sum may overflow.
    """
    (total, number), *others = parts
    most = torch.finfo(total.dtype).max / 4.0
    total.mul_((unit * number).clamp_(-most, most))
    for vectors, number in others:
        if isinstance(number, Tensor) or number:
            total.addcmul_(vectors, (unit * number).clamp_(-most, most))
    return total


def _axes(config: GuidanceConfig) -> tuple[int, ...]:
    """What norms and inner products are taken over."""
    return _MERGED_HEADS if config.merge_heads else _PER_HEAD


def within(number: float, dtype: torch.dtype) -> float:
    """A number, as far as the dtype reaches."""
    most = torch.finfo(dtype).max
    return min(max(number, -most), most)


def write(out: Tensor, wide: Tensor) -> Tensor:
    """Write to ``out``, and return it, a tensor that nobody else holds, saturating where the dtype of ``out`` ends.

    An extrapolation may leave that range, and rounding may: weights may sum to a little more than 1.
    """
    limit = torch.finfo(out.dtype).max
    return out.copy_(wide.clamp_(-limit, limit))
