# SPDX-License-Identifier: GPL-3.0-or-later
"""Plain fp64 reference of ``gag_core.measures``: one head and one query at a time, nothing shared with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import reference


def measures(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Any,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    mass: Tensor | None = None,
) -> dict[str, list[float]]:
    """Compute each measure, by name, for each batch row. ``mass`` is that of each query ``[B, H, N, 1]``; None is 1."""
    rows = [_measures_of_row(parts, config) for parts in _rows(q, k, v, config, mask, scale, mass)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _rows(
    q: Tensor, k: Tensor, v: Tensor, config: Any, mask: Tensor | None, scale: float | None, mass: Tensor | None
) -> Iterator[tuple[Any, ...]]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    z = reference.attention_logits(q, k, mask, scale)
    p, s = reference.softmax(z), reference.entmax(z, config.alpha)
    guided = reference.guided_attention(q, k, v, config, mask=mask, scale=scale)
    additive = torch.zeros_like(z) if mask is None else z - reference.attention_logits(q, k, None, scale)
    for b in range(q.shape[0]):
        yield (
            scale * q[b].double(), k[b].double(), v[b].double(), z[b], p[b], s[b], guided[b], additive[b],
            torch.ones_like(z[b, :, :, :1]) if mass is None else mass[b].double(),
        )  # fmt: skip


def _measures_of_row(parts: tuple[Tensor, ...], config: Any) -> dict[str, float]:
    q, k, v, z, p, s, guided, additive, mass = parts
    heads, queries, _ = z.shape
    readable = [[bool((z[h, n] > -math.inf).any()) for n in range(queries)] for h in range(heads)]
    dense, sparse = p @ v, s @ v
    # Norms are taken of the vectors of each head, or of all heads of a token together.
    if config.merge_heads:
        groups = [[(dense[:, n].flatten(), sparse[:, n].flatten(), guided[:, n].flatten()) for n in range(queries)]]
        counted = [[sum(readable[h][n] for h in range(heads)) for n in range(queries)]]
    else:
        groups = [[(dense[h, n], sparse[h, n], guided[h, n]) for n in range(queries)] for h in range(heads)]
        counted = [list(map(int, seen)) for seen in readable]
    discrepancy, parallel, gain = [], [], []
    negative, capped = [], []
    for group, seen in zip(groups, counted, strict=True):
        rr = dd = pp = cc = 0.0
        for (d, t, out), known in zip(group, seen, strict=True):
            r = t - d
            square = float(t @ t)
            r_par = (float(r @ t) / square) * t if square > 0 else torch.zeros_like(t)
            rr, dd, pp, cc = (
                rr + float(r @ r),
                dd + float(d @ d),
                pp + float(r_par @ r_par),
                cc + float((out - d) @ (out - d)),
            )
            g = r_par + config.orthogonal_scale * (r - r_par)
            shortened = bool(reference.cap(g.norm(), reference.cap_limit(t.norm(), config)) < g.norm())
            # Counted once for each head that may read a key.
            negative += known * [float(r @ t) < -1e-6 * float(t.norm() * d.norm())]
            capped += known * [config.rule == "gag" and shortened]
        discrepancy.append(math.sqrt(rr / dd) if dd > 0 else 0.0)
        parallel.append(pp / rr if rr > 0 else 0.0)
        gain.append(math.sqrt(cc / dd) if dd > 0 else 0.0)
    each = [(h, n) for h in range(heads) for n in range(queries) if readable[h][n]]
    return {
        "discrepancy": _mean(discrepancy),
        "parallel": _mean(parallel),
        "negative": _mean(negative),
        "capped": _mean(capped),
        "gain": _mean(gain),
        "support": _mean([int((s[h, n] > 0).sum()) for h, n in each]),
        "entropy_sparse": _mean([_entropy(s[h, n]) for h, n in each]),
        "entropy_dense": _mean([_entropy(p[h, n]) for h, n in each]),
        "mass": _mean([float(mass[h, n]) for h, n in each]),
        "contraction": _mean([_contraction(q[h, n], k[h], p[h, n], additive[h, n]) for h, n in each]),
    }


def _mean(values: list[Any]) -> float:
    return sum(map(float, values)) / len(values) if values else 0.0


def _entropy(weights: Tensor) -> float:
    positive = weights[weights > 0]
    return -float((positive * positive.log()).sum())


def _contraction(q: Tensor, k: Tensor, p: Tensor, additive: Tensor) -> float:
    """Compute the distance of a second retrieval from the first, relative to that of the first from the state."""
    patterns = k - k.mean(0)
    radius = math.sqrt(float(p @ (patterns**2).sum(1)))
    length = float(q.norm())
    if radius == 0.0:
        return 0.0
    state = q / length * radius if length > 0 else torch.zeros_like(q)
    beta = length / radius
    first = p @ patterns
    second = reference.softmax(beta * patterns @ first + additive) @ patterns
    before = float((first - state).norm())
    return float((second - first).norm()) / before if before > 0 else 0.0


def word_shares(q: Tensor, k: Tensor, words: list[tuple[int, ...]], mask: Tensor | None = None) -> Tensor:
    """Compute the share of attention on each word's tokens for each query, ``[B, W, N]``, mean over heads."""
    p = reference.softmax(reference.attention_logits(q, k, mask)).mean(1)
    return torch.stack([sum((p[:, :, token] for token in word), torch.zeros_like(p[:, :, 0])) for word in words], dim=1)
