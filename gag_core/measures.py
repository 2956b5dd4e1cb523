# SPDX-License-Identifier: GPL-3.0-or-later
"""What guidance sees and does in one attention, in a few numbers: for a probe that watches a run.

Per head, query token and its read-outs S (sparse) and D (dense) of :func:`gag_core.sparse_dense_attention`, with
``r = S - D``, its part ``r_par = (<r, S> / <S, S>) S`` along S, the guidance vector g and the guided read-out as
:func:`gag_core.guided_attention` has them. Sums run over the query tokens of a head, means over tokens and heads; what
is 0 / 0 counts as 0, and a query that may read no key is left out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .attention import guided_attention
from .config import GuidanceConfig, check_config
from .eager import Keys, KeySpace, chunks, mask_part, size_of, work_dtype
from .entmax import dense_weights_, logsumexp_of, scale_and_shift_, sparse_weights
from .geometry import blended_, extrapolation
from .hopfield import contraction, entropy, support_size

# The golden section: its multiples fall evenly between 0 and 1 however many there are.
_GOLDEN = 40503
_GOLDEN_BITS = 16
# As far as rounding in fp32 may turn an inner product of two read-outs, relative to their norms.
_ROUNDING = 1e-6
# How close to the cap, relatively, a guidance vector is that was cut down to it.
_CUT = 1e-4

MEASURES: dict[str, str] = {
    "discrepancy": "|r| / |D|: how far the sparse reading is from the model's own, as sqrt(sum |r|^2 / sum |D|^2)",
    "parallel": "share of r along S: sum |r_par|^2 / sum |r|^2",
    "gain": "|guided - D| / |D|: how much guidance changes what is read, as sqrt(sum |guided - D|^2 / sum |D|^2)",
    "negative": "share of tokens with <r, S> < 0, by more than rounding (1e-6 |S| |D|)",
    "capped": "share of tokens whose guidance vector the cap shortened, |g| > cap",
    "support": "mean number of text tokens that the sparse reading listens to",
    "entropy_sparse": "mean entropy of the sparse weights, -sum p log p, in nats",
    "entropy_dense": "mean entropy of the model's own weights, in nats",
    "mass": "mean share of the attention that falls on the text; 1 where the text has an attention of its own",
    "contraction": "mean of |T(T(x)) - T(x)| / |T(x) - x|, dense retrieval T from the keys: below 1 it contracts",
}


def sample_queries(tokens: int, most: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers of at most ``most`` of ``tokens`` query tokens, rising: ``[min(tokens, most)]`` int64.

    One out of each of as many equal stretches, at a place in it that moves on by the golden section: so a sample of a
    picture's tokens, which come row by row, falls into all of its columns whatever its width. Made on the device.
    """
    if tokens <= most:
        return torch.arange(tokens, device=device)
    numbers = torch.arange(most, device=device)
    first, after = numbers * tokens // most, (numbers + 1) * tokens // most
    place = (numbers * _GOLDEN) % (1 << _GOLDEN_BITS)
    return first + ((after - first) * place >> _GOLDEN_BITS)


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
    """The :data:`MEASURES` of an attention, each averaged over heads and query tokens.

    Args:
        q, k, v: ``[B, H, N_q, D]``, ``[B, H, N_k, D]``, ``[B, H, N_k, D_v]``, as for :func:`gag_core.guided_attention`;
            of a joint attention only the text's keys and values.
        config: what guidance is or would be set to. With ``merge_heads`` norms and inner products of read-outs are
            over the concatenated heads, as guidance takes them.
        mask: of rank 4, bool (True may be read) or additive, broadcastable to ``[B, H, N_q, N_k]``.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        joint_lse: ``[B, H, N_q]``, logsumexp of these queries' logits over a longer sequence that these keys are part
            of, in the work dtype; None is a text mass of 1.

    Returns:
        ``[B, len(MEASURES)]``, in their order, fp32 (fp64 for fp64 input). Nothing is read back from the device.

    Raises:
        TypeError: config is not a GuidanceConfig.

    The contraction is that of the dense retrieval ``T(x) = softmax(beta X x) X`` between a state x and its image. X are
    the keys from their mean, and x lies in the query's direction, as far out as the keys do (root mean square, weighted
    as the query weights them), with the beta that gives it the query's logits. So it does not depend on what attention
    cannot tell: a common offset of the keys, or which of queries, keys and scale a factor belongs to.

    Source: arXiv 2603.02531 v2, eq. 12-13 (r, g, guided); arXiv 2008.02217 (retrieval T, its contraction).
    """
    check_config(config)
    work = work_dtype(q)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.to(work), v.to(work)
    logits, unit = Keys.of(k, scale).logits(q, mask)
    scaled, maximum = scale_and_shift_(logits, config.alpha, unit)
    sparse_p = None if config.alpha == 1.0 else sparse_weights(scaled, config.alpha)
    dense_p, total = dense_weights_(scaled, config.alpha)
    if sparse_p is None:
        sparse_p = dense_p
    readable = (total > 0.0).to(work)

    # Values of at most 2, so that no square leaves the range of the dtype.
    axes = (1, 3) if config.merge_heads else (3,)
    size = size_of(v, (2, *axes))
    values = v / size
    sparse, dense = torch.matmul(sparse_p, values), torch.matmul(dense_p, values)
    r = sparse - dense
    solved = config.rule == "anderson"
    if solved:
        # What the result is extrapolated along is solved for, and known by the result alone.
        full = guided_attention(q.to(work), k, v, replace(config, strength=1.0), mask=mask, scale=scale) / size
        change = (full - dense) * config.strength
        guidance = (full - sparse) / max(config.guidance_scale, _tiny(v))
    else:
        on_sparse, on_r = extrapolation(sparse, r, size, config)
        change = blended_(torch.ones_like(size), (sparse.clone(), on_sparse), (r, on_r))
    rr, ss, dd, rs, cc = (
        (a * b).sum(dim=axes, keepdim=True)
        for a, b in ((r, r), (sparse, sparse), (dense, dense), (r, sparse), (change, change))
    )
    # |r_par|^2, and whether the cap is short of g.
    along = _quotient(rs.square(), ss)
    cap = config.norm_threshold * ss.sqrt() if config.norm_mode == "relative" else config.norm_threshold / size
    if solved:
        capped = (guidance * guidance).sum(dim=axes, keepdim=True).sqrt() > cap * (1.0 - _CUT)
    elif config.rule == "gag":
        # As a hypotenuse, because a large orthogonal_scale has no square.
        capped = torch.hypot(along.sqrt(), config.orthogonal_scale * (rr - along).clamp_min_(0.0).sqrt()) > cap
    else:
        capped = torch.zeros_like(rr, dtype=torch.bool)

    # Sums over the tokens of each head, and of their quotients the mean over heads.
    over, under = (torch.stack(parts).sum(dim=3) for parts in ((rr, along, cc), (dd, rr, dd)))
    ratios = _quotient(over, under)
    ratios = torch.stack((ratios[0].sqrt(), ratios[1].clamp_max(1.0), ratios[2].sqrt()))
    # Means over tokens and heads.
    if joint_lse is None:
        mass = readable
    else:
        lse = logsumexp_of(maximum, unit, total)
        mass = (lse - joint_lse.unsqueeze(3)).exp().nan_to_num(nan=0.0).clamp_max(1.0)
    each = (
        (rs < -_ROUNDING * (ss * dd).sqrt()).to(work).expand_as(readable),
        capped.to(work).expand_as(readable),
        support_size(sparse_p).unsqueeze(3),
        entropy(sparse_p).unsqueeze(3),
        entropy(dense_p).unsqueeze(3),
        mass.to(work),
        _contraction(q, k, dense_p, mask, scale),
    )
    means = (torch.stack(each) * readable).sum(dim=(2, 3, 4)) / readable.sum(dim=(1, 2, 3)).clamp_min_(1.0)
    return torch.cat((ratios.mean(dim=(2, 3)), means)).nan_to_num_().transpose(0, 1)


@torch.no_grad()
def word_shares(
    q: Tensor,
    k: Tensor,
    words: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Of what each query token reads of the text, the share that falls on the tokens of each word; mean over heads.

    ``softmax(scale q k^T)`` over the text's keys alone, summed over a word's tokens.

    Args:
        q, k: ``[B, H, N_q, D]`` and ``[B, H, N_k, D]``, the latter of the text alone.
        words: ``[N_k, W]``, 1 where a text token is part of a word and 0 elsewhere, fp32.
        mask, scale: as for :func:`measure`.

    Returns:
        ``[B, W, N_q]``, 0 to 1, fp32 (fp64 for fp64 input); 0 for a query that may read nothing. Works over chunks of
        queries.

    Source: cross-attention maps averaged over heads, as in arXiv 2210.04885.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    work = work_dtype(q)
    words = words.to(work)
    shares = torch.empty((q.shape[0], q.shape[2], words.shape[1]), dtype=work, device=q.device)
    for part, places in chunks(q, held=2 * k.shape[2], copied=k.shape[2] * k.shape[3], whole_heads=True):
        keys = Keys.of(k[part], scale)
        for place in places:
            logits, unit = keys.logits(q[place], mask_part(mask, place))
            weights, _ = dense_weights_(scale_and_shift_(logits, 1.0, unit)[0], 1.0)
            shares[place[0], place[2]] = torch.matmul(weights.mean(dim=1), words)
    return shares.transpose(1, 2)


def _contraction(q: Tensor, k: Tensor, dense_p: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``|T(T(x)) - T(x)| / |T(x) - x|`` of each query, ``[B, H, N_q, 1]``; ``dense_p`` are its weights."""
    space = KeySpace.of(k, k[..., :0], scale)
    image, square, _ = space.read(dense_p)
    radius = square.sqrt()
    query, length = space.state(q)
    # An image is at most 4 in each dimension.
    most = torch.finfo(k.dtype).max / 4.0
    beta = _quotient(length, radius).nan_to_num_(nan=0.0).clamp_(max=most)
    logits, unit = space.keys.logits(image * beta, mask)
    again, _, _ = space.read(dense_weights_(scale_and_shift_(logits, 1.0, unit)[0], 1.0)[0])
    return contraction(query * radius, image, image, again).unsqueeze(3)


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` where b is not 0, else 0."""
    return torch.where(b > 0.0, a / b.clamp_min(_tiny(b)), 0.0)
