# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers that describe the guidance of one attention, for GAG Probe, which watches a run.

For each head and query token, S and D are the sparse and the dense read-out of :func:`gag_core.sparse_dense_attention`,
``r = S - D`` is the discrepancy, ``r_par = (<r, S> / <S, S>) S`` its part along S. The guidance vector g and the guided
read-out are those of :func:`gag_core.guided_attention`. Sums run over the query tokens of a head, means over tokens and
heads. A quotient 0 / 0 counts as 0, and a query that may read no key is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .anderson import KeySpace
from .attention import check_config, guided_attention
from .config import GuidanceConfig
from .eager import chunks
from .entmax import dense_weights_, logsumexp_from_sum, scale_and_shift_, sparse_weights
from .geometry import cap_limit, guidance_factors, is_capped, text_mass
from .numerics import Keys, config_numbers, mask_part, power_of_two_scale, weighted_sum_, work_dtype
from .uniform import uniform_read_out

# The golden section in 16 bits. Its multiples modulo 1 lie evenly between 0 and 1, however many there are.
_GOLDEN = 40503
_GOLDEN_BITS = 16
# Error of an inner product of two read-outs by rounding in fp32, relative to their norms.
_ROUNDING = 1e-6
# A guidance vector that was shortened to the cap is as long as the cap, up to this relative error.
_CAP_ERROR = 1e-4

MEASURES: dict[str, str] = {
    "discrepancy": "|r| / |D|: distance of the sparse read-out from the model's own, as sqrt(sum |r|^2 / sum |D|^2)",
    "parallel": "share of r along S: sum |r_par|^2 / sum |r|^2",
    "gain": "|guided - D| / |D|: change of the read-out by guidance, as sqrt(sum |guided - D|^2 / sum |D|^2)",
    "negative": "share of tokens with <r, S> < 0, by more than rounding (1e-6 |S| |D|)",
    "capped": "share of tokens whose guidance vector the cap shortened, |g| > cap",
    "support": "mean number of text tokens with a sparse weight above 0",
    "entropy_sparse": "mean entropy of the sparse weights, -sum p log p, in nats",
    "entropy_dense": "mean entropy of the model's own weights, -sum p log p, in nats",
    "mass": "mean share of the attention that falls on the text; 1 where the text has an attention of its own",
    "contraction": "mean of |T(T(x)) - T(x)| / |T(x) - x|, dense retrieval T from the keys: below 1 it contracts",
}


def sample_queries(tokens: int, most: int, device: torch.device | str = "cpu") -> Tensor:
    """Choose at most ``most`` of ``tokens`` query tokens: rising indices ``[min(tokens, most)]`` int64.

    The tokens are cut into ``most`` equal stretches, and one token is taken of each. Its position in the stretch moves
    on by the golden section from stretch to stretch. The tokens of a picture come row by row, so the sample falls into
    all columns of the picture, whatever its width. The indices are computed on the device.
    """
    if tokens <= most:
        return torch.arange(tokens, device=device)
    stretch = torch.arange(most, device=device)
    start, stop = stretch * tokens // most, (stretch + 1) * tokens // most
    position = (stretch * _GOLDEN) % (1 << _GOLDEN_BITS)
    return start + ((stop - start) * position >> _GOLDEN_BITS)


@torch.no_grad()
def measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    joint_lse: Tensor | None = None,
) -> Tensor:
    """Compute the :data:`MEASURES` of an attention, each averaged over heads and query tokens.

    Args:
        q, k, v: ``[B, H, N_q, D]``, ``[B, H, N_k, D]``, ``[B, H, N_k, D_v]``, as for :func:`gag_core.guided_attention`.
            For a joint attention k and v are those of the text alone.
        config: settings of the guidance, whether it acts or not. With ``merge_heads`` norms and inner products of
            read-outs are over the concatenated heads, as in the guidance.
        mask: of rank 4, bool (True where a query may read a key) or additive, broadcastable to ``[B, H, N_q, N_k]``.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        joint_lse: ``[B, H, N_q]`` in the work dtype, logsumexp of the logits of these queries over a longer sequence
            that these keys are part of. None is a text mass of 1.

    Returns:
        ``[B, len(MEASURES)]``, in their order, fp32 (fp64 for fp64 input). Nothing is read back from the device.

    Raises:
        TypeError: config is not a GuidanceConfig.

    The contraction is that of the dense retrieval ``T(x) = softmax(beta X x) X`` between a state x and its image. X are
    the keys minus their mean. The state lies in the direction of the query, as far out as the keys do (root mean
    square, weighted as the query weights them), and beta is such that its logits are those of the query. So the measure
    does not depend on anything that attention does not see: a common offset of the keys, or a factor that is moved
    between queries, keys and scale.

    Source: arXiv 2603.02531 v2, eq. 12-13 (r, g, guided); arXiv 2008.02217 (retrieval T, its contraction).
    """
    check_config(config)
    work = work_dtype(q)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.to(work), v.to(work)
    weights = _weights(q, k, config.alpha, mask, scale, joint_lse)
    geometry = _geometry(q, k, v, weights, config, mask, scale)
    values = {**_ratios(geometry), **_means(weights, geometry, _contraction(q, k, weights.dense, mask, scale))}
    return torch.stack([values[name] for name in MEASURES]).nan_to_num_().transpose(0, 1)


class _Weights(NamedTuple):
    """Weights of an attention, in the work dtype.

    Attributes:
        sparse, dense: ``[B, H, N_q, N_k]``.
        readable: ``[B, H, N_q, 1]``, 1 for a query that may read a key, else 0.
        mass: ``[B, H, N_q, 1]``, share of the attention that falls on these keys.
    """

    sparse: Tensor
    dense: Tensor
    readable: Tensor
    mass: Tensor


class _Geometry(NamedTuple):
    """Squares and a product of the read-outs of each query token, ``[B, H, N_q, 1]``, or ``[B, 1, N_q, 1]`` if merged.

    The read-outs are divided by a scale, which no quotient of two of these numbers depends on.

    Attributes:
        discrepancy: ``<r, r>``.
        sparse: ``<S, S>``.
        dense: ``<D, D>``.
        product: ``<r, S>``.
        change: ``<c, c>`` of the change ``c = guided - D``.
        parallel: ``<r_par, r_par>``.
        capped: True where the cap shortened the guidance vector.
    """

    discrepancy: Tensor
    sparse: Tensor
    dense: Tensor
    product: Tensor
    change: Tensor
    parallel: Tensor
    capped: Tensor


def _weights(
    q: Tensor, k: Tensor, alpha: float, mask: Tensor | None, scale: float, joint_lse: Tensor | None
) -> _Weights:
    """Compute the weights; arguments as for :func:`measure`, k in the work dtype."""
    logits, logits_scale = Keys.prepare(k, scale).logits(q, mask)
    scaled, maximum = scale_and_shift_(logits, alpha, logits_scale)
    # The softmax overwrites the scaled logits, so the sparse weights come first.
    sparse = None if alpha == 1.0 else sparse_weights(scaled, alpha)
    dense, total = dense_weights_(scaled, alpha)
    readable = (total > 0.0).to(k.dtype)
    if joint_lse is None:
        mass = readable
    else:
        mass = text_mass(logsumexp_from_sum(maximum, logits_scale, total), joint_lse.unsqueeze(3)).to(k.dtype)
    return _Weights(dense if sparse is None else sparse, dense, readable, mass)


def _geometry(
    q: Tensor, k: Tensor, v: Tensor, weights: _Weights, config: GuidanceConfig, mask: Tensor | None, scale: float
) -> _Geometry:
    """Compute the geometry of the read-outs; arguments as for :func:`measure`, k and v in the work dtype."""
    axes = (1, 3) if config.merge_heads else (3,)
    # Values below 2, so that no square leaves the range of the dtype.
    value_scale = power_of_two_scale(v, (2, *axes))
    values = v / value_scale
    sparse, dense = torch.matmul(weights.sparse, values), torch.matmul(weights.dense, values)
    r = sparse - dense
    guidance: Tensor | None = None
    if config.rule == "uniform":
        change = (dense - uniform_read_out(values, mask)) * config_numbers(config, v.dtype).gain
    elif config.rule == "anderson":
        # The guidance vector is solved for, and only the result shows it.
        full = guided_attention(q.to(v.dtype), k, v, replace(config, strength=1.0), mask=mask, scale=scale)
        full = full / value_scale
        change = (full - dense) * config.strength
        guidance = (full - sparse) / max(config.guidance_scale, torch.finfo(v.dtype).tiny)
    else:
        on_sparse, on_r = guidance_factors(sparse, r, value_scale, config, config_numbers(config, v.dtype))
        change = weighted_sum_(torch.ones_like(value_scale), (sparse.clone(), on_sparse), (r, on_r))
    rr, ss, dd, rs, cc = (
        (a * b).sum(dim=axes, keepdim=True)
        for a, b in ((r, r), (sparse, sparse), (dense, dense), (r, sparse), (change, change))
    )
    parallel = _quotient(rs.square(), ss)
    if guidance is not None:
        # This vector is capped already, and is_capped asks for the length before the cap: here a little above it.
        norm = (guidance * guidance).sum(dim=axes, keepdim=True).sqrt() / (1.0 - _CAP_ERROR)
    elif config.rule == "gag":
        # As a hypotenuse, because the square of a large orthogonal_scale would overflow.
        norm = torch.hypot(parallel.sqrt(), config.orthogonal_scale * (rr - parallel).clamp_min_(0.0).sqrt())
    else:
        norm = torch.zeros_like(rr)
    limit = cap_limit(ss.sqrt(), value_scale, config.norm_threshold, config.norm_mode)
    return _Geometry(rr, ss, dd, rs, cc, parallel, is_capped(norm, limit))


def _ratios(geometry: _Geometry) -> dict[str, Tensor]:
    """Compute the measures that are quotients of sums over the tokens of a head; then their means over heads, ``[B]``.

    Each is 0 where its denominator is 0.
    """
    numerators = torch.stack((geometry.discrepancy, geometry.parallel, geometry.change)).sum(dim=3)
    denominators = torch.stack((geometry.dense, geometry.discrepancy, geometry.dense)).sum(dim=3)
    discrepancy, parallel, gain = _quotient(numerators, denominators)
    by_head = {"discrepancy": discrepancy.sqrt(), "parallel": parallel.clamp_max(1.0), "gain": gain.sqrt()}
    return dict(zip(by_head, torch.stack(tuple(by_head.values())).mean(dim=(2, 3)), strict=True))


def _means(weights: _Weights, geometry: _Geometry, contractions: Tensor) -> dict[str, Tensor]:
    """Compute the measures that are means over the tokens and heads, ``[B]``; queries that read no key are left out.

    ``contractions``: the contraction of each query, ``[B, H, N_q, 1]``.
    """
    readable = weights.readable
    negative = geometry.product < -_ROUNDING * (geometry.sparse * geometry.dense).sqrt()
    by_token = {
        "negative": negative.to(readable.dtype).expand_as(readable),
        "capped": geometry.capped.to(readable.dtype).expand_as(readable),
        "support": support_size(weights.sparse).unsqueeze(3),
        "entropy_sparse": entropy(weights.sparse).unsqueeze(3),
        "entropy_dense": entropy(weights.dense).unsqueeze(3),
        "mass": weights.mass,
        "contraction": contractions,
    }
    counts = readable.sum(dim=(1, 2, 3)).clamp_min_(1.0)
    means = (torch.stack(tuple(by_token.values())) * readable).sum(dim=(2, 3, 4)) / counts
    return dict(zip(by_token, means, strict=True))


@torch.no_grad()
def word_shares(
    q: Tensor,
    k: Tensor,
    words: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute the share of each query token's attention on the text that falls on each word, averaged over heads.

    The share is ``softmax(scale q k^T)`` over the keys of the text alone, summed over the tokens of a word. The work is
    done in chunks of queries.

    Args:
        q, k: ``[B, H, N_q, D]`` and ``[B, H, N_k, D]``; the keys are those of the text alone.
        words: ``[N_k, W]``, 1 where a text token is part of a word and 0 elsewhere, fp32.
        mask, scale: as for :func:`measure`.

    Returns:
        ``[B, W, N_q]``, 0 to 1, fp32 (fp64 for fp64 input); 0 for a query that may read no key.

    Source: cross-attention maps averaged over heads, as in arXiv 2210.04885.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    work = work_dtype(q)
    words = words.to(work)
    shares = torch.empty((q.shape[0], q.shape[2], words.shape[1]), dtype=work, device=q.device)
    tokens, dim = k.shape[2:]
    for part, chunks_of_part in chunks(q, per_query=2 * tokens, per_head=tokens * dim, whole_heads=True):
        keys = Keys.prepare(k[part], scale)
        for chunk in chunks_of_part:
            logits, logits_scale = keys.logits(q[chunk], mask_part(mask, *chunk))
            weights, _ = dense_weights_(scale_and_shift_(logits, 1.0, logits_scale)[0], 1.0)
            rows, _, queries = chunk
            shares[rows, queries] = torch.matmul(weights.mean(dim=1), words)
    return shares.transpose(1, 2)


@torch.no_grad()
def entropy(weights: Tensor) -> Tensor:
    """Compute Shannon's entropy ``-sum p log p`` over the last axis, in nats: ``[..., N] -> [...]``.

    A row without any weight has entropy 0.

    Source: arXiv 1905.05702: softmax maximises ``<p, z>`` plus the entropy.
    """
    # The logarithm is finite for a weight of 0, so that the product is 0.
    return (weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(dim=-1).neg_()


@torch.no_grad()
def support_size(weights: Tensor) -> Tensor:
    """Count the weights above 0, in the dtype of the weights: ``[..., N] -> [...]``.

    Source: arXiv 2309.12673: the support of sparse retrieval.
    """
    return (weights > 0.0).sum(dim=-1).to(weights.dtype)


@torch.no_grad()
def contraction(a: Tensor, b: Tensor, image_of_a: Tensor, image_of_b: Tensor) -> Tensor:
    """Compute ``|T(a) - T(b)| / |a - b|``, ``[..., D] -> [...]``: below 1 the map T contracts; 0 where a equals b.

    Source: arXiv 2008.02217 (retrieval as a fixed-point iteration); measured here, not assumed.
    """
    before = torch.linalg.vector_norm(a - b, dim=-1)
    after = torch.linalg.vector_norm(image_of_a - image_of_b, dim=-1)
    return _quotient(after, before)


def _contraction(q: Tensor, k: Tensor, dense_p: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute ``|T(T(x)) - T(x)| / |T(x) - x|`` of each query, ``[B, H, N_q, 1]``; ``dense_p`` are its weights."""
    space = KeySpace.prepare(k, k[..., :0], scale)
    image, square, _ = space.read(dense_p)
    radius = square.sqrt()
    query, length = space.state(q)
    # An image is at most 4 in each dimension, so that its product with beta stays in range.
    largest = torch.finfo(k.dtype).max / 4.0
    beta = _quotient(length, radius).nan_to_num_(nan=0.0).clamp_(max=largest)
    logits, logits_scale = space.keys.logits(image * beta, mask)
    again, _, _ = space.read(dense_weights_(scale_and_shift_(logits, 1.0, logits_scale)[0], 1.0)[0])
    return contraction(query * radius, image, image, again).unsqueeze(3)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a / b`` where b is above 0, else 0."""
    return torch.where(b > 0.0, a / b.clamp_min(torch.finfo(b.dtype).tiny), 0.0)
