# SPDX-License-Identifier: GPL-3.0-or-later
"""Alpha-entmax without sorting, and softmax from the same scaled logits.

``entmax_alpha(z)_i = relu((alpha - 1) z_i - tau) ** p`` with ``p = 1 / (alpha - 1)`` and the threshold ``tau`` that
makes the weights sum to 1 (Peters, Niculae and Martins 2019, arXiv 1905.05702, eq. 10). With ``x = (alpha - 1) z``
shifted so that its maximum is 0, tau lies in [-1, 0) and is the root of ``||relu(x - tau)||_p = 1``. That norm is
convex and falling in tau, so Newton's iteration from tau = -1 rises towards the root and never passes it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .echo import dtype_of, echo
from .numerics import work_dtype

# The exponents at alpha = 1.5 and 2, which have cheaper forms than the general power.
_SQUARE = 2.0
_LINEAR = 1.0

# Newton steps for the 2-norm, by the largest number of keys for which they suffice. The errors of all weights together
# stay below 3e-6, before rounding. This holds in the slowest rows found too: a few equal keys, and many more keys as
# far below them as the threshold.
_STEPS_SQUARE = ((80, 5), (256, 6), (2048, 7))
_MAX_STEPS_SQUARE = 8
# From this exponent on, powers are computed by log1p. Otherwise numbers just below the maximum would be rounded first.
_LARGE_POWER = 9.0
# On a CPU, pow with any other exponent takes twice as long as log1p and exp2. These round small numbers more, which is
# good enough for all steps except the last.
_FAST_POWERS = (0.5, 2.0, 3.0)
_EXTRA_STEPS_FP64 = 2

# Steps by sums in one pass for the 2-norm, by the largest number of columns for which they suffice, as for
# _STEPS_SQUARE. Up to so many columns Newton steps alone are enough, which are fewer launches.
_NEWTON_STEPS = (84, 5)
_STEPS_BY_SUMS = ((768, 5), (2560, 6))
_MAX_STEPS_BY_SUMS = 7
# For more columns the second step follows a parabola. Its curvature is that of the first step times this factor,
# because it is smaller towards the root.
_CURVATURE = 0.86
# Newton steps fall short of the root, so the next two are lengthened. All three numbers left small errors in 100,000
# rows made to be hard: a few levels of equal logits, of any distance and frequency. There the errors of 512 keys were
# below a tenth of the tolerances of the tests, and no step came nearer to the maximum than half the way from the root.
_LENGTHS = {2: 1.14, 3: 1.03}
# Devices whose operations may write to one of their own inputs, and to a tensor of another dtype.
FREE_OUTPUTS = ("cpu", "cuda", "meta", "xpu")


@torch.no_grad()
def entmax(logits: Tensor, alpha: float = 1.5, dim: int = -1) -> Tensor:
    """Compute alpha-entmax along ``dim``: softmax at alpha 1, sparsemax at alpha 2, exact zeros for alpha above 1.

    A fixed number of Newton steps finds the threshold, without sorting and without reading a value back from the
    device. Extra memory is two tensors of the size of the logits.

    Args:
        logits: any shape, floating point. ``-inf`` entries get weight 0; a slice of only ``-inf`` gives zeros.
        alpha: sparsity, 1 to 2.
        dim: the dimension along which the weights sum to 1.

    Returns:
        Weights of the shape and dtype of ``logits``; computed in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: alpha is outside 1 to 2, or ``dim`` is empty.
        TypeError: ``logits`` is not a floating-point tensor.

    Source: arXiv 1905.05702, eq. 10; arXiv 2603.02531 v2 uses it for the sparse retrieval.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.layout != torch.strided:
        raise TypeError(f"entmax needs a dense floating-point tensor, got {dtype_of(logits)}.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha must be a number from 1 to 2, got {echo(alpha)}.")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -logits.ndim <= dim < logits.ndim:
        raise ValueError(f"dim must name one of the {logits.ndim} dimensions of the logits, got {echo(dim)}.")
    if logits.shape[dim] == 0:
        raise ValueError(f"entmax needs at least one entry along dim {dim}, got shape {tuple(logits.shape)}.")
    moved = logits.movedim(dim, -1)
    # A copy, so that the caller's tensor is never written to.
    scaled, _ = scale_and_shift_(moved.to(work_dtype(logits), copy=True), alpha)
    weights = dense_weights_(scaled, alpha)[0] if alpha == 1.0 else sparse_weights(scaled, alpha)
    return weights.to(logits.dtype).movedim(-1, dim)


def scale_and_shift_(logits: Tensor, alpha: float, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute ``(alpha - 1) scale (logits - max)`` over the last axis, in place, and return that and max.

    At alpha 1 the factor ``alpha - 1`` is left out. ``scale`` is positive: the true logits are ``scale * logits``. The
    maximum that is returned is that of ``logits``, without the scale. The maximum of a row of only ``-inf`` counts as
    the lowest finite number.
    """
    maximum = logits.amax(dim=-1, keepdim=True).clamp_min_(-torch.finfo(logits.dtype).max)
    # The maximum is subtracted first, because a large offset that all logits share would round the product.
    shifted = logits.sub_(maximum)
    factor = scale if alpha in (1.0, 2.0) else scale * (alpha - 1.0)
    return shifted if isinstance(factor, float) and factor == 1.0 else shifted.mul_(factor), maximum


def logsumexp_from_sum(maximum: Tensor, scale: Tensor | float, total: Tensor) -> Tensor:
    """Compute the logsumexp of logits from their maximum and the ``total`` of ``exp(logit - maximum)``.

    ``scale`` is the scale of the maximum, as for :func:`scale_and_shift_`.
    """
    largest = torch.finfo(total.dtype).max
    return (maximum * scale).clamp_(-largest, largest).add_(total.log())


def dense_weights_(scaled: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Compute the softmax of the result of :func:`scale_and_shift_`, in place, and its denominator ``[..., 1]``."""
    # On a CPU exp2 takes half the time of exp.
    weights = scaled.mul_(math.log2(math.e) / (alpha - 1.0 or 1.0)).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    return weights.div_(total.clamp_min(torch.finfo(total.dtype).tiny)), total


def sparse_weights(scaled: Tensor, alpha: float) -> Tensor:
    """Compute alpha-entmax (1 < alpha <= 2) of the result of :func:`scale_and_shift_`, which is not changed."""
    power = 1.0 / (alpha - 1.0)
    weights = _powers_above_threshold(scaled, power)
    # Newton's iteration stops a rounding error below the root. The division makes the weights sum to 1 all the same.
    total = weights.sum(dim=-1, keepdim=True)
    return weights.div_(total.clamp_min_(torch.finfo(total.dtype).tiny))


def square_weights(logits: Tensor, maximum: Tensor, spare: int = 0) -> Tensor:
    """Compute weights in proportion to 1.5-entmax in few passes over memory, for devices where these take the time.

    Args:
        logits: ``[..., N + spare]``, contiguous, of a size of 2^41 at most. They are changed only without spare
            columns: the maximum is subtracted then.
        maximum: their maximum, ``[..., 1]``.
        spare: number of columns at the end that may be written to. They hold ``-inf`` afterwards, and their weights are
            0. :func:`sums_in_one_pass` says where to give some.

    Returns:
        The weights. A row of only ``-inf`` may give NaN.

    In the scale of logits, 1.5-entmax is ``relu(logit - tau) ** 2 / 4``, with tau from -2 to 0 above the maximum.
    """
    if spare:
        tau = _threshold_by_sums(logits, maximum, spare)
        above = torch.maximum(logits, tau)
    else:
        tau, above = _threshold_by_newton(logits.sub_(maximum))
    if above.device.type in FREE_OUTPUTS:
        # (above - tau) ** 2 in one pass
        torch.ops.aten.mse_loss.out(above, tau.expand_as(above), 0, out=above)
    else:
        above.sub_(tau).square_()
    if spare:
        logits[..., -spare:].fill_(-torch.inf)
    return above


def sums_in_one_pass(keys: int, device: torch.device) -> bool:
    """Return True where :func:`square_weights` should have spare columns: if the device has the sums, for enough keys.

    For very short rows torch's multi-margin loss is slow, because one thread adds up the 128 sums of the others. Where
    the limit lies is an estimate; no card was at hand.
    """
    return keys >= 64 and device.type in ("cpu", "cuda", "meta", "xpu")


def _threshold_by_newton(shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Find tau by Newton's iteration on ``||relu(shifted - tau)||_2 = 2``; return it and ``max(shifted, tau)``.

    Mean and deviation of ``max(shifted, tau)``, from one pass, give both sums that a step needs.
    """
    keys, bits = shifted.shape[-1], torch.finfo(shifted.dtype).bits
    root = 2.0 / math.sqrt(keys)  # the root mean square of relu(shifted - tau) where tau is found
    above = shifted.clamp_min(-2.0)
    tau: Tensor | None = None
    for _ in range(newton_steps(keys, _SQUARE) + (_EXTRA_STEPS_FP64 if bits == 64 else 0)):
        if tau is not None:
            above.clamp_min_(tau)
        deviation, mean = torch.std_mean(above, dim=-1, correction=0, keepdim=True)
        excess = mean + 2.0 if tau is None else mean - tau
        size = torch.hypot(deviation, excess)
        # tau + size (size - root) / excess, where size ** 2 = deviation ** 2 + excess ** 2
        tau = torch.addcdiv(mean, size.addcmul_(deviation, deviation, value=-1.0 / root), excess, value=-root)
    assert tau is not None
    # Not from ``above``: rounding may put tau below -2, and then keys far below it would get a weight.
    return tau, torch.maximum(shifted, tau, out=above)


def _threshold_by_sums(logits: Tensor, maximum: Tensor, spare: int) -> Tensor:
    """Find tau of ``||relu(logits - tau)||_2 = 2`` from sums alone; return it and leave it in the spare columns.

    torch's multi-margin loss is the mean over i of ``relu(x_i - x_j) ** p``. So with tau in column j one pass gives a
    sum, and no tensor of the size of the logits is written.

    Both slopes of the first step, which is a Newton step, give its mean curvature. For many columns the second step
    goes to the root of the parabola with the present slope and this curvature. The others are Newton steps again.
    """
    columns, info = logits.shape[-1], torch.finfo(logits.dtype)
    most, steps = _NEWTON_STEPS
    has_parabola = columns > most
    if has_parabola:
        steps = next((steps for most, steps in _STEPS_BY_SUMS if columns <= most), _MAX_STEPS_BY_SUMS)
    steps += 1 if info.bits == 64 else 0
    rows, maximum = logits.view(-1, columns), maximum.reshape(-1, 1)
    target = torch.full((rows.shape[0],), columns - 1, device=rows.device)
    root = 2.0 / math.sqrt(columns)  # the root mean square of relu(logits - tau) where tau is found
    # Steps change the last column alone. The others stay 2 below the maximum. No root is lower, so they add nothing.
    spares, tau = rows[:, -spare:], rows[:, -1:]
    torch.sub(maximum.expand_as(spares), 2.0, out=spares)
    change = first_mean = tau
    for step in range(steps):
        square, mean = _mean_power(rows, target, 2), _mean_power(rows, target, 1)
        if has_parabola and step == 1:
            excess = square.sub_(root * root)
            bend = (excess / change).mul_(mean - first_mean)
            discriminant = bend.addcmul_(mean, mean).relu_().sqrt_()
            denominator = discriminant.add_(mean, alpha=(2.0 - _CURVATURE) / _CURVATURE)
            tau.addcdiv_(excess, denominator, value=1.0 / _CURVATURE)
            continue
        numerator = torch.sub(square, square.sqrt(), alpha=root)
        if has_parabola and step == 0:
            tiny = rows.new_full((1,), info.tiny)  # so that no change is 0, as the next step divides by it
            change, first_mean = torch.addcdiv(tiny, numerator, mean), mean
            tau.add_(change)
        else:
            length = _LENGTHS.get(step, 1.0) if has_parabola else 1.0
            tau = torch.addcdiv(tau, numerator, mean, value=length, out=None if step == steps - 1 else tau)
    # Where logits are so large that tau is rounded to the maximum, or no longer a number, the largest take everything.
    below = torch.nextafter(maximum, torch.tensor(-torch.inf, dtype=maximum.dtype))
    torch.fmin(tau.expand_as(spares), below, out=spares)
    return logits[..., -1:]


def _mean_power(rows: Tensor, target: Tensor, power: int) -> Tensor:
    """Compute the mean of ``relu(x - x_target) ** power`` over each row, ``[rows, 1]``."""
    loss = torch.nn.functional.multi_margin_loss(rows, target, p=power, margin=0.0, reduction="none")
    return loss.unsqueeze(-1)


def newton_steps(keys: int, power: float) -> int:
    """Return the number of Newton steps from tau = -1 that find the root in fp32; ``power`` is ``1 / (alpha - 1)``."""
    if power >= _SQUARE:
        return next((steps for most, steps in _STEPS_SQUARE if keys <= most), _MAX_STEPS_SQUARE)
    # Newton's steps are exact along the straight lines of the 1-norm. This number was enough in all rows that were
    # tried, of up to 4,608 keys, and for all powers from 1 to 2.
    return keys.bit_length() + 1


def _powers_above_threshold(scaled: Tensor, power: float) -> Tensor:
    """Compute ``relu(scaled - tau) ** power`` for the root tau of ``||relu(scaled - tau)||_power = 1``."""
    info = torch.finfo(scaled.dtype)
    steps = newton_steps(scaled.shape[-1], power) + (_EXTRA_STEPS_FP64 if info.bits == 64 else 0)
    if power >= _LARGE_POWER:
        return _large_powers_above_threshold(scaled, power, steps)
    tau = scaled.new_full((*scaled.shape[:-1], 1), -1.0)
    above = torch.empty_like(scaled)
    slopes = above if power == _SQUARE else torch.empty_like(scaled)
    for step in range(steps):
        last = step == steps - 1
        if last:
            # Slightly lower, so that rounding does not put tau above the root. A row of only -inf has no root: 0 / 0.
            tau.sub_(info.eps / 2).nan_to_num_(nan=-1.0)
        above = torch.sub(scaled, tau, out=reusable(above)).relu_()
        if power == _SQUARE:
            slope = above.sum(dim=-1, keepdim=True)
            excess = torch.linalg.vector_norm(above, dim=-1, keepdim=True).sub_(1.0)
            numerator = torch.addcmul(excess, excess, excess)
        elif power == _LINEAR:
            slope = torch.sign(above, out=reusable(slopes)).sum(dim=-1, keepdim=True)
            numerator = above.sum(dim=-1, keepdim=True).sub_(1.0)
        else:
            # The derivative of the way by log1p is 0 * inf for keys below the threshold.
            if last or power - 1.0 in _FAST_POWERS or is_forward_mode():
                slopes = torch.pow(above, power - 1.0, out=reusable(slopes))
            else:
                slopes = _power_by_log1p(torch.sub(above, 1.0, out=reusable(slopes)), power - 1.0, slopes)
            slope = slopes.sum(dim=-1, keepdim=True)
            numerator = _step_numerator(slopes.mul_(above).sum(dim=-1, keepdim=True), power)
        if last:
            # ``above`` is lowered instead of raising tau. Many keys near the threshold have small numbers above it, and
            # the dtype is finer for these than for tau.
            above.sub_(_step(numerator, slope).clamp_min_(0.0)).relu_()
        else:
            tau.addcdiv_(numerator, slope)
    return above if power == _LINEAR else above.pow_(power)


def _large_powers_above_threshold(scaled: Tensor, power: float, steps: int) -> Tensor:
    """Compute the same by log1p, so that powers of 1,000 and more are exact for numbers just below the maximum."""
    offset = scaled.clamp(min=-1.0)  # scaled - tau - 1, first for tau = -1
    powers = torch.empty_like(scaled)
    for _ in range(steps):
        powers = _power_by_log1p(offset, power - 1.0, powers)
        slope = powers.sum(dim=-1, keepdim=True)
        total = powers.addcmul_(powers, offset).sum(dim=-1, keepdim=True)
        # A step is negative only by rounding. It would bring keys back that already lie below the threshold.
        offset.sub_(_step(_step_numerator(total, power), slope).clamp_min_(0.0)).clamp_min_(-1.0)
    return _power_by_log1p(offset, power, powers)


def is_forward_mode() -> bool:
    """Return True while forward-mode differentiation is active, as in ``torch.func.jvp``."""
    return forward_ad._current_level >= 0


def reusable(memory: Tensor) -> Tensor | None:
    """Return memory for a result; None in forward-mode differentiation, which refuses ``out=``."""
    return None if is_forward_mode() else memory


def _power_by_log1p(offset: Tensor, power: float, powers: Tensor) -> Tensor:
    """Compute ``(1 + offset) ** power``, in ``powers`` if it can be reused; exp2 is far faster than exp on a CPU."""
    return torch.log1p(offset, out=reusable(powers)).mul_(power * math.log2(math.e)).exp2_()


def _step_numerator(total: Tensor, power: float) -> Tensor:
    """Compute ``(norm - 1) norm ** (power - 1)`` from ``total = norm ** power``; over the slope it is a Newton step."""
    return total - total.pow(1.0 - 1.0 / power)


def _step(numerator: Tensor, slope: Tensor) -> Tensor:
    """Compute the Newton step of tau. The slope is at least 1 below the root, except in a row of only ``-inf``."""
    return numerator.div_(slope.clamp_min_(1.0))
