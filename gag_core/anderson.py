# SPDX-License-Identifier: GPL-3.0-or-later
"""Anderson acceleration, type II: extrapolation of a fixed-point iteration whose coefficients are solved for.

Of a map T with states x_i, images ``g_i = T(x_i)`` and residuals ``f_i = g_i - x_i`` it takes the coefficients of

    minimise |f - dF gamma|^2 + regularization * sum_j gamma_j^2 |dF_j|^2,        x_next = g - dG gamma

where the columns of dF and dG are differences of residuals and of images. The regularisation is Tikhonov's, relative
to each difference, so that it has no unit.

Attention extrapolation is this with one difference, that of the sparse and the dense read-out, and a coefficient that
is set instead of solved for: ``S - gamma (S - D)`` with ``gamma = -lambda``. The rule "anderson" solves for it; see
:func:`gag_core.eager.retrieve_with_coefficients`.

Sources: Anderson 1965, *Iterative Procedures for Nonlinear Integral Equations*; Walker and Ni 2011, *Anderson
Acceleration for Fixed-Point Iterations* (type II); the regularisation is that of Eyert 1996. As guidance: arXiv
2603.02531 v1.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

# With fewer roundings of the dtype than this, regularisation does not keep a few differences that are nearly parallel
# apart.
_LEAST_REGULARIZATION = 16.0


@torch.no_grad()
def coefficients(residual: Tensor, differences: Tensor, *, regularization: float) -> Tensor:
    """The coefficients that bring a residual closest to zero by subtracting multiples of differences from it.

    Minimises ``|f - sum_j gamma_j d_j|^2 + regularization sum_j gamma_j^2 |d_j|^2``. Safeguard: where that does not
    lower the predicted residual ``|f - sum_j gamma_j d_j|`` below ``|f|``, all coefficients are 0. In exact arithmetic
    that is where f is orthogonal to every difference or they are 0; in floating point also where the system could not
    be solved.

    Args:
        residual: f, ``[..., n]``, fp32 or fp64.
        differences: d_j, ``[..., m, n]``.
        regularization: 0 or more; of several differences at least some 16 roundings of the dtype are used.

    Returns:
        gamma, ``[..., m]``, finite for finite input.

    Source: Walker and Ni 2011, sec. 2 (type II); regularisation: Eyert 1996, as in ``scipy.optimize.anderson`` with
    ``w0 = sqrt(regularization)``.
    """
    number = differences.shape[-2]
    info = torch.finfo(residual.dtype)
    # Of unit vectors, so that what is solved has ones on its diagonal.
    f, f_size = unit(residual)
    d, d_size = unit(differences)
    along = (d * f.unsqueeze(-2)).sum(dim=-1)
    if number == 1:
        gamma = along / (1.0 + regularization)
    else:
        gram = torch.matmul(d, d.transpose(-1, -2))
        solved = _solved(gram, max(regularization, _LEAST_REGULARIZATION * info.eps), along)
        # By how much the squared residual falls. As a difference of two norms it would drown in rounding.
        falls = (solved * (2.0 * along - (gram * solved.unsqueeze(-2)).sum(dim=-1))).sum(dim=-1, keepdim=True)
        gamma = torch.where(falls > 0.0, solved, 0.0)
    # Far below the end of the range, so that a few of them have a sum.
    return (gamma * (f_size.unsqueeze(-1) / d_size)).nan_to_num_(nan=0.0).clamp_(-info.max / 64, info.max / 64)


@torch.no_grad()
def shares(gamma: Tensor, bound: float) -> Tensor:
    """Coefficients as shares of a bound: ``gamma / max(bound, sum_j |gamma_j|)``, ``[..., m] -> [..., m]``.

    Times the bound they are the coefficients, shrunk together where their absolute values add up to more than it. That
    moves them straight towards 0, along which the predicted residual of :func:`coefficients` only lies lower than
    without any.
    """
    info = torch.finfo(gamma.dtype)
    total = gamma.abs().sum(dim=-1, keepdim=True)
    return gamma / total.clamp_min(min(max(bound, info.tiny), info.max))


@torch.no_grad()
def fixed_point(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    depth: int,
    regularization: float,
    bound: float = math.inf,
) -> Tensor:
    """The state after some steps of Anderson acceleration, type II, towards a fixed point of ``function``.

    Every vector along the last axis is a problem of its own. Depth 0 is Picard's iteration ``x_next = T(x)``. Where T
    bends sharply, as sparse retrieval at low temperatures does, Picard can converge where this does not.

    Args:
        function: T, ``[..., n] -> [..., n]``.
        start: the first state, ``[..., n]``, fp32 or fp64.
        steps: how often T is called.
        depth: how many of the last differences are used, 0 or more.
        regularization: as in :func:`coefficients`.
        bound: the largest sum of the coefficients' absolute values.

    Source: Walker and Ni 2011, algorithm AA with the differences of consecutive iterates.
    """
    state = start
    images: deque[Tensor] = deque(maxlen=depth + 1)
    residuals: deque[Tensor] = deque(maxlen=depth + 1)
    for _ in range(steps):
        images.append(function(state))
        residuals.append(images[-1] - state)
        state = images[-1]
        if len(images) > 1:
            gamma = coefficients(residuals[-1], _differences(residuals), regularization=regularization)
            if not math.isinf(bound):
                gamma = bound * shares(gamma, bound)
            state = state - (gamma.unsqueeze(-1) * _differences(images)).sum(dim=-2)
    return state


def _solved(gram: Tensor, ridge: float, right: Tensor) -> Tensor:
    """``(gram + ridge)^-1 right``, ``[..., m]``; gram ``[..., m, m]`` positive semidefinite with ones on its diagonal.

    By elimination, for which such matrices need no pivots: not every device has the factorisations of torch.linalg.
    """
    rows = torch.cat((gram, right.unsqueeze(-1)), dim=-1)
    rows.diagonal(dim1=-2, dim2=-1).add_(ridge)
    for i in range(gram.shape[-1]):
        pivot = rows[..., i : i + 1, :] / rows[..., i : i + 1, i : i + 1]
        rows = rows - rows[..., i : i + 1] * pivot
        rows[..., i : i + 1, :] = pivot
    return rows[..., -1]


def _differences(vectors: deque[Tensor]) -> Tensor:
    """Of each vector and the one before it, ``[..., m, n]``."""
    return torch.stack(list(vectors), dim=-2).diff(dim=-2)


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of norm 1, zero where they are zero, and their norms: ``[..., n]`` and ``[...]``.

    No square over- or underflows.
    """
    tiny = torch.finfo(vectors.dtype).tiny
    size = vectors.abs().amax(dim=-1, keepdim=True).clamp_min_(tiny)
    scaled = vectors / size
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled.div_(norm.clamp_min(tiny)), size.mul_(norm).squeeze(-1)
