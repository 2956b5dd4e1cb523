# SPDX-License-Identifier: GPL-3.0-or-later
"""The implementation in plain torch operations: runs everywhere, and is what faster ones are held to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import GuidanceConfig
from .entmax import dense_weights_, scale_and_shift_, sparse_weights
from .geometry import correction, to_dtype

# What is held for a chunk of queries, in numbers: about three tensors of its logits and eight of its output. On the CPU
# that should stay in the cache and below the output's own size; elsewhere the launches of many small kernels cost more
# than memory does.
_LOGITS_TENSORS = 3
_OUTPUT_TENSORS = 8
_CPU_CHUNK = 8 << 19
_CPU_CHUNK_OF_OUTPUT = 2.3
_CHUNK = 3 << 23


def row_chunks(q: Tensor, keys: int) -> Iterator[slice]:
    """Slices of the query axis of ``q`` (``[B, H, N_q, D]``), each small enough to hold its logits over ``keys``."""
    batch, heads, rows, dim = q.shape
    budget = min(_CPU_CHUNK, int(_CPU_CHUNK_OF_OUTPUT * q.numel())) if q.device.type == "cpu" else _CHUNK
    step = max(1, budget // (batch * heads * (_LOGITS_TENSORS * keys + _OUTPUT_TENSORS * dim)))
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


def logits_of(q: Tensor, k: Tensor, limit: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """``scale * q k^T`` plus the mask, ``[B, H, N_q, N_k]`` in the work dtype; masked entries are ``-inf``.

    ``k`` is of the work dtype already, ``limit`` the :func:`query_limit` of it.
    """
    q = q.to(k.dtype) * scale
    if limit is not None:
        q.clamp_(-limit, limit)
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
    return dense if sparse is None else sparse, dense, maximum + total.log()


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
    k, v = k.to(work), v.to(work)
    for rows in row_chunks(q, k.shape[2]):
        sparse, dense, lse = retrieve(q[:, :, rows], k, v, limit, config.alpha, mask_rows(mask, rows), scale)
        change = correction(sparse, dense, config)
        if joint_lse is not None:
            # A row that may read nothing at all has -inf - -inf here: no text, so no mass.
            mass = (lse - joint_lse[:, :, rows, None].to(work)).exp_().nan_to_num_(nan=0.0)
            change.mul_(mass.clamp_(max=1.0))
        change += dense if base is None else base[:, :, rows]
        out[:, :, rows] = to_dtype(change, out.dtype)
