# SPDX-License-Identifier: GPL-3.0-or-later
"""Triton kernels of the row path: the weights of both read-outs from logits, and the guided output from read-outs.

They keep to what Triton 3.0 can do, as ``formulas.py`` does, and have no ``tl.dot``. So they compile for cards without
matrix units too. ``row.py`` computes the products between them.

Arguments that several kernels take:
    heads, query_count: sizes of the call. A plane is one head of one batch row.
    FP32_RANGE: True if the tensors have the range of fp32, which fp16 has not. Weights are then divided by 2, so that
        no sum of values overflows.
    POWER, STEPS, RULE, RELATIVE, ORTHOGONAL, MASK, MASK_PER_QUERY, OUT_MAX: as in ``kernels.py``.
    UNIT: number of elements that lengths and strides of rows are counted in, so that a card can read many at once.
"""

import triton
import triton.language as tl

from .formulas import (
    FP32_MAX,
    TINY,
    VARYING,
    clamp,
    dense_weights,
    guidance_factors,
    masked,
    newton_step,
    newton_terms,
    power_of_two_scale,
    program_position,
    reciprocal,
    row_sums,
    scale_and_shift,
    share_of_sparse,
    sparse_weights,
    text_mass,
)


@triton.jit(do_not_specialize=VARYING)
def row_weights_kernel(
    logits,
    mask,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    joint_lse,
    lse_batch,
    lse_head,
    lse_query,
    weights,
    mass,
    heads,
    query_count,
    key_count,
    units,
    logit_scale,
    power,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POWER: tl.constexpr,
    STEPS: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    JOINT: tl.constexpr,
    FP32_RANGE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Compute sparse and dense weights of rows that fit on chip, in one pass over memory.

    Args:
        logits: fp32 ``[planes, queries, units * UNIT]``; what lies beyond ``key_count`` is ignored.
        mask: ``[batch, heads, queries, keys]`` with any strides, which are the next four arguments.
        joint_lse: ``[batch, heads, queries]`` with any strides, which are the next three; it is read if JOINT.
        weights: ``[planes, 2, queries, units * UNIT]``, sparse and dense; 0 beyond ``key_count``.
        mass: fp32 ``[planes, queries]``, the mass of the text, which is written if JOINT.
        logit_scale: logits are the given numbers times this; above 0.
        BLOCK_N: a power of two, at least ``units * UNIT``.
    """
    first_query, head, batch = program_position(query_count, heads, BLOCK_M)
    plane = batch * heads + head
    rows = first_query + tl.arange(0, BLOCK_M)
    readable = rows < query_count
    columns = tl.arange(0, BLOCK_N)
    mask += batch * mask_batch + head * mask_head
    scale = logit_scale
    if MASK == "additive":
        scale = 1.0
    row_logits = _loaded_logits(
        logits + plane * query_count * (units * UNIT), rows, readable, columns, key_count, units,
        mask, mask_query, mask_key, logit_scale, MASK, MASK_PER_QUERY, UNIT,
    )  # fmt: skip
    # Rows with no readable key have maximum -inf; use 0, because -inf - -inf is NaN.
    maximum = tl.max(row_logits, 1)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    scaled = scale_and_shift(row_logits, maximum, scale / power)

    tau = tl.full((BLOCK_M,), -1.0, tl.float32)
    for _ in range(STEPS):
        above, slopes = newton_terms(scaled, tau, power, POWER)
        total, slope = row_sums(above, slopes)
        tau = newton_step(tau, total, slope, power, POWER)

    sparse = sparse_weights(scaled, tau, power, POWER)
    dense = dense_weights(scaled, power, 0)
    sparse_total, dense_total = row_sums(sparse, dense)
    _store_weights(
        weights, plane, query_count, rows, readable, columns, units,
        sparse, dense, sparse_total, dense_total, FP32_RANGE, UNIT,
    )  # fmt: skip
    if JOINT:
        _store_mass(
            mass + plane * query_count, joint_lse + batch * lse_batch + head * lse_head, lse_query, rows, readable,
            dense_total, maximum * scale,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def long_row_weights_kernel(
    logits,
    mask,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    joint_lse,
    lse_batch,
    lse_head,
    lse_query,
    weights,
    mass,
    heads,
    query_count,
    key_count,
    units,
    logit_scale,
    power,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POWER: tl.constexpr,
    STEPS: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    JOINT: tl.constexpr,
    FP32_RANGE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Compute the same for rows that do not fit on chip, which each pass reads anew in blocks of ``BLOCK_N`` keys."""
    first_query, head, batch = program_position(query_count, heads, BLOCK_M)
    plane = batch * heads + head
    rows = first_query + tl.arange(0, BLOCK_M)
    readable = rows < query_count
    columns = tl.arange(0, BLOCK_N)
    mask += batch * mask_batch + head * mask_head
    logits += plane * query_count * (units * UNIT)
    length = units * UNIT
    scale = logit_scale
    if MASK == "additive":
        scale = 1.0

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first in range(0, length, BLOCK_N):
        row_logits = _loaded_logits(
            logits, rows, readable, first + columns, key_count, units,
            mask, mask_query, mask_key, logit_scale, MASK, MASK_PER_QUERY, UNIT,
        )  # fmt: skip
        maximum = tl.maximum(maximum, tl.max(row_logits, 1))
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)

    tau = tl.full((BLOCK_M,), -1.0, tl.float32)
    for _ in range(STEPS):
        total = tl.zeros((BLOCK_M,), tl.float32)
        slope = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(0, length, BLOCK_N):
            row_logits = _loaded_logits(
                logits, rows, readable, first + columns, key_count, units,
                mask, mask_query, mask_key, logit_scale, MASK, MASK_PER_QUERY, UNIT,
            )  # fmt: skip
            above, slopes = newton_terms(scale_and_shift(row_logits, maximum, scale / power), tau, power, POWER)
            block_total, block_slope = row_sums(above, slopes)
            total += block_total
            slope += block_slope
        tau = newton_step(tau, total, slope, power, POWER)

    sparse_total = tl.zeros((BLOCK_M,), tl.float32)
    dense_total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, length, BLOCK_N):
        row_logits = _loaded_logits(
            logits, rows, readable, first + columns, key_count, units,
            mask, mask_query, mask_key, logit_scale, MASK, MASK_PER_QUERY, UNIT,
        )  # fmt: skip
        scaled = scale_and_shift(row_logits, maximum, scale / power)
        block_sparse, block_dense = row_sums(sparse_weights(scaled, tau, power, POWER), dense_weights(scaled, power, 0))
        sparse_total += block_sparse
        dense_total += block_dense

    for first in range(0, length, BLOCK_N):
        row_logits = _loaded_logits(
            logits, rows, readable, first + columns, key_count, units,
            mask, mask_query, mask_key, logit_scale, MASK, MASK_PER_QUERY, UNIT,
        )  # fmt: skip
        scaled = scale_and_shift(row_logits, maximum, scale / power)
        _store_weights(
            weights, plane, query_count, rows, readable, first + columns, units,
            sparse_weights(scaled, tau, power, POWER), dense_weights(scaled, power, 0), sparse_total, dense_total,
            FP32_RANGE, UNIT,
        )  # fmt: skip
    if JOINT:
        _store_mass(
            mass + plane * query_count, joint_lse + batch * lse_batch + head * lse_head, lse_query, rows, readable,
            dense_total, maximum * scale,
        )  # fmt: skip


@triton.jit
def _loaded_logits(
    logits,
    rows,
    readable,
    columns,
    key_count,
    units,
    mask,
    mask_query,
    mask_key,
    logit_scale,
    MASK: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Load logits of one plane, ``-inf`` where a key may not be read; with an additive mask the scale is applied."""
    length = units * UNIT
    pointers = logits + rows[:, None] * length + columns[None, :]
    # All of a row is read, and the keys are told from the padding afterwards: so a card reads 16 bytes at once.
    row_logits = tl.load(pointers, mask=readable[:, None] & (columns[None, :] < length), other=0.0)
    if MASK != "none":
        if MASK_PER_QUERY:
            pointers = mask + rows[:, None] * mask_query + columns[None, :].to(tl.int64) * mask_key
            values = tl.load(pointers, mask=readable[:, None] & (columns[None, :] < key_count), other=0)
        else:
            pointers = mask + columns.to(tl.int64) * mask_key
            values = tl.load(pointers, mask=columns < key_count, other=0)[None, :]
        row_logits = masked(row_logits, values, logit_scale, MASK)
    return tl.where(columns[None, :] < key_count, row_logits, float("-inf"))


@triton.jit
def _store_weights(
    weights,
    plane,
    query_count,
    rows,
    readable,
    columns,
    units,
    sparse,
    dense,
    sparse_total,
    dense_total,
    FP32_RANGE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Divide both weights by their totals, and by 2 if FP32_RANGE, and write them."""
    length = units * UNIT
    sparse_factor = reciprocal(tl.maximum(sparse_total, TINY))
    dense_factor = reciprocal(tl.maximum(dense_total, TINY))
    if FP32_RANGE:
        sparse_factor *= 0.5
        dense_factor *= 0.5
    inside = readable[:, None] & (columns[None, :] < length)
    pointers = weights + (plane * 2 * query_count + rows[:, None]) * length + columns[None, :]
    tl.store(pointers, (sparse * sparse_factor[:, None]).to(weights.dtype.element_ty), mask=inside)
    pointers += query_count.to(tl.int64) * length
    tl.store(pointers, (dense * dense_factor[:, None]).to(weights.dtype.element_ty), mask=inside)


@triton.jit
def _store_mass(mass, joint_lse, lse_query, rows, readable, dense_total, maximum):
    """Compute and write the mass of the text."""
    joint = tl.load(joint_lse + rows * lse_query, mask=readable, other=0.0).to(tl.float32)
    tl.store(mass + rows, text_mass(dense_total, maximum, joint), mask=readable)


@triton.jit(
    do_not_specialize=[
        "heads",
        "query_count",
        "out_batch",
        "out_head",
        "out_query",
        "base_batch",
        "base_head",
        "base_query",
    ]
)
def row_guidance_kernel(
    read_outs,
    mass,
    out,
    out_batch,
    out_head,
    out_query,
    out_dim,
    base,
    base_batch,
    base_head,
    base_query,
    base_dim,
    heads,
    query_count,
    guidance_scale,
    norm_threshold,
    orthogonal_scale,
    strength,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RULE: tl.constexpr,
    RELATIVE: tl.constexpr,
    ORTHOGONAL: tl.constexpr,
    HAS_BASE: tl.constexpr,
    JOINT: tl.constexpr,
    FP32_RANGE: tl.constexpr,
    OUT_MAX: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Compute the guided output from both read-outs.

    Args:
        read_outs: fp32 ``[planes, 2, queries, VALUE_DIM]``, sparse and dense, of the weights of the kernels above.
        mass: fp32 ``[planes, queries]``, which is read if JOINT.
        out, base: ``[batch, heads, queries, VALUE_DIM]`` with any strides, which follow each; base is read if HAS_BASE.
        BLOCK_D: a power of two, at least VALUE_DIM.
    """
    first_query, head, batch = program_position(query_count, heads, BLOCK_M)
    plane = batch * heads + head
    rows = first_query + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < query_count) & (dims[None, :] < VALUE_DIM)
    pointers = read_outs + (plane * 2 * query_count + rows[:, None]) * VALUE_DIM + dims[None, :]
    sparse = tl.load(pointers, mask=inside, other=0.0)
    dense = tl.load(pointers + query_count.to(tl.int64) * VALUE_DIM, mask=inside, other=0.0)

    # Read-outs are the loaded ones times these numbers.
    sparse_scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    dense_scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if FP32_RANGE:
        # Their squares must neither over- nor underflow.
        scale, inverse = power_of_two_scale(tl.max(tl.abs(sparse), 1))
        sparse *= inverse[:, None]
        sparse_scale = clamp(2.0 * scale, FP32_MAX)
        scale, inverse = power_of_two_scale(tl.max(tl.abs(dense), 1))
        dense *= inverse[:, None]
        dense_scale = clamp(2.0 * scale, FP32_MAX)
    square, product = row_sums(sparse * sparse, sparse * dense)
    share = share_of_sparse(square, product)
    across = share[:, None] * sparse - dense
    on_sparse, on_dense = guidance_factors(
        square, share, tl.sum(across * across, 1), sparse_scale, dense_scale,
        guidance_scale, norm_threshold, orthogonal_scale, strength, RULE, RELATIVE, ORTHOGONAL, FP32_RANGE,
    )  # fmt: skip
    if JOINT:
        text = tl.load(mass + plane * query_count + rows, mask=rows < query_count, other=0.0)
        on_sparse *= text
        on_dense *= text
    if not HAS_BASE:
        on_dense += dense_scale
    guided = sparse * on_sparse[:, None] + dense * on_dense[:, None]
    if HAS_BASE:
        base += (batch * base_batch + head * base_head) * UNIT
        pointers = base + rows[:, None] * (base_query * UNIT) + dims[None, :] * base_dim
        unguided = tl.load(pointers, mask=inside, other=0.0)
        guided += unguided.to(tl.float32)
    guided = clamp(guided, OUT_MAX).to(out.dtype.element_ty)
    out += (batch * out_batch + head * out_head) * UNIT
    tl.store(out + rows[:, None] * (out_query * UNIT) + dims[None, :] * out_dim, guided, mask=inside)
