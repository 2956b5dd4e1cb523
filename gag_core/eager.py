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
from .entmax import dense_weights_, logsumexp_of, scale_and_shift_, sparse_weights
from .geometry import blended_, extrapolation, within, write

# How many numbers may be held for a chunk of queries. On a CPU that should stay near the size of the caches and, with
# copies of keys and values, below twice the output's own; elsewhere launching many small kernels costs more than that.
_CPU_CHUNK = 3 << 19
_CPU_CHUNK_OF_OUTPUT = 1.9
# But a megabyte is always there, and smaller chunks are mostly the time that it takes to begin an operation.
_LEAST_CPU_CHUNK = 1 << 18
_CHUNK = 3 << 23
# So much of it copies of keys and values may be, before heads come in several parts.
_COPIED_OF_CHUNK = 0.25
# Products of as many keys as this, or a multiple, take a CPU a fifth less time than those of a few less.
_PADDED_TO = 16
# The power of 2 just below the largest number of fp16, which fp32 has room for around: no other need be looked for.
_LARGEST_FP16 = 2.0**15
# Rule "anderson" holds more outputs than others, and more for each of its differences.
_OUTPUTS_ANDERSON = 16
_OUTPUTS_PER_DIFFERENCE = 8

# A slice of the batch axis and one of the heads; and one of the queries as well.
Part = tuple[slice, slice]
Place = tuple[slice, slice, slice]


def chunks(q: Tensor, *, held: int, copied: int, whole_heads: bool = False) -> Iterator[tuple[Part, list[Place]]]:
    """Parts of the batch and heads of ``q`` (``[B, H, N_q, D]``), with the places of some queries to take of each.

    Each is small enough to hold ``held`` numbers for each of its queries and heads, beside ``copied`` numbers for each
    head, of keys and values. ``whole_heads`` keeps the heads of a query together. Batch rows come one by one where they
    can, because products then need no copies of the queries: in the layout that models have, the heads of several rows
    do not lie at equal distances.
    """
    batch, heads, rows, _ = q.shape
    if not rows:
        return
    most, least = _CHUNK, 0
    if q.device.type == "cpu":
        most, least = min(_CPU_CHUNK, int(_CPU_CHUNK_OF_OUTPUT * q.numel())), _LEAST_CPU_CHUNK
    at_once = heads if whole_heads else min(heads, max(1, int(_COPIED_OF_CHUNK * max(most, least)) // copied))
    budget = max(least, most // 2, most - at_once * copied)
    each = at_once * rows * held
    # Chunks that are a tenth larger cost less than one more.
    step = math.ceil(rows / max(1, math.ceil(each / budget - 0.1)))
    row_slices = _slices(rows, step)
    batch_at_once = max(1, int(1.1 * budget) // each) if at_once == heads else 1
    for batch_slice in _slices(batch, batch_at_once):
        for head_slice in _slices(heads, at_once):
            yield (batch_slice, head_slice), [(batch_slice, head_slice, rows_slice) for rows_slice in row_slices]


def _slices(size: int, at_once: int) -> list[slice]:
    """As few as can be of at most so many, all of about one length."""
    step = math.ceil(size / math.ceil(size / at_once))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def mask_part(mask: Tensor | None, place: Place) -> Tensor | None:
    """A mask of rank 4 for some queries."""
    if mask is None:
        return None
    sizes = zip(place, mask.shape, strict=False)
    return mask[tuple(slice(None) if size == 1 else chosen for chosen, size in sizes)]


def work_dtype(q: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 tensors: what the mathematics runs in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def own_copy(x: Tensor, pad: int = 0) -> Tensor:
    """A copy in the work dtype, contiguous, so that products with its heads need not copy it again.

    ``pad`` is how many tokens of zeros come behind its own.
    """
    batch, heads, tokens, dim = x.shape
    copy = torch.empty((batch, heads, tokens + pad, dim), dtype=work_dtype(x), device=x.device)
    copy[:, :, :tokens] = x
    if pad:
        copy[:, :, tokens:] = 0.0
    return copy


def padding(tokens: int) -> int:
    """How many tokens more make so many a multiple of 16; 0 where that would be more than a sixteenth of them."""
    pad = -tokens % _PADDED_TO
    return pad if _PADDED_TO * pad <= tokens else 0


def size_of(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A power of 2 that brings ``x``, of a work dtype, below 2 by division, which rounds nothing then; axes are kept.

    It is just below the norm over these axes, but at least 2^-64: what is smaller may stay so, and units as small,
    times anything else, would leave the range. So it does not matter where squares underflow.
    """
    largest = 2.0 ** (math.frexp(torch.finfo(x.dtype).max)[1] - 1)
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    return norm.clamp_(2.0**-64, largest).log2_().floor_().exp2_()


def scale_parts(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Two numbers whose product is ``scale``, as far as the dtype reaches: one of -1 to 1, and one of at least 1."""
    return math.copysign(min(abs(scale), 1.0), scale), within(max(abs(scale), 1.0), dtype)


class Keys(NamedTuple):
    """Keys in a unit in which no product with a finite query overflows: logits are ``unit * (q @ transposed)``.

    ``transposed`` is ``[B, H, D, N_k + padding]`` in the work dtype, ``unit`` a positive number or ``[B, H, 1, 1]``,
    ``tokens`` is N_k. It is the keys that carry the scale, because there are fewer of them than queries.
    """

    transposed: Tensor
    unit: Tensor | float
    tokens: int

    @classmethod
    def of(cls, k: Tensor, scale: float, pad: int = 0) -> Keys:
        """From keys ``[B, H, N_k, D]`` and the factor of the logits, any finite number; with so much padding."""
        wide = own_copy(k, pad)
        factor, unit = scale_parts(scale, wide.dtype)
        if k.dtype == torch.float16:  # which ends long before fp32 does
            return cls(wide.mul_(factor).transpose(-1, -2), unit, k.shape[2])
        most, terms, size = torch.finfo(wide.dtype).max, 4.0 * k.shape[3], size_of(wide, (-2, -1))
        wide.div_(size).mul_(factor / terms)
        size.mul_(terms).clamp_(max=most)
        if unit != 1.0:
            size.mul_(unit).clamp_(max=most)
        return cls(wide.transpose(-1, -2), size, k.shape[2])

    def logits(self, q: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Logits ``[B, H, N_q, N_k + padding]`` in the work dtype, and the unit they are in.

        What is masked and the padding are ``-inf``.
        """
        # Contiguous at once, where the product would need that next.
        q = q.to(self.transposed.dtype, memory_format=torch.contiguous_format) if q.dtype != work_dtype(q) else q
        padded = torch.matmul(q, self.transposed)
        logits = padded[..., : self.tokens]
        if self.tokens < padded.shape[-1]:
            padded[..., self.tokens :] = -torch.inf
        if mask is None:
            return padded, self.unit
        if mask.dtype == torch.bool:
            logits.masked_fill_(~mask, -torch.inf)
            return padded, self.unit
        most = torch.finfo(logits.dtype).max
        logits.mul_(self.unit).clamp_(-most, most).add_(mask).clamp_(max=most)
        return padded, 1.0


def retrieve(
    q: Tensor, keys: Keys, v: Tensor, alpha: float, mask: Tensor | None, with_logsumexp: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sparse and dense read-out ``[B, H, N_q, D_v]`` and, if asked for, logsumexp ``[B, H, N_q, 1]``; work dtype.

    ``v`` is of the work dtype already, padded as the keys are.
    """
    logits, unit = keys.logits(q, mask)
    scaled, maximum = scale_and_shift_(logits, alpha, unit)
    # The softmax overwrites the scaled logits, so the sparse weights come first.
    sparse = None if alpha == 1.0 else torch.matmul(sparse_weights(scaled, alpha), v)
    weights, total = dense_weights_(scaled, alpha)
    dense = torch.matmul(weights, v)
    lse = logsumexp_of(maximum, unit, total) if with_logsumexp else None
    return dense.clone() if sparse is None else sparse, dense, lse


class KeySpace(NamedTuple):
    """The keys as patterns: in a unit in which keys are at most 2, from their mean, of the work dtype.

    ``memory`` is ``[B, H, N_k, D + 1 + D_v]``: of each key its pattern, the square of that and its value, so that one
    product with weights reads all three. ``unit`` is ``[B, H, 1, 1]``, ``keys`` are the patterns as keys, ``scale`` is
    the factor of the logits.
    """

    memory: Tensor
    unit: Tensor
    keys: Keys
    scale: float
    dim: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor, scale: float) -> KeySpace:
        """From keys, values of the work dtype, and the factor of the logits."""
        patterns = own_copy(k)
        unit = size_of(patterns, (-2, -1))
        patterns /= unit
        # Attention does not see an offset that all keys share, but differences of read keys would be rounded to it.
        patterns -= patterns.mean(dim=-2, keepdim=True)
        squares = patterns.square().sum(dim=-1, keepdim=True)
        return cls(torch.cat((patterns, squares, v), dim=-1), unit, Keys.of(patterns, 1.0), scale, k.shape[3])

    def state(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Directions ``[B, H, N, D]`` of queries, and what makes their logits of these and the patterns, ``1``."""
        dtype = self.memory.dtype
        factor, scale_unit = scale_parts(self.scale, dtype)
        direction, length = anderson.unit(q.to(dtype) * factor)
        length = length.mul_(scale_unit).unsqueeze(-1).mul_(self.unit)
        return direction, length.clamp_(max=torch.finfo(dtype).max)

    def read(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pattern, square and value that weights ``[B, H, N, N_k]`` read, ``[B, H, N, D]``, ``1`` and ``D_v``."""
        found = torch.matmul(weights, self.memory)
        return found[..., : self.dim], found[..., self.dim : self.dim + 1], found[..., self.dim + 1 :]


def retrieve_with_coefficients(
    q: Tensor, keys: Keys, space: KeySpace, config: GuidanceConfig, mask: Tensor | None
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
        q, config, mask: as in :func:`guide`.
        keys, space: :meth:`Keys.of` and :meth:`KeySpace.of` its keys.

    Source: arXiv 2603.02531 v1 (attention extrapolation as Anderson acceleration of depth 1); that the coefficient is
    solved for, in key space, the depths beyond and the gauge are this project's.
    """
    alpha = config.alpha
    logits, unit = keys.logits(q, mask)
    scaled, maximum = scale_and_shift_(logits, alpha, unit)
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
        direction, _ = anderson.unit(image)
        logits, logits_unit = space.keys.logits(direction * length, mask)
        image, _, value = space.read(sparse_weights(scale_and_shift_(logits, alpha, logits_unit)[0], alpha))
        image = image - d
        differences.append(f - (image - direction * radius))
        read_outs.append(sparse - value)
    gamma = anderson.coefficients(f, torch.stack(differences, dim=-2), regularization=config.anderson_regularization)
    share = anderson.shares(gamma, config.guidance_scale).neg_()
    signal = read_outs[0].mul_(share[..., :1])
    for number, read_out in enumerate(read_outs[1:], 1):
        signal.addcmul_(read_out, share[..., number : number + 1])
    return sparse, dense, logsumexp_of(maximum, unit, total), signal


def guided_chunk(
    q: Tensor,
    keys: Keys,
    v: Tensor,
    unit: Tensor,
    space: KeySpace | None,
    config: GuidanceConfig,
    mask: Tensor | None,
    base: Tensor | None,
    joint_lse: Tensor | None,
) -> Tensor:
    """The work on one chunk of queries: what :func:`guide` writes, of the work dtype.

    ``v`` are the values over their ``unit``, of the work dtype, padded as the keys are; ``space`` is None but for rule
    "anderson".
    """
    signal = None
    if space is None:
        # At strength 0 the dense read-out is all that is wanted.
        alpha = config.alpha if config.strength else 1.0
        sparse, dense, lse = retrieve(q, keys, v, alpha, mask, with_logsumexp=joint_lse is not None)
        discrepancy = torch.sub(sparse, dense, out=dense)
    else:
        sparse, dense, lse, signal = retrieve_with_coefficients(q, keys, space, config, mask)
        discrepancy = sparse - dense
    on_sparse, on_vector = extrapolation(sparse, discrepancy, unit, config, signal)
    vectors, numbers = [sparse, discrepancy], [on_sparse, on_vector]
    if signal is not None:
        vectors, numbers = [*vectors, signal], [on_sparse, within(config.strength, unit.dtype), on_vector]
    if lse is not None and joint_lse is not None:
        # A row that may read nothing at all has -inf - -inf here: no text, so no mass.
        mass = (lse - joint_lse.unsqueeze(-1).to(lse.dtype)).exp_().nan_to_num_(nan=0.0).clamp_(max=1.0)
        numbers = [mass * number for number in numbers]
    if base is None:  # the dense read-out, S - (S - D)
        numbers[0] += 1.0
        numbers[1] -= 1.0
    result = blended_(unit, *zip(vectors, numbers, strict=True))
    return result if base is None else result.add_(base)


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
    # Without a sparse retrieval there is nothing to solve for.
    solved = config.rule == "anderson" and config.alpha != 1.0 and config.strength != 0.0
    pad = 0 if solved else padding(k.shape[2])
    tokens, dim, value_dim = k.shape[2] + pad, k.shape[3], v.shape[3]
    # The logits twice or three times while thresholds are searched; then once and both read-outs; these and a product.
    held = max((2 if config.alpha == 1.5 else 3) * tokens, tokens + 2 * value_dim, 3 * value_dim)
    copied = tokens * (dim + value_dim)
    if solved:
        held = 3 * tokens + (_OUTPUTS_ANDERSON + _OUTPUTS_PER_DIFFERENCE * config.anderson_depth) * value_dim
        copied += tokens * (3 * dim + value_dim)
    if q.dtype != work_dtype(q):
        held += dim
    for part, places in chunks(q, held=held, copied=copied, whole_heads=config.merge_heads):
        keys, values = Keys.of(k[part], scale, pad), own_copy(v[part], pad)
        if v.dtype == torch.float16:
            unit = values.new_full((1, 1, 1, 1), _LARGEST_FP16)
        else:
            unit = size_of(values, (-3, -2, -1) if config.merge_heads else (-2, -1))
        values.div_(unit)
        space = KeySpace.of(k[part], values, scale) if solved else None
        for place in places:
            result = guided_chunk(
                q[place],
                keys,
                values,
                unit,
                space,
                config,
                mask_part(mask, place),
                None if base is None else base[place],
                None if joint_lse is None else joint_lse[place],
            )
            write(out[place], result)
            del result  # or it is held beside those of the next chunk
