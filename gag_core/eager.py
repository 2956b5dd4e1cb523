# SPDX-License-Identifier: GPL-3.0-or-later
"""The implementation in plain torch operations: runs everywhere, and is what faster ones are held to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import anderson
from .config import GuidanceConfig
from .entmax import dense_weights_, scale_and_shift_, sparse_weights
from .geometry import correction_, to_dtype

# What is held for a chunk of queries, in numbers: about three tensors of its logits and five of its output. On the CPU
# that should stay in the cache and, with copies of keys and values, below twice the output's own size; elsewhere the
# launches of many small kernels cost more than memory does.
_LOGITS_TENSORS = 3
_OUTPUT_TENSORS = 5
# Rule "anderson" holds more, and more for each of its differences.
_OUTPUT_TENSORS_ANDERSON = 16
_OUTPUT_TENSORS_PER_DIFFERENCE = 8
_CPU_CHUNK = 3 << 20
_CPU_CHUNK_OF_OUTPUT = 2.1
# But a megabyte is always there, and smaller chunks are mostly the time that it takes to begin an operation.
_LEAST_CPU_CHUNK = 1 << 18
_CHUNK = 3 << 23


def row_chunks(q: Tensor, keys: int, output_tensors: int = _OUTPUT_TENSORS) -> Iterator[slice]:
    """Slices of the query axis of ``q`` (``[B, H, N_q, D]``), each small enough to hold its logits over ``keys``.

    ``output_tensors`` is how many tensors of its output's size are held beside.
    """
    batch, heads, rows, dim = q.shape
    budget = _CHUNK
    if q.device.type == "cpu":
        budget = max(_LEAST_CPU_CHUNK, min(_CPU_CHUNK, int(_CPU_CHUNK_OF_OUTPUT * q.numel())))
    held = batch * heads * rows * (_LOGITS_TENSORS * keys + output_tensors * dim)
    # Chunks that are a tenth larger cost less than one more.
    step = max(1, math.ceil(rows / max(1, math.ceil(held / budget - 0.1))))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def mask_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """A mask of rank 4 for some of the queries."""
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def work_dtype(q: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 tensors: what the mathematics runs in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def query_limit(k: Tensor) -> Tensor | None:
    """How large a scaled query may be, ``[B, H, 1, 1]``, for its products with these keys not to overflow.

    None where they cannot: fp16 ends long before the work dtype does.
    """
    if k.dtype == torch.float16:
        return None
    largest = torch.maximum(k.amax(dim=(-2, -1), keepdim=True), -k.amin(dim=(-2, -1), keepdim=True))
    work = work_dtype(k)
    return torch.finfo(work).max / 4 / k.shape[3] / largest.to(work).clamp_min_(1.0)


def scaled_queries(q: Tensor, limit: Tensor | None, scale: float, work: torch.dtype) -> Tensor:
    """``scale * q`` in the work dtype and within its limit, contiguous, so that no product has to copy it."""
    scaled = torch.mul(q.to(work), scale, out=torch.empty(q.shape, dtype=work, device=q.device))
    # Two operations, because on a CPU the one that does both takes two to six times as long.
    return scaled if limit is None else scaled.clamp_max_(limit).clamp_min_(-limit)


def logits_of(q: Tensor, k: Tensor, limit: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """``scale * q k^T`` plus the mask, ``[B, H, N_q, N_k]`` in the work dtype; masked entries are ``-inf``.

    ``k`` is of the work dtype already, ``limit`` the :func:`query_limit` of it.
    """
    q = scaled_queries(q, limit, scale, k.dtype)
    logits = torch.matmul(q, k.transpose(-1, -2))
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill_(~mask, -torch.inf)
    return logits.add_(mask).clamp_(max=torch.finfo(logits.dtype).max)


def retrieve(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor | None, alpha: float, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse and dense read-out ``[B, H, N_q, D_v]`` and logsumexp ``[B, H, N_q, 1]`` of one chunk, work dtype.

    ``k`` and ``v`` are of the work dtype already, ``limit`` the :func:`query_limit` of k.
    """
    scaled, maximum = scale_and_shift_(logits_of(q, k, limit, mask, scale), alpha)
    # The softmax overwrites the scaled logits, so the sparse weights come first.
    sparse = None if alpha == 1.0 else torch.matmul(sparse_weights(scaled, alpha), v)
    weights, total = dense_weights_(scaled, alpha)
    dense = torch.matmul(weights, v)
    return dense.clone() if sparse is None else sparse, dense, maximum + total.log()


class KeySpace(NamedTuple):
    """The keys as patterns: from their mean, in the unit of the largest number among them, of the work dtype.

    ``memory`` is ``[B, H, N_k, D + 1 + D_v]``: of each key its pattern, the square of that and its value, so that one
    product with weights reads all three. ``unit`` is ``[B, H, 1, 1]``, ``limit`` the patterns' :func:`query_limit`.
    """

    memory: Tensor
    unit: Tensor
    limit: Tensor | None
    dim: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> KeySpace:
        """From keys and values of the work dtype."""
        tiny = torch.finfo(k.dtype).tiny
        unit = torch.maximum(k.amax(dim=(-2, -1), keepdim=True), -k.amin(dim=(-2, -1), keepdim=True)).clamp_min_(tiny)
        patterns = k / unit
        # Attention does not see an offset that all keys share, but differences of read keys would be rounded to it.
        patterns -= patterns.mean(dim=-2, keepdim=True)
        squares = patterns.square().sum(dim=-1, keepdim=True)
        return cls(torch.cat((patterns, squares, v), dim=-1), unit, query_limit(patterns), k.shape[3])

    @property
    def patterns(self) -> Tensor:
        """``[B, H, N_k, D]``."""
        return self.memory[..., : self.dim]

    def read(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pattern, square and value that weights ``[B, H, N, N_k]`` read, ``[B, H, N, D]``, ``1`` and ``D_v``."""
        found = torch.matmul(weights, self.memory)
        return found[..., : self.dim], found[..., self.dim : self.dim + 1], found[..., self.dim + 1 :]


def retrieve_with_coefficients(
    q: Tensor,
    k: Tensor,
    keys: KeySpace,
    limit: Tensor | None,
    config: GuidanceConfig,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`retrieve` gives, and the guidance signal ``[B, H, N_q, D_v]`` of rule "anderson", of one chunk.

    Attention is retrieval from a Hopfield memory: the keys are its patterns, the query is a state x. A retrieval has an
    image in key space, ``P(x) K``, and a read-out, ``P(x) V``; its residual, image minus state, tells how far the state
    is from a fixed point. These are made, all in key space with d as its origin::

        d = softmax(x_0) K    residual 0 - x_0            read-out D      dense, of the query x_0
        s = entmax(x_0) K     residual (s - d) - x_0      read-out S      sparse, of the query
        g = entmax(x_1) K     residual (g - d) - x_1      read-out V_1    depth 2 and more: sparse, of the state that
                                                                          the last image is, until there are depth - 1

    Anderson acceleration, type II, takes the affine combination of images whose residual is predicted to be smallest.
    It is solved for around the sparse retrieval: its residual f, over the differences of f and each other residual.
    (Differences of neighbours, as textbooks have them, span the same.) So regularisation, bound and safeguard, see
    :mod:`gag_core.anderson`, all lead back to the sparse read-out. With the coefficients gamma::

        out = S - gamma_0 (S - D) - gamma_1 (S - V_1) - ...       |gamma_0| + |gamma_1| + ... <= guidance_scale

    At depth 1 there is one, ``gamma_0 = <f, s - d> / |s - d|^2 = -lambda`` but for the regularisation: out is then the
    point of the line through d and s that is nearest to the query. The signal is ``(out - S) / guidance_scale``, which
    the geometry treats as it does ``S - D`` in rule "gag"; where lambda reaches guidance_scale the rules are the same.

    The gauge: residuals compare queries with keys, for which attention has no common measure. It stays as it is if the
    keys or the scale make up for another length of the queries, or if all keys are moved by one offset. So a state is
    a direction: it lies that way from d, as far as keys do (root mean square, weighted as in the dense retrieval), and
    its logits are those of a query that way of the length of this one. None of the above changes the result then, nor
    does a rotation of queries and keys. (A matrix that stretches key space, ``q -> q A, k -> k A^-T``, does.) And at
    depth 1, without an additive mask, lambda is never below -1, where out is D: as seen from d, s lies towards the
    query always.

    Args:
        q, config, mask, scale: as in :func:`guide`.
        k: keys of the work dtype, ``limit`` the :func:`query_limit` of the given ones.
        keys: :meth:`KeySpace.of` them.

    Source: arXiv 2603.02531 v1 (attention extrapolation as Anderson acceleration of depth 1); that the coefficient is
    solved for, in key space, the depths beyond and the gauge are this project's.
    """
    alpha = config.alpha
    scaled, maximum = scale_and_shift_(logits_of(q, k, limit, mask, scale), alpha)
    s, _, sparse = keys.read(sparse_weights(scaled, alpha))
    weights, total = dense_weights_(scaled, alpha)
    d, square, dense = keys.read(weights)
    del scaled, weights
    radius = (square - d.square().sum(dim=-1, keepdim=True)).clamp_min_(0.0).sqrt_()
    query, length = anderson.unit(scaled_queries(q, limit, scale, d.dtype))
    # What makes logits of a direction and the patterns.
    length = length.unsqueeze(-1).mul_(keys.unit)
    image = s - d
    f = image - query * radius
    differences, read_outs = [image], [sparse - dense]
    for _ in range(config.anderson_depth - 1):
        direction, _ = anderson.unit(image)
        logits = logits_of(direction * length, keys.patterns, keys.limit, mask, 1.0)
        image, _, value = keys.read(sparse_weights(scale_and_shift_(logits, alpha)[0], alpha))
        image = image - d
        differences.append(f - (image - direction * radius))
        read_outs.append(sparse - value)
    gamma = anderson.coefficients(f, torch.stack(differences, dim=-2), regularization=config.anderson_regularization)
    share = anderson.shares(gamma, config.guidance_scale).neg_()
    signal = read_outs[0].mul_(share[..., :1])
    for number, read_out in enumerate(read_outs[1:], 1):
        signal.addcmul_(read_out, share[..., number : number + 1])
    return sparse, dense, maximum + total.log(), signal


def correct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: KeySpace | None,
    limit: Tensor | None,
    config: GuidanceConfig,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The work on one chunk of queries: what guidance adds, the dense read-out and logsumexp, of the work dtype.

    ``keys`` is None but for rule "anderson"; others as in :func:`retrieve`.
    """
    if keys is None:
        sparse, dense, lse = retrieve(q, k, v, limit, config.alpha, mask, scale)
        return correction_(sparse, dense, config), dense, lse
    sparse, dense, lse, signal = retrieve_with_coefficients(q, k, keys, limit, config, mask, scale)
    return correction_(sparse, dense, config, signal), dense, lse


def guide(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    *,
    base: Tensor | None,
    mask: Tensor | None,
    scale: float,
    joint_lse: Tensor | None,
) -> None:
    """Write ``base + mass * strength * (guided - dense)`` to ``out``, chunk by chunk.

    Args:
        out: ``[B, H, N_q, D_v]``, any strides.
        q, k, v, config, mask, scale: as in :func:`gag_core.guided_attention`, mask of rank 4.
        base: ``[B, H, N_q, D_v]``; None takes the dense read-out.
        joint_lse: ``[B, H, N_q]``, logsumexp of the logits of a longer sequence that these keys are part of; the
            mass is the share of its softmax that falls on them. None is a mass of 1.
    """
    work = work_dtype(q)
    limit = query_limit(k)
    # Contiguous, or each chunk's products would copy them.
    k, v = k.to(work).contiguous(), v.to(work).contiguous()
    output_tensors, keys = _OUTPUT_TENSORS, None
    # Without a sparse retrieval there is nothing to solve for.
    if config.rule == "anderson" and config.alpha != 1.0:
        output_tensors = _OUTPUT_TENSORS_ANDERSON + _OUTPUT_TENSORS_PER_DIFFERENCE * config.anderson_depth
        keys = KeySpace.of(k, v)
    for rows in row_chunks(q, k.shape[2], output_tensors):
        change, dense, lse = correct(q[:, :, rows], k, v, keys, limit, config, mask_rows(mask, rows), scale)
        if joint_lse is not None:
            # A row that may read nothing at all has -inf - -inf here: no text, so no mass.
            mass = (lse - joint_lse[:, :, rows, None].to(work)).exp_().nan_to_num_(nan=0.0)
            change.mul_(mass.clamp_(max=1.0))
        change += dense if base is None else base[:, :, rows]
        out[:, :, rows] = to_dtype(change, out.dtype)
        del change, dense, lse  # or they are held beside those of the next chunk
