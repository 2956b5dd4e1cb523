# SPDX-License-Identifier: GPL-3.0-or-later
"""Attention as retrieval from a Hopfield memory: energies, retrieval, Jacobians and what can be measured of them.

A state ``xi`` (a query) is retrieved from patterns X (keys) with inverse temperature beta and the weights
``p = entmax_alpha(beta X xi)``: softmax at alpha 1, sparsemax at alpha 2. Retrieval is ``T(xi) = X^T p``. It never
raises the energy

    E(xi) = -conjugate_alpha(beta X xi) / beta + |xi|^2 / 2,    conjugate_alpha(z) = max_p <p, z> + tsallis_alpha(p)

over the weights p that are at least 0 and sum to 1. At alpha 1 the conjugate is logsumexp. The gradient of E is
``xi - T(xi)``, so fixed points of T are where E is stationary, and T is a step of the concave-convex procedure: E falls
by ``|T(xi) - xi|^2 / 2`` at least.

Sources: arXiv 2008.02217 (dense: energy, retrieval, Jacobian), arXiv 2309.12673 (sparse), arXiv 2402.13725 (any alpha,
by Fenchel-Young losses), arXiv 1905.05702 (alpha-entmax and its Jacobian). Additive constants of the energies are left
out.

Tensors are fp32 or fp64 with any leading dimensions that broadcast; nothing here reads a value back from the device,
except where a docstring says so.
"""

from __future__ import annotations

import math
from reprlib import repr as short

import torch
from torch import Tensor

from .entmax import entmax


@torch.no_grad()
def retrieve(states: Tensor, patterns: Tensor, *, beta: float, alpha: float = 1.5) -> Tensor:
    """One retrieval ``T(xi) = X^T entmax_alpha(beta X xi)`` of each state.

    Args:
        states: xi, ``[..., M, D]``.
        patterns: X, ``[..., N, D]``, N at least 1.
        beta: inverse temperature, above 0.
        alpha: 1 (dense) to 2.

    Returns:
        ``[..., M, D]``, within the convex hull of the patterns.

    Raises:
        ValueError, TypeError: shapes that do not go together, or a beta or an alpha outside its range.

    Source: arXiv 2008.02217 (alpha 1), arXiv 2402.13725 (any alpha).
    """
    return torch.matmul(entmax(_logits(states, patterns, beta), alpha), patterns)


@torch.no_grad()
def energy(states: Tensor, patterns: Tensor, *, beta: float, alpha: float = 1.5) -> Tensor:
    """The energy ``[..., M]`` that :func:`retrieve` never raises; arguments and errors as there.

    Dense: ``-logsumexp(beta X xi) / beta + |xi|^2 / 2``.

    Source: arXiv 2008.02217 (alpha 1), arXiv 2309.12673 (alpha 2), arXiv 2402.13725 (any alpha).
    """
    logits = _logits(states, patterns, beta)
    weights = entmax(logits, alpha)
    conjugate = (weights * logits).sum(dim=-1) + tsallis_entropy(weights, alpha)
    return states.square().sum(dim=-1) / 2.0 - conjugate / beta


@torch.no_grad()
def tsallis_entropy(weights: Tensor, alpha: float) -> Tensor:
    """``sum(p - p^alpha) / (alpha (alpha - 1))`` over the last axis, at alpha 1 Shannon's entropy in nats.

    Source: arXiv 1905.05702: alpha-entmax maximises ``<p, z>`` plus it.
    """
    if alpha == 1.0:
        return entropy(weights)
    # As p (1 - p^(alpha - 1)), whose bracket would cancel for alpha near 1.
    bracket = torch.expm1((alpha - 1.0) * _log(weights)).neg_()
    return (weights * bracket).sum(dim=-1) / (alpha * (alpha - 1.0))


@torch.no_grad()
def entropy(weights: Tensor) -> Tensor:
    """Shannon's entropy ``-sum p log p`` over the last axis, in nats: ``[..., N] -> [...]``. No weight at all gives 0.

    Source: arXiv 1905.05702: softmax maximises ``<p, z>`` plus it.
    """
    return (weights * _log(weights)).sum(dim=-1).neg_()


@torch.no_grad()
def effective_support(weights: Tensor) -> Tensor:
    """How many equal weights have the same entropy, ``exp(entropy)``: ``[..., N] -> [...]``, from 1 to N.

    The perplexity of the weights. Of softmax, whose weights are all above 0, it is the support that there is to speak
    of.

    Source: arXiv 2008.02217: a metastable state is one that so many patterns share.
    """
    return entropy(weights).exp_()


@torch.no_grad()
def support_size(weights: Tensor) -> Tensor:
    """How many weights are above 0, as a number of the weights' dtype: ``[..., N] -> [...]``.

    Source: arXiv 2309.12673: the support of sparse retrieval.
    """
    return (weights > 0.0).sum(dim=-1).to(weights.dtype)


@torch.no_grad()
def separation(logits: Tensor) -> Tensor:
    """The largest logit minus the second largest, ``[..., N] -> [...]``; ``-inf`` entries may not be read.

    Infinite where one entry alone may be read, 0 where none may. For alpha above 1 and a gap of ``1 / (alpha - 1)`` or
    more retrieval is exact: alpha-entmax then gives all weight to the largest.

    Source: arXiv 2008.02217 (separation of patterns), arXiv 2402.13725 (margin and exact retrieval).
    """
    if logits.shape[-1] == 1:
        top, second = logits[..., 0], torch.full_like(logits[..., 0], -torch.inf)
    else:
        top, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    return (top - second).masked_fill(top == -torch.inf, 0.0)


@torch.no_grad()
def weights_jacobian(weights: Tensor, alpha: float) -> Tensor:
    """Jacobian of alpha-entmax with respect to its logits, from its weights: ``[..., N] -> [..., N, N]``.

    ``diag(s) - s s^T / sum(s)`` with ``s = p^(2 - alpha)`` on the support and 0 elsewhere. For softmax s is p itself.
    Symmetric, positive semidefinite, rows sum to 0; its norm is at most 1/2 for softmax and at most 1 for every alpha.

    Source: arXiv 1905.05702 (Jacobian of alpha-entmax).
    """
    s = _sensitivity(weights, alpha)
    total = s.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    return torch.diag_embed(s) - s.unsqueeze(-1) * (s / total).unsqueeze(-2)


@torch.no_grad()
def retrieval_jacobian(states: Tensor, patterns: Tensor, *, beta: float, alpha: float = 1.5) -> Tensor:
    """Jacobian ``beta X^T J X`` of :func:`retrieve` at each state, ``[..., M, D, D]``; arguments and errors as there.

    J is :func:`weights_jacobian`. Symmetric and positive semidefinite; how much retrieval contracts near a state is its
    largest eigenvalue. Extra memory is M times that of the patterns.

    Source: arXiv 2008.02217 (alpha 1), with the Jacobian of arXiv 1905.05702 for any alpha.
    """
    s = _sensitivity(entmax(_logits(states, patterns, beta), alpha), alpha)
    total = s.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    x = patterns.unsqueeze(-3)
    mean = torch.matmul(s / total, patterns)
    spread = torch.matmul((x * s.unsqueeze(-1)).transpose(-1, -2), x)
    return beta * (spread - total.unsqueeze(-1) * mean.unsqueeze(-1) * mean.unsqueeze(-2))


@torch.no_grad()
def contraction_bound(patterns: Tensor, *, beta: float, alpha: float = 1.5) -> Tensor:
    """What ``|T(a) - T(b)| / |a - b|`` cannot exceed: ``beta |X|^2 / 2`` dense, else ``beta |X|^2``; ``[...]``.

    ``|X|`` is the largest singular value of the patterns ``[..., N, D]``. Below 1 retrieval is a contraction; above 1
    nothing is said, which is the usual case. On a GPU the singular values wait for the device.

    Source: arXiv 2008.02217 (alpha 1); other alphas: ``p^(2 - alpha) <= 1`` in the Jacobian of arXiv 1905.05702.
    """
    _check_beta(beta)
    largest = torch.linalg.matrix_norm(patterns, ord=2)
    return largest.square() * (beta / 2.0 if alpha == 1.0 else beta)


@torch.no_grad()
def contraction(a: Tensor, b: Tensor, image_of_a: Tensor, image_of_b: Tensor) -> Tensor:
    """How much a map brought two states together: ``|T(a) - T(b)| / |a - b|``, ``[..., D] -> [...]``.

    Below 1 it contracts there. 0 where a and b are one state.

    Source: arXiv 2008.02217 (retrieval as a fixed-point iteration); measured here, not assumed.
    """
    before = torch.linalg.vector_norm(a - b, dim=-1)
    after = torch.linalg.vector_norm(image_of_a - image_of_b, dim=-1)
    return torch.where(before > 0.0, after / before.clamp_min(torch.finfo(before.dtype).tiny), 0.0)


def _sensitivity(weights: Tensor, alpha: float) -> Tensor:
    """``p^(2 - alpha)`` on the support; the power alone would be 1 off it at alpha 2."""
    return torch.where(weights > 0.0, weights.pow(2.0 - alpha), 0.0)


def _log(weights: Tensor) -> Tensor:
    """A logarithm that times a weight of 0 is 0."""
    return weights.clamp_min(torch.finfo(weights.dtype).tiny).log()


def _logits(states: Tensor, patterns: Tensor, beta: float) -> Tensor:
    _check_beta(beta)
    for name, tensor in (("states", states), ("patterns", patterns)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64) or tensor.ndim < 2:
            given = f"{tuple(tensor.shape)} in {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an fp32 or fp64 tensor [..., number, dim], got {given}.")
    if states.shape[-1] != patterns.shape[-1] or patterns.shape[-2] == 0:
        raise ValueError(
            "states [..., M, D] and patterns [..., N, D] must have one D and at least one pattern, "
            f"got {tuple(states.shape)} and {tuple(patterns.shape)}."
        )
    return torch.matmul(states * beta, patterns.transpose(-1, -2))


def _check_beta(beta: float) -> None:
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0.0 < beta < math.inf:
        raise ValueError(f"beta must be a finite number above 0, got {short(beta)}.")
