# SPDX-License-Identifier: GPL-3.0-or-later
"""Hopfield theory of attention, as a reference for tests: energies, retrieval, Jacobians, contraction bounds.

A state ``xi`` (a query) is retrieved from patterns X (keys) with inverse temperature beta and the weights
``p = entmax_alpha(beta X xi)``: softmax at alpha 1, sparsemax at alpha 2. Retrieval is ``T(xi) = X^T p``. It never
raises the energy

    E(xi) = -conjugate_alpha(beta X xi) / beta + |xi|^2 / 2,    conjugate_alpha(z) = max_p <p, z> + tsallis_alpha(p)

over the weights p that are at least 0 and sum to 1. At alpha 1 the conjugate is logsumexp. The gradient of E is
``xi - T(xi)``, so E is stationary at the fixed points of T. T is a step of the concave-convex procedure: E falls by
at least ``|T(xi) - xi|^2 / 2``.

Sources: arXiv 2008.02217 (dense: energy, retrieval, Jacobian), arXiv 2309.12673 (sparse), arXiv 2402.13725 (any alpha,
by Fenchel-Young losses), arXiv 1905.05702 (alpha-entmax and its Jacobian). Additive constants of the energies are left
out.

Tensors are fp32 or fp64 with any leading dimensions that broadcast. No function reads a value back from the device,
except where its docstring says so.
"""

from __future__ import annotations

import math
from reprlib import repr as short

import torch
from torch import Tensor

from gag_core import entmax
from gag_core.measures import entropy


@torch.no_grad()
def retrieve(states: Tensor, patterns: Tensor, *, beta: float, alpha: float = 1.5) -> Tensor:
    """Retrieve each state once: ``T(xi) = X^T entmax_alpha(beta X xi)``.

    Args:
        states: xi, ``[..., M, D]``.
        patterns: X, ``[..., N, D]``, N at least 1.
        beta: inverse temperature, above 0.
        alpha: 1 (dense) to 2.

    Returns:
        ``[..., M, D]``, within the convex hull of the patterns.

    Raises:
        ValueError, TypeError: shapes do not go together, or beta or alpha is outside its range.

    Source: arXiv 2008.02217 (alpha 1), arXiv 2402.13725 (any alpha).
    """
    return torch.matmul(entmax(_logits(states, patterns, beta), alpha), patterns)


@torch.no_grad()
def energy(states: Tensor, patterns: Tensor, *, beta: float, alpha: float = 1.5) -> Tensor:
    """Compute the energy ``[..., M]`` that :func:`retrieve` never raises; arguments and errors as there.

    Dense: ``-logsumexp(beta X xi) / beta + |xi|^2 / 2``.

    Source: arXiv 2008.02217 (alpha 1), arXiv 2309.12673 (alpha 2), arXiv 2402.13725 (any alpha).
    """
    logits = _logits(states, patterns, beta)
    weights = entmax(logits, alpha)
    conjugate = (weights * logits).sum(dim=-1) + tsallis_entropy(weights, alpha)
    return states.square().sum(dim=-1) / 2.0 - conjugate / beta


@torch.no_grad()
def tsallis_entropy(weights: Tensor, alpha: float) -> Tensor:
    """Compute ``sum(p - p^alpha) / (alpha (alpha - 1))`` over the last axis; Shannon's entropy in nats at alpha 1.

    Source: arXiv 1905.05702: alpha-entmax maximises ``<p, z>`` plus this entropy.
    """
    if alpha == 1.0:
        return entropy(weights)
    # p (1 - p^(alpha - 1)) by expm1, because the bracket cancels for alpha near 1. The logarithm is finite for p = 0.
    bracket = torch.expm1((alpha - 1.0) * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).neg_()
    return (weights * bracket).sum(dim=-1) / (alpha * (alpha - 1.0))


@torch.no_grad()
def effective_support(weights: Tensor) -> Tensor:
    """Compute the number of equal weights with the same entropy, ``exp(entropy)``: ``[..., N] -> [...]``, 1 to N.

    This is the perplexity of the weights. All weights of softmax are above 0, so this is the meaningful support of
    softmax.

    Source: arXiv 2008.02217: a metastable state is shared by this many patterns.
    """
    return entropy(weights).exp_()


@torch.no_grad()
def separation(logits: Tensor) -> Tensor:
    """Compute the largest logit minus the second largest, ``[..., N] -> [...]``; ``-inf`` entries may not be read.

    The result is infinite where only one entry may be read, and 0 where none may. For alpha above 1 and a gap of at
    least ``1 / (alpha - 1)`` retrieval is exact: alpha-entmax then gives all weight to the largest logit.

    Source: arXiv 2008.02217 (separation of patterns), arXiv 2402.13725 (margin and exact retrieval).
    """
    if logits.shape[-1] == 1:
        top, second = logits[..., 0], torch.full_like(logits[..., 0], -torch.inf)
    else:
        top, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    return (top - second).masked_fill(top == -torch.inf, 0.0)


@torch.no_grad()
def weights_jacobian(weights: Tensor, alpha: float) -> Tensor:
    """Compute the Jacobian of alpha-entmax by its logits, from its weights: ``[..., N] -> [..., N, N]``.

    The Jacobian is ``diag(s) - s s^T / sum(s)`` with ``s = p^(2 - alpha)`` on the support and 0 elsewhere. For softmax
    s is p itself. It is symmetric and positive semidefinite, and its rows sum to 0. Its norm is at most 1/2 for softmax
    and at most 1 for every alpha.

    Source: arXiv 1905.05702 (Jacobian of alpha-entmax).
    """
    s = _sensitivity(weights, alpha)
    total = s.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    return torch.diag_embed(s) - s.unsqueeze(-1) * (s / total).unsqueeze(-2)


@torch.no_grad()
def retrieval_jacobian(states: Tensor, patterns: Tensor, *, beta: float, alpha: float = 1.5) -> Tensor:
    """Compute the Jacobian ``beta X^T J X`` of :func:`retrieve` at each state: ``[..., M, D, D]``.

    J is :func:`weights_jacobian`; arguments and errors are those of :func:`retrieve`. The Jacobian is symmetric and
    positive semidefinite. Its largest eigenvalue is the contraction near the state. Extra memory is M times that of the
    patterns.

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
    """Compute the bound of ``|T(a) - T(b)| / |a - b|``, ``[...]``: ``beta |X|^2 / 2`` dense, else ``beta |X|^2``.

    ``|X|`` is the largest singular value of the patterns ``[..., N, D]``. With a bound below 1 retrieval is a
    contraction. A bound above 1, the usual case, does not decide it. On a GPU the singular values wait for the device.

    Source: arXiv 2008.02217 (alpha 1); other alphas: ``p^(2 - alpha) <= 1`` in the Jacobian of arXiv 1905.05702.
    """
    _check_beta(beta)
    largest = torch.linalg.matrix_norm(patterns, ord=2)
    return largest.square() * (beta / 2.0 if alpha == 1.0 else beta)


def _sensitivity(weights: Tensor, alpha: float) -> Tensor:
    """Compute ``p^(2 - alpha)`` on the support and 0 elsewhere, where the power alone would be 1 at alpha 2."""
    return torch.where(weights > 0.0, weights.pow(2.0 - alpha), 0.0)


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
