# SPDX-License-Identifier: GPL-3.0-or-later
"""Plain fp64 reference of ``gag_core``: the formulas of the paper, nothing fused, chunked or in place.

The paper is arXiv 2603.02531 v2, *Geometry-Aware Attention Guidance for Diffusion Models via Modern Hopfield
Dynamics*. ``S`` and ``D`` are the sparse and the dense read-out, and the extrapolation is its eq. 12-13. The
predecessor rule, PLADIS, is arXiv 2503.07677.

All functions take tensors of any dtype and return fp64. This file shares no code with ``gag_core``, on purpose: the
tests compare the two, and an error in shared code would not be found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Config(Protocol):
    """The fields of ``gag_core.GuidanceConfig`` that the formulas read."""

    @property
    def rule(self) -> str: ...
    @property
    def guidance_scale(self) -> float: ...
    @property
    def norm_threshold(self) -> float: ...
    @property
    def norm_mode(self) -> str: ...
    @property
    def orthogonal_scale(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def strength(self) -> float: ...
    @property
    def merge_heads(self) -> bool: ...
    @property
    def anderson_depth(self) -> int: ...
    @property
    def anderson_regularization(self) -> float: ...


# --- entmax: three algorithms for the same weights -------------------------------------------------------------------
#
# entmax_alpha(z) = argmax over the simplex of <p, z> + Tsallis entropy of order alpha. Its solution is
# p_i = relu(x_i - tau) ** (1 / (alpha - 1)) with x = (alpha - 1) z and tau such that p sums to 1.


def softmax(logits: Tensor) -> Tensor:
    """Compute softmax over the last axis, ``[..., n] -> [..., n]``; a row of only ``-inf`` gives zeros."""
    z = logits.double()
    top = z.amax(-1, keepdim=True)
    powers = torch.exp(z - torch.where(top == -math.inf, 0.0, top))
    return powers / powers.sum(-1, keepdim=True).clamp_min(1e-300)


def entmax_by_sort(logits: Tensor, alpha: float) -> Tensor:
    """Compute entmax for alpha = 1.5 and 2 over the last axis from sorted rows, ``[..., n] -> [..., n]``.

    If the k largest entries are the support, tau solves an equation in the sums of these entries:

    - alpha = 2:    sum (x_i - tau) = 1,    so tau = (sum x - 1) / k;
    - alpha = 1.5:  sum (x_i - tau)^2 = 1,  so tau = mean - sqrt((1 - k variance) / k), the smaller root because
      tau lies below every x_i of the support.

    The true k is the largest one whose own tau still lies below its k-th entry.
    """
    x, nothing_allowed = _shifted(logits, alpha)
    ordered = x.sort(-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, dtype=torch.float64)
    total = ordered.cumsum(-1)
    if alpha == 2.0:
        tau = (total - 1.0) / k
    elif alpha == 1.5:
        mean = total / k
        k_variance = (ordered**2).cumsum(-1) - k * mean**2
        # A k with 1 < k variance has no root, so it is not a support. NaN compares false below.
        tau = mean - torch.sqrt((1.0 - k_variance) / k)
    else:
        raise ValueError(f"the sorted form exists for alpha 1.5 and 2, not for {alpha}")
    support = (tau <= ordered).sum(-1, keepdim=True).clamp_min(1)
    weights = torch.relu(x - tau.gather(-1, support - 1)) ** (1.0 / (alpha - 1.0))
    return torch.where(nothing_allowed, 0.0, weights / weights.sum(-1, keepdim=True))


def entmax_by_bisection(logits: Tensor, alpha: float) -> Tensor:
    """Compute entmax for alpha in (1, 2] over the last axis by bisection of tau, ``[..., n] -> [..., n]``.

    With max x = 0 the bracket is [-1, -n^(1 - alpha)]: at the left end the largest entry alone has weight 1, at
    the right end even n equal entries reach 1 together.
    """
    x, nothing_allowed = _shifted(logits, alpha)
    low = torch.full_like(x[..., :1], -1.0)
    high = torch.full_like(x[..., :1], -(float(x.shape[-1]) ** (1.0 - alpha)))
    for _ in range(60):
        middle = (low + high) / 2.0
        too_heavy = (torch.relu(x - middle) ** (1.0 / (alpha - 1.0))).sum(-1, keepdim=True) >= 1.0
        low = torch.where(too_heavy, middle, low)
        high = torch.where(too_heavy, high, middle)
    weights = torch.relu(x - low) ** (1.0 / (alpha - 1.0))
    return torch.where(nothing_allowed, 0.0, weights / weights.sum(-1, keepdim=True))


def entmax(logits: Tensor, alpha: float = 1.5, dim: int = -1) -> Tensor:
    """Compute entmax along ``dim``, by the sorted form where there is one."""
    rows = logits.movedim(dim, -1)
    if alpha == 1.0:
        weights = softmax(rows)
    elif alpha in (1.5, 2.0):
        weights = entmax_by_sort(rows, alpha)
    else:
        weights = entmax_by_bisection(rows, alpha)
    return weights.movedim(-1, dim)


def _shifted(logits: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Compute ``(alpha - 1) (z - max z)``, clamped at -2, and True for each row in which no key may be read.

    tau is never below -1, so an entry of -2 has weight 0, as all smaller entries have. The clamp changes no weight and
    turns ``-inf`` into a number that can be summed.
    """
    z = logits.double()
    top = z.amax(-1, keepdim=True)
    nothing_allowed = top == -math.inf
    return ((alpha - 1.0) * (z - torch.where(nothing_allowed, 0.0, top))).clamp_min(-2.0), nothing_allowed


# --- attention ------------------------------------------------------------------------------------------------


def attention_logits(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute ``scale * q k^T``, masked: ``[B, H, Nq, D], [B, H, Nk, D] -> [B, H, Nq, Nk]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    z = scale * torch.matmul(q.double(), k.double().transpose(-1, -2))
    if mask is None:
        return z
    if mask.dtype == torch.bool:  # True = may attend, as in torch's own attention
        return torch.where(mask, z, -math.inf)
    return z + mask.double()


def sparse_dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: float = 1.5, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute S = entmax_alpha(z) V and D = softmax(z) V, each ``[B, H, Nq, D]``; a fully masked row is 0 in both."""
    z = attention_logits(q, k, mask, scale)
    return torch.matmul(entmax(z, alpha), v.double()), torch.matmul(softmax(z), v.double())


def extrapolate(sparse: Tensor, dense: Tensor, config: Config, anderson_vector: Tensor | None = None) -> Tensor:
    """Compute the guided read-out before the blend, ``[B, H, N, D]`` (v2, eq. 12-13; PLADIS: D + scale (S - D)).

    ``anderson_vector`` takes the place of S - D for rule "anderson".
    """
    sparse, dense = sparse.double(), dense.double()
    if config.rule == "pladis":
        return dense + config.guidance_scale * (sparse - dense)
    r = sparse - dense if anderson_vector is None else anderson_vector
    if config.merge_heads:
        return _split(_gag(_merge(sparse), _merge(r), config), like=sparse)
    return _gag(sparse, r, config)


def cap(length: Tensor, limit: Tensor) -> Tensor:
    """Compute the length of the guidance vector after the cap, for lengths of at least 0.

    This is the same function as ``gag_core.geometry.cap``.
    """
    return torch.minimum(length, limit)


def cap_limit(sparse_norm: Tensor, config: Config) -> Tensor:
    """Compute the largest length that the cap allows, from ||S||."""
    return config.norm_threshold * (sparse_norm if config.norm_mode == "relative" else torch.ones_like(sparse_norm))


def _gag(sparse: Tensor, r: Tensor, config: Config) -> Tensor:
    """Compute S + lambda g on the last axis."""
    square = (sparse * sparse).sum(-1, keepdim=True)
    # A zero S has no direction, so no part of r lies along it.
    along = torch.where(square > 0, (r * sparse).sum(-1, keepdim=True) / square, 0.0)
    r_par = along * sparse
    r_perp = r - r_par
    g = r_par + config.orthogonal_scale * r_perp
    if not math.isinf(config.norm_threshold):
        length = g.norm(dim=-1, keepdim=True)
        capped = cap(length, cap_limit(sparse.norm(dim=-1, keepdim=True), config))
        g = torch.where(length > 0, g * (capped / length), g)
    return sparse + config.guidance_scale * g


def _merge(heads: Tensor) -> Tensor:
    """Concatenate the heads of each token: ``[B, H, N, D] -> [B, N, H * D]``."""
    return heads.transpose(1, 2).flatten(2)


def _split(tokens: Tensor, like: Tensor) -> Tensor:
    """Split tokens into heads again: ``[B, N, H * D] -> [B, H, N, D]``."""
    return tokens.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2)


def combine(sparse: Tensor, dense: Tensor, config: Config) -> Tensor:
    """Compute ``D + strength (guided - D)``, ``[B, H, N, D]``."""
    dense = dense.double()
    return dense + config.strength * (extrapolate(sparse, dense, config) - dense)


def guided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Config,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Compute guided cross-attention ``[B, H, Nq, D]``; ``base`` is the host's own output in the place of D."""
    sparse, dense = sparse_dense_attention(q, k, v, alpha=config.alpha, mask=mask, scale=scale)
    if config.rule == "uniform":
        start = dense if base is None else base.double()
        return start + config.strength * config.guidance_scale * (dense - uniform_read_out(q, k, v, mask))
    anderson_vector = (
        solve_anderson_vector(q, k, v, config, mask=mask, scale=scale) if config.rule == "anderson" else None
    )
    start = dense if base is None else base.double()
    return start + config.strength * (extrapolate(sparse, dense, config, anderson_vector) - dense)


def uniform_read_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute U of each query, ``[B, H, Nq, D]``: the retrieval at infinite temperature, where only the mask counts."""
    return torch.matmul(softmax(attention_logits(torch.zeros_like(q), k, mask, 1.0)), v.double())


# The text tokens of a joint sequence: a slice, or slices in the order of the sequence.
Text = slice | Sequence[slice]


def text_indices(text: Text, tokens: int) -> Tensor:
    """Return the indices of the text tokens in a sequence of ``tokens`` keys, in their order."""
    slices = [text] if isinstance(text, slice) else text
    return torch.cat([torch.arange(tokens)[part] for part in slices])


def image_queries(text: Text, queries: int, keys: int) -> Tensor:
    """Return the indices of the image queries: all of fewer queries than keys, else those that are no text tokens."""
    texts = set(text_indices(text, keys).tolist()) if queries == keys else set()
    return torch.tensor([index for index in range(queries) if index not in texts], dtype=torch.long)


def text_mass(q: Tensor, k: Tensor, text: Text, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute m, the share of the joint softmax that falls on text keys, ``[B, H, N, 1]``."""
    weights = softmax(attention_logits(q, k, mask, scale))
    return weights[..., text_indices(text, k.shape[-2])].sum(-1, keepdim=True)


def guided_joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: Text,
    config: Config,
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute guided joint attention ``[B, H, N_q, D]``: O_joint + strength m (GAG(S_T, D_T) - D_T) on image queries.

    S_T and D_T are read-outs over the text keys alone. Other queries keep O_joint.
    """
    z = attention_logits(q, k, mask, scale)
    joint = torch.matmul(softmax(z), v.double()) if base is None else base.double()
    words = text_indices(text, k.shape[-2])
    z_text, v_text = z[..., words], v.double()[..., words, :]
    sparse = torch.matmul(entmax(z_text, config.alpha), v_text)
    dense = torch.matmul(softmax(z_text), v_text)
    mass = softmax(z)[..., words].sum(-1, keepdim=True)
    text_mask = None if mask is None else mask.expand(z.shape)[..., words]
    anderson_vector = None
    if config.rule == "uniform":
        extrapolated = dense + config.guidance_scale * (
            dense - uniform_read_out(q, k[..., words, :], v_text, text_mask)
        )
    elif config.rule == "anderson":
        anderson_vector = solve_anderson_vector(
            q, k[..., words, :], v[..., words, :], config, mask=text_mask, scale=scale
        )
    if config.rule != "uniform":
        extrapolated = extrapolate(sparse, dense, config, anderson_vector)
    guided = joint + config.strength * mass * (extrapolated - dense)
    is_image = torch.zeros(q.shape[-2], 1, dtype=torch.bool)
    is_image[image_queries(text, q.shape[-2], k.shape[-2])] = True
    return torch.where(is_image, guided, joint)


# --- rule "anderson" ------------------------------------------------------------------------------------------------
#
# One query at a time. Key space has its origin at d, the image of the dense retrieval. A state is a point on the sphere
# around d whose radius is the distance of the keys from d (root mean square, weighted by the softmax).


def solve_anderson_vector(
    q: Tensor, k: Tensor, v: Tensor, config: Config, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute ``(out - S) / guidance_scale`` before the geometry, ``[B, H, Nq, D]``; 0 at alpha 1."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = attention_logits(torch.zeros_like(q), k, mask, 1.0)
    anderson_vector = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    if config.alpha == 1.0:
        return anderson_vector
    for b, h, n in itertools.product(*map(range, q.shape[:3])):
        problem = anderson_problem(
            scale * q[b, h, n].double(), k[b, h].double(), v[b, h].double(), bias[b, h, n], config
        )
        gamma = tikhonov(problem.residual, problem.differences, config.anderson_regularization)
        total = float(gamma.abs().sum())
        if total > 0.0:
            anderson_vector[b, h, n] = -(gamma @ problem.read_outs) / max(config.guidance_scale, total)
    return anderson_vector


class AndersonProblem(NamedTuple):
    """Least squares problem of one query.

    Attributes:
        residual: residual of the sparse retrieval, ``[D]``.
        differences: that residual minus each other residual, ``[m, D]``.
        read_outs: the sparse read-out minus each other read-out, ``[m, Dv]``.
    """

    residual: Tensor
    differences: Tensor
    read_outs: Tensor


def anderson_problem(query: Tensor, k: Tensor, v: Tensor, bias: Tensor, config: Config) -> AndersonProblem:
    """Set up the problem of one scaled query ``[D]`` with its keys, values and additive mask ``[Nk]``; all fp64."""
    z = k @ query + bias
    p, s = softmax(z), entmax(z, config.alpha)
    origin = p @ k
    radius = torch.sqrt(p @ (k - origin).square().sum(-1))
    state = radius * _direction(query)
    image = s @ k - origin if s.sum() > 0 else torch.zeros_like(query)
    residual = image - state
    other_residuals, other_read_outs = [-state], [p @ v]
    for _ in range(config.anderson_depth - 1):
        weights = entmax(query.norm() * (k @ _direction(image)) + bias, config.alpha)
        state = radius * _direction(image)
        image = weights @ k - origin
        other_residuals.append(image - state)
        other_read_outs.append(weights @ v)
    return AndersonProblem(residual, residual - torch.stack(other_residuals), s @ v - torch.stack(other_read_outs))


def tikhonov(residual: Tensor, differences: Tensor, regularization: float) -> Tensor:
    """Find gamma ``[m]`` with the least |f - gamma differences|^2 + regularization sum gamma_j^2 |difference_j|^2.

    This is plain least squares with one more row per coefficient.
    """
    lengths = differences.norm(dim=-1)
    rows = torch.cat([differences.T, math.sqrt(regularization) * torch.diag(lengths)])
    wanted = torch.cat([residual, torch.zeros_like(lengths)])
    if not rows.any():
        return torch.zeros_like(lengths)
    # All columns get the same length, so that the solver's threshold for nearly parallel columns does not depend on it.
    sizes = torch.where(lengths > 0, lengths, 1.0)
    return torch.linalg.lstsq(rows / sizes, wanted[:, None], driver="gelsd").solution[:, 0] / sizes


def _direction(vector: Tensor) -> Tensor:
    length = vector.norm()
    return vector / length if length > 0 else torch.zeros_like(vector)
