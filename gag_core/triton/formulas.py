# SPDX-License-Identifier: GPL-3.0-or-later
"""Functions that the fused kernel and the row kernels share: masks, weights of both read-outs, the guidance.

``entmax.py`` and ``geometry.py`` explain the mathematics. These functions keep to what Triton 3.0 can do: no tuples of
tensors as arguments. Nor is there ``from __future__ import annotations``, because the interpreter of that Triton tells
constants by their annotations.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter runs these on the CPU: slow, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Custom reductions save exchanges between threads. The interpreter would call them for each number.
FEW_EXCHANGES = tl.constexpr(not INTERPRETED)

# Arguments of kernels that change with the lengths of prompts and pictures. Triton would compile a program anew where
# one of them becomes 1 or a multiple of 16, or a pointer is aligned otherwise.
VARYING = ["heads", "query_count", "key_count", "units", "mask", "mask_batch", "mask_head", "mask_query", "joint_lse"]
VARYING += ["lse_batch", "lse_head", "lse_query"]

# Keeps 0 / 0 at 0. It is not a denormal, which GPUs may flush to 0.
TINY = tl.constexpr(1.2e-38)
FP32_MAX = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
# The reciprocal of a larger power of two is a denormal.
LARGEST_SCALE = tl.constexpr(2.0**126)
# With factors up to this, no sum of two products with numbers that fp16 holds overflows.
_MAX_FACTOR = tl.constexpr(2.0**100)


@triton.jit
def program_position(query_count, heads, BLOCK_M: tl.constexpr):
    """Return the first query, the head and the batch row of this program, in 64 bits, as they multiply strides."""
    blocks = tl.cdiv(query_count, BLOCK_M)
    program = tl.program_id(0)
    plane = program // blocks
    return (program % blocks).to(tl.int64) * BLOCK_M, (plane % heads).to(tl.int64), (plane // heads).to(tl.int64)


@triton.jit
def masked(logits, mask_values, logit_scale, MASK: tl.constexpr):
    """Apply a part of the mask. With an additive mask the result has the factor ``logit_scale``, the true logits."""
    if MASK == "bool":
        logits = tl.where(mask_values != 0, logits, float("-inf"))
    else:
        logits = clamp(logits * logit_scale, FP32_MAX) + mask_values.to(tl.float32)
        logits = tl.where(logits > FP32_MAX, FP32_MAX, logits)
    return logits


@triton.jit
def scale_and_shift(logits, maximum, scale):
    """Compute ``(alpha - 1) (z - max z)``. The maximum is subtracted first, as the product would round large logits."""
    return (logits - maximum[:, None]) * scale


@triton.jit
def dense_weights(scaled, power, SCALE_BITS: tl.constexpr):
    """Compute ``exp(z - max z)``, divided by ``2 ** SCALE_BITS``."""
    if SCALE_BITS:
        weights = tl.exp2(scaled * (power * LOG2_E) - SCALE_BITS)
    else:
        weights = tl.exp2(scaled * (power * LOG2_E))
    return weights


@triton.jit
def positive_power(base, exponent):
    """Compute ``base ** exponent`` for a base of at least 0 and an exponent above 0."""
    return tl.where(base > 0.0, tl.exp2(exponent * tl.log2(tl.maximum(base, TINY))), 0.0)


@triton.jit
def sparse_weights(scaled, tau, power, POWER: tl.constexpr):
    """Compute ``relu(scaled - tau) ** power``."""
    weights = _above(scaled, tau)
    if POWER == 2:
        weights = weights * weights
    elif POWER == 0:
        weights = positive_power(weights, power)
    return weights


@triton.jit
def _above(scaled, tau):
    """Compute ``relu(scaled - tau)``. It is at most 1, and cards subtract and clamp to [0, 1] in one instruction."""
    return tl.clamp(scaled - tau[:, None], 0.0, 1.0)


@triton.jit
def newton_terms(scaled, tau, power, POWER: tl.constexpr):
    """Compute the terms of the sum of ``relu(scaled - tau) ** power``, and of its slope divided by power."""
    above = _above(scaled, tau)
    if POWER == 2:
        slopes = above
    elif POWER == 1:
        slopes = (above > 0.0).to(tl.float32)
    else:
        slopes = positive_power(above, power - 1.0)
    return slopes * above, slopes


@triton.jit
def newton_step(tau, total, slope, power, POWER: tl.constexpr):
    """Do a Newton step towards the root tau of ``||relu(scaled - tau)||_power = 1``, from below except by rounding."""
    if POWER == 2:
        norm = tl.sqrt(total)
        change = norm * (norm - 1.0)
    elif POWER == 1:
        change = total - 1.0
    else:
        change = total - positive_power(total, 1.0 - 1.0 / power)
    # Below the root the slope is at least 1, except in a row that may read nothing.
    return tau + change * reciprocal(tl.maximum(slope, 1.0))


@triton.jit
def row_sums(one, other):
    """Sum two tiles over their rows, in one exchange."""
    if FEW_EXCHANGES:
        one_sum, other_sum = tl.reduce((one, other), 1, _add_pairs)
    else:
        one_sum = tl.sum(one, 1)
        other_sum = tl.sum(other, 1)
    return one_sum, other_sum


@triton.jit
def _add_pairs(one, other, more, other_more):
    """Reduce two sums at once."""
    return one + more, other + other_more


@triton.jit
def reciprocal(x):
    """Compute ``1 / x`` for x from TINY to its reciprocal. An exact division takes twice as many instructions."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def clamp(tile, LARGEST: tl.constexpr):
    """Clamp to ``-LARGEST`` and ``LARGEST``; NaN stays."""
    return tl.clamp(tile, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power_of_two_scale(largest):
    """Return a power of two, below each of the numbers by a factor of at most 4, and its reciprocal."""
    # Neither the scale nor its reciprocal is a denormal.
    largest = tl.minimum(tl.maximum(largest, TINY), LARGEST_SCALE)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def text_mass(total, maximum, joint_lse):
    """Compute the share of the joint softmax, from the total of ``exp(z - max z)`` and the maximum of the logits."""
    mass = total * tl.exp2((clamp(maximum, FP32_MAX) - joint_lse) * LOG2_E)
    # Where no text may be read the mass is 0, and the line above gives NaN.
    return tl.where(total > 0.0, tl.where(mass > 1.0, 1.0, mass), 0.0)


@triton.jit
def cap(length, limit):
    """Compute the length of the guidance vector after the cap: the same function as ``geometry.cap``, for lengths > 0.

    A limit that is NaN, which an infinite cap times a norm of 0 gives, leaves the length as it is.
    """
    return tl.where(limit < length, limit, length)


@triton.jit
def share_of_sparse(square, product):
    """Compute the part of ``dense`` along ``sparse``, in units of ``sparse``, from <sparse, sparse> and their product.

    These are the read-outs before their scales: see :func:`guidance_factors`.
    """
    return product * reciprocal(tl.maximum(square, TINY))


@triton.jit
def guidance_factors(
    square, share, rest, sparse_scale, dense_scale, guidance_scale, norm_threshold, orthogonal_scale, strength,
    RULE: tl.constexpr, RELATIVE: tl.constexpr, ORTHOGONAL: tl.constexpr, FP32_RANGE: tl.constexpr,
):  # fmt: skip
    """Compute the factors a and b of each row with ``strength * (guided - D) = a * sparse + b * dense``.

    The read-outs S and D are ``sparse_scale * sparse`` and ``dense_scale * dense``. The formulas are those of
    ``geometry.guidance_factors``, with factors of S and D instead of S and S - D. They are linear in S and D except for
    norms and inner products, so callers pass over the row only for these: ``square`` is <sparse, sparse>, ``share`` is
    :func:`share_of_sparse`, and ``rest`` the square of ``share * sparse - dense``, which is read if ORTHOGONAL.
    """
    if RULE == "pladis":
        on_sparse = sparse_scale * (strength * guidance_scale)
        on_dense = dense_scale * (-strength * guidance_scale)
    else:
        # r_par, the part of S - D along S, is ``parallel * sparse``. The part of D along S is
        # ``share * dense_scale * sparse``.
        parallel = sparse_scale - share * dense_scale
        length = tl.sqrt(square)
        guidance_norm = tl.abs(parallel) * length
        if ORTHOGONAL:
            across_norm = tl.abs(orthogonal_scale) * dense_scale * tl.sqrt(rest)
            larger = tl.maximum(tl.maximum(guidance_norm, across_norm), TINY)
            guidance_norm /= larger
            across_norm /= larger
            guidance_norm = larger * tl.sqrt(guidance_norm * guidance_norm + across_norm * across_norm)
        limit = tl.zeros_like(square) + norm_threshold
        if RELATIVE:
            limit *= sparse_scale * length
        # Divide length and limit by ||g||, so that cap returns the factor that shortens g.
        gain = cap(1.0, limit / tl.maximum(guidance_norm, TINY)) * guidance_scale
        on_sparse = strength * (sparse_scale + gain * parallel)
        on_dense = -strength * dense_scale
        if ORTHOGONAL:
            across = gain * orthogonal_scale
            on_sparse += strength * across * (share * dense_scale)
            on_dense -= strength * across * dense_scale
    # A row without a direction is not changed.
    known = (on_sparse == on_sparse) & (on_dense == on_dense)
    if FP32_RANGE:
        on_sparse = clamp(on_sparse, LARGEST_SCALE)
        on_dense = clamp(on_dense, LARGEST_SCALE)
    else:
        on_sparse = clamp(on_sparse, _MAX_FACTOR)
        on_dense = clamp(on_dense, _MAX_FACTOR)
    return tl.where(known, on_sparse, 0.0), tl.where(known, on_dense, 0.0)
