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

# The exponents at alpha = 1.5 and 2, which have cheaper forms than the general power.
_SQUARE = 2.0
_LINEAR = 1.0

# Newton steps for the 2-norm, by the number of keys up to which they suffice: the errors of all weights together stay
# below 3e-6, before rounding, also in the slowest rows found: few equal keys, and many more as far below them as the
# threshold.
_STEPS_SQUARE = ((80, 5), (256, 6), (2048, 7))
_MOST_STEPS_SQUARE = 8
# From this exponent on, powers are taken by way of log1p: what lies just below the top would else be rounded first.
_LARGE_POWER = 9.0
# Other powers take a CPU twice as long as the way by log1p, which rounds small numbers more but is good enough for all
# steps except the last.
_QUICK_POWERS = (0.5, 2.0, 3.0)
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
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # A copy, so that the caller's tensor is never written to.
    scaled, _ = scale_and_shift_(moved.to(work, copy=True), alpha)
    weights = dense_weights_(scaled, alpha)[0] if alpha == 1.0 else sparse_weights(scaled, alpha)
    return weights.to(logits.dtype).movedim(-1, dim)


def scale_and_shift_(logits: Tensor, alpha: float, unit: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """``((alpha - 1) unit (logits - max), max)`` over the last axis, in place; without that factor at alpha 1.

    ``unit`` is positive: how large a 1 of the logits is, also of the maximum that is returned. The maximum of a row of
    only ``-inf`` counts as the lowest finite number.
    """
    maximum = logits.amax(dim=-1, keepdim=True).clamp_min_(-torch.finfo(logits.dtype).max)
    # In this order, because a large offset that all logits share would round the product.
    shifted = logits.sub_(maximum)
    factor = unit if alpha in (1.0, 2.0) else unit * (alpha - 1.0)
    return shifted if isinstance(factor, float) and factor == 1.0 else shifted.mul_(factor), maximum


def logsumexp_of(maximum: Tensor, unit: Tensor | float, total: Tensor) -> Tensor:
    """logsumexp of logits in a unit, by their maximum and the sum of their exponentials below it."""
    most = torch.finfo(total.dtype).max
    return (maximum * unit).clamp_(-most, most).add_(total.log())


def dense_weights_(scaled: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Softmax, in place, of :func:`scale_and_shift_`'s result, with the sums ``[..., 1]`` that it was divided by."""
    # On a CPU a power of 2 takes half the time of one of e.
    weights = scaled.mul_(math.log2(math.e) / (alpha - 1.0 or 1.0)).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    return weights.div_(total.clamp_min(_tiny(total))), total


def sparse_weights(scaled: Tensor, alpha: float) -> Tensor:
    """Alpha-entmax (1 < alpha <= 2) over the last axis of :func:`scale_and_shift_`'s result, which is kept."""
    power = 1.0 / (alpha - 1.0)
    weights = _powers_above_threshold(scaled, power)
    # Newton stops a rounding error below the root; the division makes the weights sum to 1 all the same.
    total = weights.sum(dim=-1, keepdim=True)
    return weights.div_(total.clamp_min_(_tiny(total)))


def newton_steps(keys: int, power: float) -> int:
    """How many Newton steps from t = -1 find the root in fp32, for ``power = 1 / (alpha - 1)`` (1 and more)."""
    if power >= _SQUARE:
        return next((steps for most, steps in _STEPS_SQUARE if keys <= most), _MOST_STEPS_SQUARE)
    # Along the straight lines of the 1-norm Newton's steps are exact. So many were enough, for powers up to
    # 2 too, in all rows that were tried, of up to 4,608 keys.
    return keys.bit_length() + 1


def _powers_above_threshold(scaled: Tensor, power: float) -> Tensor:
    """``relu(scaled - t) ** power`` for the root t of ``||relu(scaled - t)||_power = 1``."""
    info = torch.finfo(scaled.dtype)
    steps = newton_steps(scaled.shape[-1], power) + (_EXTRA_STEPS_FP64 if info.bits == 64 else 0)
    if power >= _LARGE_POWER:
        return _large_powers_above_threshold(scaled, power, steps)
    threshold = scaled.new_full((*scaled.shape[:-1], 1), -1.0)
    above = torch.empty_like(scaled)
    slopes = above if power == _SQUARE else torch.empty_like(scaled)
    for step in range(steps):
        last = step == steps - 1
        if last:
            # Slightly lower, so that it does not lie above the root by rounding. A row of only -inf has no root: 0 / 0.
            threshold.sub_(info.eps / 2).nan_to_num_(nan=-1.0)
        torch.sub(scaled, threshold, out=above).relu_()
        if power == _SQUARE:
            slope = above.sum(dim=-1, keepdim=True)
            excess = torch.linalg.vector_norm(above, dim=-1, keepdim=True).sub_(1.0)
            missing = torch.addcmul(excess, excess, excess)
        elif power == _LINEAR:
            slope = torch.sign(above, out=slopes).sum(dim=-1, keepdim=True)
            missing = above.sum(dim=-1, keepdim=True).sub_(1.0)
        else:
            if last or power - 1.0 in _QUICK_POWERS:
                torch.pow(above, power - 1.0, out=slopes)
            else:
                _powers_from_top(torch.sub(above, 1.0, out=slopes), power - 1.0, slopes)
            slope = slopes.sum(dim=-1, keepdim=True)
            missing = _missing(slopes.mul_(above).sum(dim=-1, keepdim=True), power)
        if last:
            # What is above t is lowered, and not t raised: small numbers, which many keys near the threshold have, are
            # finer than t is.
            above.sub_(_rise(missing, slope).clamp_min_(0.0)).relu_()
        else:
            threshold.addcdiv_(missing, slope)
    return above if power == _LINEAR else above.pow_(power)


def _large_powers_above_threshold(scaled: Tensor, power: float, steps: int) -> Tensor:
    """The same by way of log1p, so that powers of 1,000 and more of what lies just below the top stay exact."""
    below_top = scaled.clamp(min=-1.0)  # scaled - t - 1, first for t = -1
    powers = torch.empty_like(scaled)
    for _ in range(steps):
        slope = _powers_from_top(below_top, power - 1.0, powers).sum(dim=-1, keepdim=True)
        total = powers.addcmul_(powers, below_top).sum(dim=-1, keepdim=True)
        # It is negative only by rounding; what lies below t would come up again then.
        below_top.sub_(_rise(_missing(total, power), slope).clamp_min_(0.0)).clamp_min_(-1.0)
    return _powers_from_top(below_top, power, powers)


def _powers_from_top(below_top: Tensor, power: float, powers: Tensor) -> Tensor:
    """Write ``(1 + below_top) ** power`` to ``powers``; exp2 is far faster than exp on a CPU."""
    return torch.log1p(below_top, out=powers).mul_(power * math.log2(math.e)).exp2_()


def _missing(total: Tensor, power: float) -> Tensor:
    """``(norm - 1) norm ** (power - 1)`` for the norm's power ``total``; over the slope it is a Newton step."""
    return total - total.pow(1.0 - 1.0 / power)


def _rise(missing: Tensor, slope: Tensor) -> Tensor:
    """How far t rises in a Newton step. Below the root the slope is 1 and more, but for a row of only -inf."""
    return missing.div_(slope.clamp_min_(1.0))


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
