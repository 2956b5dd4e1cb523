# SPDX-License-Identifier: GPL-3.0-or-later
"""The work of :mod:`gag_core.eager` on a chunk for devices other than the CPU, where passes over memory take the time.

Each operation there is a launch, which reads its tensors from memory and writes its result to memory. So this file does
the same as ``eager.guided_chunk`` in fewer operations:

- queries and keys in half precision are multiplied as they are, where torch can give the product in fp32;
- the product gives logits in true scale, and their maximum is not subtracted;
- the search for the threshold writes few tensors of the size of the logits, or none (``entmax.square_weights``);
- a column of ones behind the values sums up the weights;
- these sums are divided out in factors of a query, and the discrepancy is not stored;
- the last operation writes to the output.

``eager.py`` does not use it in forward-mode differentiation, nor in graphs of torch.compile, which fuses operations
itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import GuidanceConfig
from .entmax import FREE_OUTPUTS, sparse_weights, square_weights, sums_in_one_pass
from .geometry import guidance_factors, read_out_factors, text_mass
from .numerics import CardKeys, ConfigNumbers, work_dtype

# Rows of logits with spare columns, and rows of values, begin at multiples of so many elements.
_ALIGNMENT = 4
# Devices that have all operations of this file. DirectML computes some of them on the CPU.
DEVICES = ("cuda", "meta", "mps", "xpu")


class Memory(NamedTuple):
    """Keys and values of some batch rows and heads, prepared for all of their queries.

    Attributes:
        keys: prepared keys.
        values: ``[B, H, columns of the keys, D_v]`` in the work dtype, divided by ``value_scale``; behind N_k anything.
        values_and_ones: the same with columns of ones, ``[B, H, columns of the keys, D_v + 4]``.
        value_scale: a positive number, or a tensor of rank 4.
    """

    keys: CardKeys
    values: Tensor
    values_and_ones: Tensor
    value_scale: Tensor | float


class ReadOuts(NamedTuple):
    """Read-outs of a chunk of queries.

    Attributes:
        sparse: ``total * S``, ``[B, H, N, D_v]``.
        total: ``[B, H, N, 1]``, positive.
        dense: D, ``[B, H, N, D_v]``.
        lse: logsumexp of the logits, ``[B, H, N, 1]``, or None.
    """

    sparse: Tensor
    total: Tensor
    dense: Tensor
    lse: Tensor | None


def supports(config: GuidanceConfig) -> bool:
    """Return True if :func:`guided_chunk` computes the guidance of such a config."""
    return config.rule in ("gag", "pladis") and config.alpha > 1.0 and config.strength != 0.0


def elements_per_query(k: Tensor, v: Tensor, config: GuidanceConfig) -> int:
    """Return how many elements of the work dtype :func:`guided_chunk` holds for each query and head."""
    tokens, dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    searched = 2 if config.alpha == 1.5 else 3
    return max(searched * tokens + value_dim, 2 * tokens + 2 * value_dim, 3 * value_dim, tokens + dim)


def prepare(k: Tensor, v: Tensor, logit_scale: float, config: GuidanceConfig) -> Memory:
    """Prepare keys ``[B, H, N_k, D]`` and values ``[B, H, N_k, D_v]`` for logits with the factor ``logit_scale``."""
    batch, heads, tokens, dim = v.shape
    with_spare = config.alpha == 1.5 and sums_in_one_pass(tokens, k.device)
    keys = CardKeys.prepare(k, logit_scale, _ALIGNMENT - tokens % _ALIGNMENT if with_spare else 0)
    work = work_dtype(v)
    with_ones = torch.ones((batch, heads, keys.columns, dim + _ALIGNMENT), dtype=work, device=v.device)
    values, scale = with_ones[..., :dim], 1.0
    if v.dtype == torch.float16:  # no square and no sum of a few of these numbers leaves the range of fp32
        values[:, :, :tokens].copy_(v)
        return Memory(keys, values, with_ones, scale)
    axes = (-3, -2, -1) if config.merge_heads else (-2, -1)
    norm = torch.linalg.vector_norm(v, dim=axes, keepdim=True, dtype=work).clamp_(2.0**-64, torch.finfo(work).max)
    torch.div(v, norm, out=values[:, :, :tokens])
    return Memory(keys, values, with_ones, norm)


def read_outs(q: Tensor, memory: Memory, alpha: float, mask: Tensor | None, with_logsumexp: bool) -> ReadOuts:
    """Compute the sparse and the dense read-out of a chunk of queries ``[B, H, N, D]``."""
    keys, value_dim = memory.keys, memory.values.shape[3]
    logits = keys.logits(q, mask)
    maximum, index = _maximum(logits[..., : keys.tokens], with_logsumexp)
    unreadable = None if mask is None else _unreadable(maximum)
    if alpha == 1.5:
        weights = square_weights(logits, maximum, keys.columns - keys.tokens)
    else:
        weights = sparse_weights(logits.sub_(maximum) * (alpha - 1.0), alpha)
    sparse = torch.matmul(weights, memory.values_and_ones)
    sparse, total = sparse[..., :value_dim], sparse[..., value_dim : value_dim + 1]
    del weights
    weights = torch.softmax(logits, dim=-1)
    del logits
    dense = torch.matmul(weights, memory.values)
    lse = None if index is None else _logsumexp(weights, maximum, index)
    if unreadable is not None:
        sparse.masked_fill_(unreadable, 0.0)
        dense.masked_fill_(unreadable, 0.0)
        total.masked_fill_(unreadable, 1.0)
    return ReadOuts(sparse, total, dense, lse)


def _maximum(logits: Tensor, with_index: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the maximum over the keys, ``[..., 1]``, and where it is, or None."""
    if with_index:
        maximum, index = logits.max(dim=-1, keepdim=True)
        return maximum, index
    return logits.amax(dim=-1, keepdim=True), None


def _unreadable(maximum: Tensor) -> Tensor:
    """Return True for queries that may read no key, and make their maximum, ``-inf``, a finite number in place."""
    unreadable = maximum == -torch.inf
    maximum.clamp_min_(-torch.finfo(maximum.dtype).max)
    return unreadable


def _logsumexp(weights: Tensor, maximum: Tensor, index: Tensor) -> Tensor:
    """Compute the logsumexp of logits from their softmax, their maximum and the index of it.

    The softmax of the largest logit is ``exp(logit - logsumexp)``.
    """
    return torch.sub(maximum, weights.gather(-1, index).log_())


def logsumexp(q: Tensor, keys: CardKeys, mask: Tensor | None) -> Tensor:
    """Compute the logsumexp of the logits of queries ``[B, H, N, D]`` over the keys, ``[B, H, N]``."""
    logits = keys.logits(q, mask)
    maximum, index = logits.max(dim=-1, keepdim=True)
    unreadable = None if mask is None else _unreadable(maximum)
    result = _logsumexp(torch.softmax(logits, dim=-1), maximum, index)
    if unreadable is not None:
        result.masked_fill_(unreadable, -torch.inf)
    return result.squeeze(-1)


def guided_chunk(
    out: Tensor,
    q: Tensor,
    memory: Memory,
    config: GuidanceConfig,
    numbers: ConfigNumbers,
    mask: Tensor | None,
    base: Tensor | None,
    joint_lse: Tensor | None,
) -> None:
    """Write the result of :func:`gag_core.eager.guide` for one chunk of queries.

    Args:
        out, q, mask, base, joint_lse: the parts for these queries, as in :func:`gag_core.eager.guide`.
        memory: the keys and values.
        config: the settings, which it :func:`supports`.
        numbers: the numbers of the config in the work dtype.
    """
    sparse, total, dense, lse = read_outs(q, memory, config.alpha, mask, joint_lse is not None)
    scale = memory.value_scale
    on_sparse: Tensor | float
    on_second: Tensor | float
    in_few_passes = config.orthogonal_scale == 0.0 and not config.merge_heads
    if in_few_passes:
        second = dense
        on_sparse, on_second = read_out_factors(sparse, dense, total, scale, config, numbers)
    else:
        sparse.div_(total)
        second = torch.sub(sparse, dense, out=dense)
        on_sparse, on_second = guidance_factors(sparse, second, scale, config, numbers)
    if lse is not None and joint_lse is not None:
        mass = text_mass(lse, joint_lse.unsqueeze(-1).to(lse.dtype))
        on_sparse, on_second = mass * on_sparse, mass * on_second
    if base is None and in_few_passes:
        on_second += 1.0  # the change is added to D
    elif base is None:
        on_sparse, on_second = on_sparse + 1.0, on_second - 1.0  # and D is 1 * S - 1 * (S - D)
    _write(out, base, scale, (sparse, on_sparse), (second, on_second))


def _write(out: Tensor, base: Tensor | None, scale: Tensor | float, *parts: tuple[Tensor, Tensor | float]) -> None:
    """Write ``base`` plus ``scale`` times the sum of ``vectors * factor`` over the parts to ``out``, saturated."""
    work = parts[0][0].dtype
    # Values in fp16 have no scale. Vectors are below 2^18 then, and else below 16. So no product leaves the range.
    largest = torch.finfo(work).max / (2.0**20 if isinstance(scale, float) else 16.0)
    free = out.device.type in FREE_OUTPUTS
    total = base if base is None or free else base.to(work)
    terms = [part for part in parts if isinstance(part[1], Tensor) or part[1]]
    for index, (vectors, factor) in enumerate(terms, 1):
        target = out if free and index == len(terms) else None
        factor = factor if isinstance(scale, float) else factor * scale
        factor = factor.clamp(-largest, largest) if isinstance(factor, Tensor) else min(max(factor, -largest), largest)
        if total is None:
            total = torch.mul(vectors, factor, out=target)
        elif isinstance(factor, Tensor):
            total = torch.addcmul(total, vectors, factor, out=target)
        else:
            total = torch.add(total, vectors, alpha=factor, out=target)
    if total is not None and total is not out:
        out.copy_(total)
    out.clamp_(-torch.finfo(out.dtype).max, torch.finfo(out.dtype).max)
