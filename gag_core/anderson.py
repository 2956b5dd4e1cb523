# SPDX-License-Identifier: GPL-3.0-or-later
"""Anderson acceleration, type II, and rule "anderson": guidance whose coefficients are solved for.

A fixed-point iteration of a map T has states x_i, images ``g_i = T(x_i)`` and residuals ``f_i = g_i - x_i``. Anderson
acceleration extrapolates with the coefficients gamma of

    minimise |f - dF gamma|^2 + regularization * sum_j gamma_j^2 |dF_j|^2,        x_next = g - dG gamma

where the columns of dF and dG are differences of residuals and of images. The regularisation is Tikhonov's, relative
to each difference, so that it has no unit.

Attention extrapolation, ``S - gamma (S - D)`` with ``gamma = -lambda``, is Anderson acceleration with one difference,
that of the sparse and the dense read-out, and a coefficient that is set. Rule "anderson" solves for the coefficient:
:func:`retrieve_with_coefficients`.

Sources: Anderson 1965, *Iterative Procedures for Nonlinear Integral Equations*; Walker and Ni 2011, *Anderson
Acceleration for Fixed-Point Iterations* (type II); Eyert 1996 (the regularisation); arXiv 2603.02531 v1 (as guidance).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .config import GuidanceConfig
from .entmax import dense_weights_, logsumexp_from_sum, scale_and_shift_, sparse_weights
from .numerics import Keys, power_of_two_scale, split_scale, work_copy

# Least regularisation of several differences, in roundings of the dtype. Less does not keep a few differences apart
# that are nearly parallel.
_LEAST_REGULARIZATION = 16.0


@torch.no_grad()
def coefficients(residual: Tensor, differences: Tensor, *, regularization: float) -> Tensor:
    """Solve for the multiples of differences that, subtracted from a residual, bring it closest to zero.

    Minimises ``|f - sum_j gamma_j d_j|^2 + regularization sum_j gamma_j^2 |d_j|^2``. Safeguard: where the solution does
    not lower the predicted residual ``|f - sum_j gamma_j d_j|`` below ``|f|``, all coefficients are 0. In exact
    arithmetic this happens where f is orthogonal to every difference, or where all differences are 0; in floating point
    it also happens where the system could not be solved.

    Args:
        residual: f, ``[..., n]``, fp32 or fp64.
        differences: d_j, ``[..., m, n]``.
        regularization: 0 or more. With several differences, at least 16 roundings of the dtype are used.

    Returns:
        gamma, ``[..., m]``, finite for finite input.

    Source: Walker and Ni 2011, sec. 2 (type II); regularisation: Eyert 1996, as in ``scipy.optimize.anderson`` with
    ``w0 = sqrt(regularization)``.
    """
    info = torch.finfo(residual.dtype)
    # The system is that of unit vectors, so that it has ones on its diagonal.
    f, f_norm = normalized(residual)
    d, d_norm = normalized(differences)
    along = (d * f.unsqueeze(-2)).sum(dim=-1)
    if differences.shape[-2] == 1:
        gamma = along / (1.0 + regularization)
    else:
        gram = torch.matmul(d, d.transpose(-1, -2))
        solution = _solve(gram, max(regularization, _LEAST_REGULARIZATION * info.eps), along)
        # Decrease of the squared residual. As a difference of two norms it would drown in rounding.
        decrease = (solution * (2.0 * along - (gram * solution.unsqueeze(-2)).sum(dim=-1))).sum(dim=-1, keepdim=True)
        gamma = torch.where(decrease > 0.0, solution, 0.0)
    # Far below the end of the range, so that the sum of a few coefficients is still in range.
    return (gamma * (f_norm.unsqueeze(-1) / d_norm)).nan_to_num_(nan=0.0).clamp_(-info.max / 64, info.max / 64)


@torch.no_grad()
def shares(gamma: Tensor, bound: float) -> Tensor:
    """Compute coefficients as shares of a bound: ``gamma / max(bound, sum_j |gamma_j|)``, ``[..., m] -> [..., m]``.

    The bound times the shares gives the coefficients, shrunk together where their absolute values add up to more than
    the bound. Shrinking moves them straight towards 0. On that line the predicted residual of :func:`coefficients` is
    never larger than it is without any coefficient.
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
    """Iterate Anderson acceleration, type II, towards a fixed point of ``function``, and return the last state.

    Every vector along the last axis is a problem of its own. Depth 0 is Picard's iteration ``x_next = T(x)``. Where T
    bends sharply, as sparse retrieval at low temperatures does, Picard's iteration can converge where Anderson's does
    not.

    Args:
        function: T, ``[..., n] -> [..., n]``.
        start: the first state, ``[..., n]``, fp32 or fp64.
        steps: number of calls of T.
        depth: number of last differences that are used, 0 or more.
        regularization: as in :func:`coefficients`.
        bound: largest sum of the absolute values of the coefficients.

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


def _solve(gram: Tensor, ridge: float, right: Tensor) -> Tensor:
    """Compute ``(gram + ridge)^-1 right``, ``[..., m]``.

    ``gram`` is ``[..., m, m]``, positive semidefinite with ones on its diagonal. Elimination needs no pivots for such
    matrices, and not every device has the factorisations of torch.linalg.
    """
    rows = torch.cat((gram, right.unsqueeze(-1)), dim=-1)
    rows.diagonal(dim1=-2, dim2=-1).add_(ridge)
    for i in range(gram.shape[-1]):
        pivot = rows[..., i : i + 1, :] / rows[..., i : i + 1, i : i + 1]
        rows = rows - rows[..., i : i + 1] * pivot
        rows[..., i : i + 1, :] = pivot
    return rows[..., -1]


def _differences(vectors: deque[Tensor]) -> Tensor:
    """Subtract from each vector the one before it: ``[..., m, n]``."""
    return torch.stack(list(vectors), dim=-2).diff(dim=-2)


def normalized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors of norm 1, zero where they are zero, and their norms: ``[..., n]`` and ``[...]``.

    No square over- or underflows.
    """
    tiny = torch.finfo(vectors.dtype).tiny
    largest = vectors.abs().amax(dim=-1, keepdim=True).clamp_min_(tiny)
    scaled = vectors / largest
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled.div_(norm.clamp_min(tiny)), largest.mul_(norm).squeeze(-1)


class KeySpace(NamedTuple):
    """The keys as patterns of a Hopfield memory, and all that is read of them.

    Attributes:
        memory: ``[B, H, N_k, D + 1 + D_v]`` in the work dtype: of each key its pattern, the square of the pattern and
            the value, so that one product with weights reads all three. Patterns are keys minus their mean, divided by
            ``scale``, so that they are at most 2.
        scale: ``[B, H, 1, 1]``, a power of two.
        keys: the patterns, prepared for logits.
        logit_scale: the factor of the logits.
        dim: D.
    """

    memory: Tensor
    scale: Tensor
    keys: Keys
    logit_scale: float
    dim: int

    @classmethod
    def prepare(cls, k: Tensor, v: Tensor, logit_scale: float) -> KeySpace:
        """Prepare keys ``[B, H, N_k, D]`` and values ``[B, H, N_k, D_v]`` of the work dtype."""
        patterns = work_copy(k)
        scale = power_of_two_scale(patterns, (-2, -1))
        patterns /= scale
        # Attention does not see an offset that all keys share, but differences of keys would be rounded to its size.
        patterns -= patterns.mean(dim=-2, keepdim=True)
        squares = patterns.square().sum(dim=-1, keepdim=True)
        memory = torch.cat((patterns, squares, v), dim=-1)
        return cls(memory, scale, Keys.prepare(patterns, 1.0), logit_scale, k.shape[3])

    def state(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the directions ``[B, H, N, D]`` of queries and their lengths ``[B, H, N, 1]``.

        The product of a length, a direction and the patterns is a query's logits.
        """
        dtype = self.memory.dtype
        small_factor, large_factor = split_scale(self.logit_scale, dtype)
        direction, length = normalized(q.to(dtype) * small_factor)
        length = length.mul_(large_factor).unsqueeze(-1).mul_(self.scale)
        return direction, length.clamp_(max=torch.finfo(dtype).max)

    def read(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read patterns ``[B, H, N, D]``, squares ``[B, H, N, 1]`` and values ``[B, H, N, D_v]`` by weights.

        The weights are ``[B, H, N, N_k]``.
        """
        found = torch.matmul(weights, self.memory)
        return found[..., : self.dim], found[..., self.dim : self.dim + 1], found[..., self.dim + 1 :]


def retrieve_with_coefficients(
    q: Tensor, keys: Keys, space: KeySpace, config: GuidanceConfig, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute both read-outs, logsumexp and the Anderson vector of rule "anderson" for one chunk of queries.

    With x a state, d and s the dense and the sparse image of the query in key space, whose origin is d, and f the
    residual of the sparse retrieval::

        out = S - gamma_0 (S - D) - gamma_1 (S - V_1) - ...       |gamma_0| + |gamma_1| + ... <= guidance_scale

    where gamma minimises f over the differences of f and each other residual. V_1, V_2, ... are the read-outs of
    further sparse retrievals, each of the state that the last image is. The Anderson vector is
    ``(out - S) / guidance_scale``. The geometry treats it as it treats ``S - D`` in rule "gag".

    Choice of units: a state is a direction from d. It is as long as the keys' distance from d (``radius``), and its
    logits are those of a query in its direction with the length of the original query. docs/method.md has the
    derivation and the reasons ("Anderson acceleration").

    Args:
        q: the queries of the chunk, ``[B, H, N_q, D]``.
        keys: the keys, prepared, without padding.
        space: the same keys as patterns.
        config: the settings.
        mask: the part of the mask for these queries, of rank 4.

    Returns:
        The sparse and the dense read-out, ``[B, H, N_q, D_v]``, the logsumexp of the logits, ``[B, H, N_q, 1]``, and
        the Anderson vector, ``[B, H, N_q, D_v]``. All are in the work dtype.

    Source: arXiv 2603.02531 v1 (attention extrapolation as Anderson acceleration of depth 1). Solving for the
    coefficient, in key space, depths beyond 1 and the choice of units are this project's.
    """
    alpha = config.alpha
    logits, logits_scale = keys.logits(q, mask)
    scaled, maximum = scale_and_shift_(logits, alpha, logits_scale)
    s, _, sparse = space.read(sparse_weights(scaled, alpha))
    weights, total = dense_weights_(scaled, alpha)
    d, square, dense = space.read(weights)
    del logits, scaled, weights
    radius = (square - d.square().sum(dim=-1, keepdim=True)).clamp_min_(0.0).sqrt_()
    query, length = space.state(q)
    image = s - d
    f = image - query * radius
    differences, read_outs = [image], [sparse - dense]
    for _ in range(config.anderson_depth - 1):
        direction, _ = normalized(image)
        logits, state_scale = space.keys.logits(direction * length, mask)
        image, _, value = space.read(sparse_weights(scale_and_shift_(logits, alpha, state_scale)[0], alpha))
        image = image - d
        differences.append(f - (image - direction * radius))
        read_outs.append(sparse - value)
    gamma = coefficients(f, torch.stack(differences, dim=-2), regularization=config.anderson_regularization)
    share = shares(gamma, config.guidance_scale).neg_()
    anderson_vector = read_outs[0].mul_(share[..., :1])
    for index, read_out in enumerate(read_outs[1:], 1):
        anderson_vector.addcmul_(read_out, share[..., index : index + 1])
    return sparse, dense, logsumexp_from_sum(maximum, logits_scale, total), anderson_vector
