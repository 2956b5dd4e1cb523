# SPDX-License-Identifier: GPL-3.0-or-later
"""The formulas of the paper, each once: decomposition, cap, extrapolation, text mass.

With S and D the sparse and the dense read-out, ``r = S - D`` the discrepancy, lambda the guidance_scale, eta the
norm_threshold and zeta the orthogonal_scale::

    r_par = (<r, S> / <S, S>) S             r_perp = r - r_par            decompose, orthogonal_norm
    g     = r_par + zeta r_perp                                           guidance_norm
    g     = g cap(||g||) / ||g||            cap(x) = min(x, eta)          cap, cap_limit, is_capped
    out   = S + lambda g                                                  guidance_factors

The result is linear in S and r once norms and inner products are known. So :func:`guidance_factors` returns two factors
for each query, and r_par, r_perp and g are never stored.

Source: arXiv 2603.02531 v2, eq. 12-13.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import GuidanceConfig
from .numerics import ConfigNumbers

_PER_HEAD = (-1,)
_MERGED_HEADS = (-3, -1)


def norm_axes(config: GuidanceConfig) -> tuple[int, ...]:
    """Return the axes of ``[B, H, N, D]`` that norms and inner products are taken over."""
    return _MERGED_HEADS if config.merge_heads else _PER_HEAD


def cap(length: Tensor, limit: Tensor | float) -> Tensor:
    """Compute the length of the guidance vector after the cap: a hard minimum of the length and the limit.

    The shape of the cap is written here and nowhere else, except that the same function is also ``cap`` in
    ``triton/formulas.py`` and ``cap`` in ``tests/support/reference.py``. A cap of another shape must be

    - odd: ``cap(-x, limit) = -cap(x, limit)``, because the length of the part along S has a sign;
    - homogeneous: ``cap(c x, c limit) = c cap(x, limit)`` for c > 0, because callers divide length and limit by a scale
      or by ||g||;
    - never longer than the length.
    """
    return torch.clamp(length, -limit, limit)  # type: ignore[arg-type] # torch takes either


def is_capped(length: Tensor, limit: Tensor | float) -> Tensor:
    """Return True where the cap shortens a guidance vector of this length, which is not negative."""
    return cap(length, limit) < length


def cap_limit(sparse_norm: Tensor, scale: Tensor | float, norm_threshold: float, norm_mode: str) -> Tensor | float:
    """Compute the largest length that the cap allows: eta, or ``eta ||S||`` if ``norm_mode`` is "relative".

    ``sparse_norm`` is ||S|| of read-outs that were divided by ``scale``. The limit is in the same scale.
    """
    return sparse_norm * norm_threshold if norm_mode == "relative" else norm_threshold / scale


def _limit(
    sparse_norm: Tensor, scale: Tensor | float, config: GuidanceConfig, numbers: ConfigNumbers
) -> Tensor | float | None:
    """Return :func:`cap_limit` for a config, or None where there is no cap."""
    if config.norm_threshold == math.inf:
        return None
    return cap_limit(sparse_norm, scale, numbers.norm_threshold, config.norm_mode)


def decompose(vector: Tensor, sparse: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Compute ``along`` and ||S|| with ``r_par = along S / ||S||``: the signed length of the part of r along S.

    A zero S has no direction: ``along`` is 0 there.
    """
    tiny = torch.finfo(sparse.dtype).tiny
    sparse_norm = torch.linalg.vector_norm(sparse, dim=axes, keepdim=True).clamp_min_(tiny)
    return (vector * sparse).sum(dim=axes, keepdim=True).div_(sparse_norm), sparse_norm


def decompose_read_outs(sparse: Tensor, dense: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what :func:`decompose` computes of ``r = S - D`` and S, with ``S = share * sparse``, per head.

    No tensor of r is needed: ``<r, S> / ||S|| = ||S|| - <D, S> / ||S||``.

    Returns:
        ``along``, ||S|| and ||sparse||.
    """
    norm = torch.linalg.vector_norm(sparse, dim=_PER_HEAD, keepdim=True).clamp_min_(torch.finfo(sparse.dtype).tiny)
    product = (sparse * dense).sum(dim=_PER_HEAD, keepdim=True)
    sparse_norm = norm * share
    return torch.addcdiv(sparse_norm, product, norm, value=-1.0), sparse_norm, norm


def orthogonal_norm(vector: Tensor, along: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Compute ||r_perp|| from r and the length of its part along S."""
    parallel_norm = along.abs()
    vector_norm = torch.linalg.vector_norm(vector, dim=axes, keepdim=True)
    return (vector_norm - parallel_norm).mul_(vector_norm + parallel_norm).clamp_min_(0.0).sqrt_()


def guidance_norm(along: Tensor, across: Tensor, zeta: float) -> Tensor:
    """Compute ``||g|| / max(1, |zeta|)`` from the lengths of r_par and r_perp; never 0.

    The division keeps the norm in range whatever zeta is.
    """
    zeta_scale = max(1.0, abs(zeta))
    parallel = along.abs().div_(zeta_scale).square_()
    return parallel.add_(across.mul_(zeta / zeta_scale).square_()).sqrt_().clamp_min_(torch.finfo(along.dtype).tiny)


def guidance_factors(
    sparse: Tensor,
    discrepancy: Tensor,
    scale: Tensor | float,
    config: GuidanceConfig,
    numbers: ConfigNumbers,
    anderson_vector: Tensor | None = None,
) -> tuple[Tensor | float, Tensor | float]:
    """Compute the factors a and b of each query with ``strength * (guided - D) = a * S + b * (S - D)``.

    Args:
        sparse: S, ``[B, H, N, D]``, in the work dtype, divided by ``scale``.
        discrepancy: ``S - D``, the same.
        scale: positive, ``[B, H or 1, N or 1, 1]``. An absolute cap does not scale with the values, so it needs this.
        config: the settings.
        numbers: :func:`gag_core.numerics.config_numbers` of the config and the work dtype.
        anderson_vector: the vector that replaces the discrepancy in rule "anderson", the same shape and scale:
            ``(out - S) / guidance_scale``, see :func:`gag_core.anderson.retrieve_with_coefficients`.

    Returns:
        a and b, ``[B, H or 1, N, 1]``, or a number where all queries have the same; never NaN for finite vectors. With
        an Anderson vector b is the factor of that vector, and the caller adds ``strength * (S - D)``.

    Source: arXiv 2603.02531 v2, eq. 12-13; rule "pladis": arXiv 2503.07677.
    """
    if config.rule == "pladis":
        return 0.0, numbers.gain
    on_discrepancy = numbers.strength if anderson_vector is None else 0.0
    if numbers.gain == 0.0:
        return 0.0, on_discrepancy
    vector = discrepancy if anderson_vector is None else anderson_vector
    axes, zeta = norm_axes(config), config.orthogonal_scale
    along, sparse_norm = decompose(vector, sparse, axes)
    limit = _limit(sparse_norm, scale, config, numbers)
    if zeta == 0.0:
        # The guidance vector is r_par alone.
        capped = along if limit is None else cap(along, limit)
        return capped.div_(sparse_norm).mul_(numbers.gain), on_discrepancy
    zeta_scale = max(1.0, abs(zeta))
    norm = guidance_norm(along, orthogonal_norm(vector, along, axes), zeta)
    # Divide the length ||g|| and the limit by ``norm``, which is ||g|| / zeta_scale. Then cap returns zeta_scale times
    # the factor that shortens g.
    length = torch.full_like(norm, numbers.zeta_scale)
    capped = length if limit is None else cap(length, limit / norm)
    on_sparse = along.div_(sparse_norm).mul_(capped).mul_(numbers.gain * ((1.0 - zeta) / zeta_scale))
    on_vector = capped.mul_(numbers.gain * (zeta / zeta_scale)).nan_to_num_(nan=0.0)
    return on_sparse.nan_to_num_(nan=0.0), on_vector.add_(on_discrepancy)


def read_out_factors(
    sparse: Tensor,
    dense: Tensor,
    total: Tensor,
    scale: Tensor | float,
    config: GuidanceConfig,
    numbers: ConfigNumbers,
) -> tuple[Tensor, float]:
    """Compute the factors a and b of each query with ``strength * (guided - D) = a * sparse + b * D``.

    The same as :func:`guidance_factors` in fewer passes over memory, for norms per head and an orthogonal_scale of 0.

    Args:
        sparse: ``total * S``, ``[B, H, N, D]``, in the work dtype, divided by ``scale``.
        dense: D, the same.
        total: ``[B, H, N, 1]``, positive.
        scale, config, numbers: as for :func:`guidance_factors`.
    """
    share = total.reciprocal()
    on_discrepancy = numbers.gain if config.rule == "pladis" else numbers.strength
    on_sparse = share if on_discrepancy == 1.0 else share * on_discrepancy
    if config.rule == "gag" and numbers.gain != 0.0:
        along, sparse_norm, norm = decompose_read_outs(sparse, dense, share)
        limit = _limit(sparse_norm, scale, config, numbers)
        capped = along if limit is None else cap(along, limit)
        on_sparse = torch.addcdiv(on_sparse, capped, norm, value=numbers.gain)
    return on_sparse, -on_discrepancy


def text_mass(lse: Tensor, joint_lse: Tensor) -> Tensor:
    """Compute the share of a joint softmax that falls on the text, ``exp(lse_text - lse_all)``, 0 to 1.

    A query that may read nothing at all has ``-inf - -inf`` here: no text, so the mass is 0.
    """
    return (lse - joint_lse).exp_().nan_to_num_(nan=0.0).clamp_(max=1.0)
