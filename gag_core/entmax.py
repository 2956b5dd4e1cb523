# SPDX-License-Identifier: GPL-3.0-or-later
"""Sort-free alpha-entmax.

``entmax_alpha(z)_i = relu((alpha - 1) z_i - tau) ** p`` with ``p = 1 / (alpha - 1)`` and the threshold ``tau`` that
makes the weights sum to 1 (Peters, Niculae and Martins 2019, arXiv 1905.05702, eq. 10). With ``x = (alpha - 1) z``
shifted so that its maximum is 0, tau lies in [-1, 0) and is the root of ``||relu(x - t)||_p = 1``. That norm is convex
and falling in t, so Newton's iteration from t = -1 rises towards the root and never passes it.
"""

from __future__ import annotations

import math
from reprlib import repr as short

import torch
from torch import Tensor

# The exponent at alpha = 1.5, which has a cheaper form than the general power.
_SQUARE = 2.0

# Newton steps. For the 2-norm (alpha = 1.5) 5 steps bring every weight within 6e-7 in fp32 for up to 512 keys, and 6
# for 4,608: random, tied, peaked and steadily falling logits of any spread. The other norms bend more sharply near the
# root, so their bracket is first narrowed by bisection.
_NEWTON_STEPS = 5
_NEWTON_STEPS_LONG = 7
_LONG = 512
_BISECTION_STEPS = 12
_NEWTON_STEPS_AFTER_BISECTION = 4
_EXTRA_STEPS_FP64 = 2


@torch.no_grad()
def entmax(logits: Tensor, alpha: float = 1.5, dim: int = -1) -> Tensor:
    """Alpha-entmax along ``dim``: softmax at alpha 1, sparsemax at alpha 2, exact zeros for every alpha above 1.

    The threshold is found by a fixed number of Newton steps, without sorting and without reading a value back from
    the device; extra memory is two tensors of the logits' size.

    Args:
        logits: any shape, floating point. ``-inf`` entries get weight 0; a slice of only ``-inf`` gives zeros.
        alpha: 1 to 2.
        dim: the dimension that sums to 1.

    Returns:
        Weights of the shape and dtype of ``logits``; computed in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: alpha is outside 1 to 2, or ``dim`` is empty.
        TypeError: ``logits`` is not a floating-point tensor.

    Source: arXiv 1905.05702 eq. 10; used as the sparse retrieval of arXiv 2603.02531 v2.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.layout != torch.strided:
        given = f"{logits.dtype} of layout {logits.layout}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"entmax needs a dense floating-point tensor, got {given}.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha must be a number from 1 to 2, got {short(alpha)}.")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -logits.ndim <= dim < logits.ndim:
        raise ValueError(f"dim must name one of the {logits.ndim} dimensions of the logits, got {short(dim)}.")
    if logits.shape[dim] == 0:
        raise ValueError(f"entmax needs at least one entry along dim {dim}, got shape {tuple(logits.shape)}.")
    moved = logits.movedim(dim, -1)
    work = moved.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    # A copy, so that the caller's tensor is never written to.
    scaled, _ = scale_and_shift_(work.clone(), alpha)
    weights = dense_weights_(scaled, alpha)[0] if alpha == 1.0 else sparse_weights(scaled, alpha)
    return weights.to(logits.dtype).movedim(-1, dim)


def scale_and_shift_(logits: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``((alpha - 1) (logits - max), max)`` over the last axis, in place; not scaled at alpha 1.

    The maximum of a row of only ``-inf`` counts as 0.
    """
    maximum = logits.amax(dim=-1, keepdim=True)
    maximum = maximum.masked_fill_(maximum == -torch.inf, 0.0)
    # In this order, because a large offset that all logits share would round the product.
    shifted = logits.sub_(maximum)
    return shifted if alpha in (1.0, 2.0) else shifted.mul_(alpha - 1.0), maximum


def dense_weights_(scaled: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Softmax, in place, of :func:`scale_and_shift_`'s result, with the sums ``[..., 1]`` that it was divided by."""
    # On a CPU a power of 2 takes half the time of one of e.
    weights = scaled.mul_(math.log2(math.e) / (alpha - 1.0 or 1.0)).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    return weights.div_(total.clamp_min(_tiny(total))), total


def sparse_weights(scaled: Tensor, alpha: float) -> Tensor:
    """Alpha-entmax (1 < alpha <= 2) over the last axis of :func:`scale_and_shift_`'s result, which is kept."""
    power = 1.0 / (alpha - 1.0)
    if power == _SQUARE:
        threshold = _threshold_square(scaled)
        weights = torch.sub(scaled, threshold).relu_().square_()
    else:
        weights = _powered_(scaled - _offset_general(scaled, power), power)
    # Newton stops a rounding error below the root; the division makes the weights sum to 1 all the same.
    total = weights.sum(dim=-1, keepdim=True)
    return weights.div_(total.clamp_min_(_tiny(total)))


def _threshold_square(scaled: Tensor) -> Tensor:
    """Root of ``||relu(scaled - t)||_2 = 1``, shape ``[..., 1]``."""
    threshold = scaled.new_full((*scaled.shape[:-1], 1), -1.0)
    above = torch.empty_like(scaled)
    steps = _NEWTON_STEPS if scaled.shape[-1] <= _LONG else _NEWTON_STEPS_LONG
    for _ in range(steps + _extra_steps(scaled)):
        torch.sub(scaled, threshold, out=above).relu_()
        norm = torch.linalg.vector_norm(above, dim=-1, keepdim=True)
        total = above.sum(dim=-1, keepdim=True)
        threshold += norm * (norm - 1.0) / total.clamp_min_(_tiny(total))
    return threshold


def _offset_general(scaled: Tensor, power: float) -> Tensor:
    """``t + 1`` for the root t of ``||relu(scaled - t)||_power = 1``: bisection, then Newton from the lower end."""
    # All entries equal is the widest case: then t = -n ** (1 - alpha), and 1 / power = alpha - 1.
    width = 1.0 - scaled.shape[-1] ** (-1.0 / power)
    offset = scaled.new_zeros((*scaled.shape[:-1], 1))
    work = torch.empty_like(scaled)
    for _ in range(_BISECTION_STEPS):
        width /= 2.0
        middle = offset + width
        total = _powered_(torch.sub(scaled, middle, out=work), power).sum(dim=-1, keepdim=True)
        offset = torch.where(total >= 1.0, middle, offset)
    for _ in range(_NEWTON_STEPS_AFTER_BISECTION + _extra_steps(scaled)):
        total = _powered_(torch.sub(scaled, offset, out=work), power).sum(dim=-1, keepdim=True)
        # d||.||_p/dt = -total^(1/p - 1) slope, so the step is (||.||_p - 1) total^(1 - 1/p) / slope.
        slope = _powered_(torch.sub(scaled, offset, out=work), power - 1.0).sum(dim=-1, keepdim=True)
        step = (total - total.pow(1.0 - 1.0 / power)) / slope.clamp_min(_tiny(total))
        # A row of only -inf has nothing above any threshold, and no slope to follow.
        offset += step.masked_fill_(slope == 0.0, 0.0)
    return offset


def _powered_(offset_base: Tensor, power: float) -> Tensor:
    """``relu(1 + offset_base) ** power``, in place; through log1p, so that powers of 1,000 and more stay exact."""
    if power == 0.0:
        return offset_base.gt_(-1.0)
    return offset_base.clamp_(min=-1.0).log1p_().mul_(power).exp_()


def _extra_steps(tensor: Tensor) -> int:
    return _EXTRA_STEPS_FP64 if tensor.dtype == torch.float64 else 0


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
