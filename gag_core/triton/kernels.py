# SPDX-License-Identifier: GPL-3.0-or-later
"""Triton kernels that compute both read-outs, the geometry and the blend in one pass; only the output leaves the chip.

A program does a block of queries of one head. Head dimensions and keys are cut into tiles whose widths are powers of
two (77 keys cost 80 and not 128, a head of 40 costs 48 and not 64). A tuple of tensors stands for a row, one for each
tile, and loops over the tuple are unrolled. Only the last tile may reach beyond the end. ``eager.py``, ``entmax.py``
and ``geometry.py`` explain the mathematics, and the tests hold this file to them. The comments here explain how a card
does it in few instructions.

A list of tiles is one integer, because Triton 3.3 cannot index a constant tuple: the number of tiles in the lowest 8
bits, then 16 bits for each tile, of which the lowest 4 are the logarithm of its width to base 2, and the others its
first element. ``launch.packed`` makes such integers. Each place that reads one does it in the same words, because
Triton up to 3.4 has no function that returns a constant.

Arguments that both kernels take:
    q, k, v, out, base, mask: pointers, each with its four strides; where there is no base or mask, these are q, which
        is not read (``HAS_BASE``, ``MASK``). ``joint_lse`` has three strides. Those of mask and joint_lse are arguments
        of their own, because Triton specialises on each number in a tuple (``formulas.VARYING``).
    ALIGNMENT: the number of elements that can be read at once. Strides of q, k, v, out and base, except the last, are
        in units of it.
    logit_scale: logits are products of queries and keys times this; above 0.
    HEAD_DIM, VALUE_DIM: head dimension of q and k, and of v; DIM_TILES, VALUE_TILES: their tiles.
    power: ``1 / (alpha - 1)``. POWER: 2 or 1 where the power is that, which is cheaper, and else 0.
    STEPS: Newton steps that find the threshold tau.
    ORTHOGONAL: True if orthogonal_scale is not 0.
    MASK: "none", "bool" or "additive"; MASK_PER_QUERY: True if the mask differs between queries.
    FP32_RANGE: True if the tensors have the range of fp32, which fp16 has not. Products and sums of such numbers could
        overflow.
    UPCAST: True for bf16 in Triton's interpreter, which multiplies its bits as if they were integers.
    PRECISION: precision of products in fp32, as ``tl.dot`` names it.
    OUT_MAX: the largest finite number of the dtype of the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import (
    FEW_EXCHANGES,
    FP32_MAX,
    LOG2_E,
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

# Where products could overflow (FP32_RANGE), queries are clamped to _MAX_QUERY and divided by QUERY_SCALE, a power of
# two, so that no sum of 256 products with finite keys overflows. Dense weights are divided by 2**_DENSE_SCALE_BITS, so
# that no sum of values overflows.
_MAX_QUERY = tl.constexpr(2.0**54)
QUERY_SCALE = 2.0**64
_QUERY_SCALE = tl.constexpr(QUERY_SCALE)
_DENSE_SCALE_BITS = tl.constexpr(20)


@triton.jit(do_not_specialize=VARYING)
def guided_attention_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    out,
    out_strides,
    base,
    base_strides,
    mask,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    joint_lse,
    lse_batch,
    lse_head,
    lse_query,
    heads,
    query_count,
    key_count,
    logit_scale,
    power,
    guidance_scale,
    norm_threshold,
    orthogonal_scale,
    strength,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_TILES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    WARPS_SHARE_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    POWER: tl.constexpr,
    STEPS: tl.constexpr,
    RULE: tl.constexpr,
    RELATIVE: tl.constexpr,
    ORTHOGONAL: tl.constexpr,
    HAS_BASE: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    JOINT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FP32_RANGE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT_MAX: tl.constexpr,
):
    """Compute guided attention with the logits of a whole row on chip.

    KEY_TILES: tiles of the keys. WARPS_SHARE_QUERIES: True if several warps work on the same queries.
    """
    first_query, head, batch = program_position(query_count, heads, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    row_count = query_count - first_query
    queries = _queries(
        q, q_strides, batch, head, first_query, rows, row_count, HEAD_DIM, DIM_TILES, ALIGNMENT, FP32_RANGE
    )
    k = _start(k, k_strides, batch, head, 0, ALIGNMENT)
    v = _start(v, v_strides, batch, head, 0, ALIGNMENT)
    mask += batch * mask_batch + head * mask_head + first_query * mask_query

    logits = ()
    for i in tl.static_range(KEY_TILES & 0xFF):
        tile = _masked_logits(
            queries, k, k_strides, (KEY_TILES >> (16 * i + 12)) & 0xFFF, key_count,
            mask, mask_query, mask_key, rows, row_count, logit_scale,
            BLOCK_M, 1 << ((KEY_TILES >> (16 * i + 8)) & 0xF), i < (KEY_TILES & 0xFF) - 1,
            HEAD_DIM, DIM_TILES, ALIGNMENT, MASK, MASK_PER_QUERY, UPCAST, PRECISION,
        )  # fmt: skip
        logits = logits + (tile,)
    maximum = _row_maximum(logits)
    # Rows with no readable key have maximum -inf; use 0, because -inf - -inf is NaN.
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    if MASK == "additive":
        logit_scale = 1.0

    scaled = ()
    for i in tl.static_range(KEY_TILES & 0xFF):
        scaled = scaled + (scale_and_shift(logits[i], maximum, logit_scale / power),)
    tau = tl.full((BLOCK_M,), -1.0, tl.float32)
    for _ in range(STEPS):
        total, slope = _newton_sums(scaled, tau, power, POWER)
        tau = newton_step(tau, total, slope, power, POWER)

    sparse = _zero_tiles(BLOCK_M, VALUE_TILES)
    dense = _zero_tiles(BLOCK_M, VALUE_TILES)
    for i in tl.static_range(KEY_TILES & 0xFF):
        values = _values(
            v, v_strides, (KEY_TILES >> (16 * i + 12)) & 0xFFF, key_count,
            1 << ((KEY_TILES >> (16 * i + 8)) & 0xF), i < (KEY_TILES & 0xFF) - 1,
            VALUE_DIM, VALUE_TILES, ALIGNMENT,
        )  # fmt: skip
        sparse_weights = _sparse_weights(scaled[i], tau, power, POWER, v.dtype.element_ty == tl.float32)
        sparse = _accumulate(sparse, sparse_weights, values, UPCAST, PRECISION)
        dense_weights = _dense_weights(scaled[i], power, FP32_RANGE)
        dense = _accumulate(dense, dense_weights, values, UPCAST, PRECISION)
        if i == 0:
            totals = _start_sums(sparse_weights, dense_weights, WARPS_SHARE_QUERIES)
        else:
            totals = _add_to_sums(totals, sparse_weights, dense_weights)
    sparse_total, dense_total = _finish_sums(totals)

    _finish(
        sparse, dense, sparse_total, dense_total, maximum * logit_scale,
        out, out_strides, base, base_strides, joint_lse, lse_batch, lse_head, lse_query, batch, head, first_query,
        rows, row_count, guidance_scale, norm_threshold, orthogonal_scale, strength,
        VALUE_DIM, VALUE_TILES, ALIGNMENT, RULE, RELATIVE, ORTHOGONAL, HAS_BASE, JOINT, FP32_RANGE, OUT_MAX,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def guided_attention_long_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    out,
    out_strides,
    base,
    base_strides,
    mask,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    joint_lse,
    lse_batch,
    lse_head,
    lse_query,
    heads,
    query_count,
    key_count,
    logit_scale,
    power,
    guidance_scale,
    norm_threshold,
    orthogonal_scale,
    strength,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_TILES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_KEY_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    POWER: tl.constexpr,
    STEPS: tl.constexpr,
    RULE: tl.constexpr,
    RELATIVE: tl.constexpr,
    ORTHOGONAL: tl.constexpr,
    HAS_BASE: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    JOINT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FP32_RANGE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT_MAX: tl.constexpr,
):
    """Compute guided attention over more keys than fit on chip: their logits are computed anew in every pass.

    The first pass is the dense read-out. It also stores the largest logit of each block of keys. The later passes, the
    search for tau and the sparse read-out, skip the blocks whose logits lie below tau in all rows.

    BLOCK_N: keys of a block. MAX_KEY_BLOCKS: a power of two, at least the number of blocks.
    """
    first_query, head, batch = program_position(query_count, heads, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    row_count = query_count - first_query
    queries = _queries(
        q, q_strides, batch, head, first_query, rows, row_count, HEAD_DIM, DIM_TILES, ALIGNMENT, FP32_RANGE
    )
    k = _start(k, k_strides, batch, head, 0, ALIGNMENT)
    v = _start(v, v_strides, batch, head, 0, ALIGNMENT)
    mask += batch * mask_batch + head * mask_head + first_query * mask_query
    key_blocks = tl.cdiv(key_count, BLOCK_N)
    block_indices = tl.arange(0, MAX_KEY_BLOCKS)
    # Where a mask is added, _masked_logits has applied the scale already.
    remaining_scale = logit_scale
    if MASK == "additive":
        remaining_scale = 1.0

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    block_maximum = tl.full((BLOCK_M, MAX_KEY_BLOCKS), float("-inf"), tl.float32)
    dense_total = tl.zeros((BLOCK_M,), tl.float32)
    dense = _zero_tiles(BLOCK_M, VALUE_TILES)
    for block in range(key_blocks):
        logits = _masked_logits(
            queries, k, k_strides, block * BLOCK_N, key_count, mask, mask_query, mask_key, rows, row_count, logit_scale,
            BLOCK_M, BLOCK_N, False, HEAD_DIM, DIM_TILES, ALIGNMENT, MASK, MASK_PER_QUERY, UPCAST, PRECISION,
        )  # fmt: skip
        largest = tl.max(logits, 1)
        block_maximum = tl.where(block_indices[None, :] == block, largest[:, None], block_maximum)
        earlier = maximum
        maximum = tl.maximum(maximum, largest)
        # Both are -inf where no key could be read so far. Then there is nothing to rescale.
        rescale = tl.where(earlier == float("-inf"), 0.0, tl.exp2((earlier - maximum) * remaining_scale * LOG2_E))
        largest = tl.where(maximum == float("-inf"), 0.0, maximum)
        weights = _dense_weights(scale_and_shift(logits, largest, remaining_scale / power), power, FP32_RANGE)
        dense_total = dense_total * rescale + tl.sum(weights, 1)
        values = _values(v, v_strides, block * BLOCK_N, key_count, BLOCK_N, False, VALUE_DIM, VALUE_TILES, ALIGNMENT)
        dense = _accumulate(_multiply(dense, rescale), weights, values, UPCAST, PRECISION)

    # Rows with no readable key have maximum -inf; use 0, because -inf - -inf is NaN.
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    block_maximum = scale_and_shift(block_maximum, maximum, remaining_scale / power)
    tau = tl.full((BLOCK_M,), -1.0, tl.float32)
    for _ in range(STEPS):
        largest_above = tl.max(block_maximum - tau[:, None], 0)
        total = tl.zeros((BLOCK_M,), tl.float32)
        slope = tl.zeros((BLOCK_M,), tl.float32)
        for block in range(key_blocks):
            if tl.sum(tl.where(block_indices == block, largest_above, 0.0)) > 0.0:
                logits = _masked_logits(
                    queries, k, k_strides, block * BLOCK_N, key_count, mask, mask_query, mask_key, rows, row_count,
                    logit_scale,
                    BLOCK_M, BLOCK_N, False, HEAD_DIM, DIM_TILES, ALIGNMENT, MASK, MASK_PER_QUERY, UPCAST, PRECISION,
                )  # fmt: skip
                scaled = scale_and_shift(logits, maximum, remaining_scale / power)
                block_total, block_slope = _newton_sums((scaled,), tau, power, POWER)
                total += block_total
                slope += block_slope
        tau = newton_step(tau, total, slope, power, POWER)

    largest_above = tl.max(block_maximum - tau[:, None], 0)
    sparse_total = tl.zeros((BLOCK_M,), tl.float32)
    sparse = _zero_tiles(BLOCK_M, VALUE_TILES)
    for block in range(key_blocks):
        if tl.sum(tl.where(block_indices == block, largest_above, 0.0)) > 0.0:
            logits = _masked_logits(
                queries, k, k_strides, block * BLOCK_N, key_count, mask, mask_query, mask_key, rows, row_count,
                logit_scale,
                BLOCK_M, BLOCK_N, False, HEAD_DIM, DIM_TILES, ALIGNMENT, MASK, MASK_PER_QUERY, UPCAST, PRECISION,
            )  # fmt: skip
            scaled = scale_and_shift(logits, maximum, remaining_scale / power)
            weights = _sparse_weights(scaled, tau, power, POWER, v.dtype.element_ty == tl.float32)
            sparse_total += tl.sum(weights, 1)
            values = _values(
                v, v_strides, block * BLOCK_N, key_count, BLOCK_N, False, VALUE_DIM, VALUE_TILES, ALIGNMENT
            )
            sparse = _accumulate(sparse, weights, values, UPCAST, PRECISION)

    _finish(
        sparse, dense, sparse_total, dense_total, maximum * remaining_scale,
        out, out_strides, base, base_strides, joint_lse, lse_batch, lse_head, lse_query, batch, head, first_query,
        rows, row_count, guidance_scale, norm_threshold, orthogonal_scale, strength,
        VALUE_DIM, VALUE_TILES, ALIGNMENT, RULE, RELATIVE, ORTHOGONAL, HAS_BASE, JOINT, FP32_RANGE, OUT_MAX,
    )  # fmt: skip


@triton.jit
def _start(pointer, strides, batch, head, row, ALIGNMENT: tl.constexpr):
    """Return the pointer to a row of one head."""
    return pointer + (batch * strides[0] + head * strides[1] + row * strides[2]) * ALIGNMENT


@triton.jit
def _load(
    pointer,
    rows,
    row_count,
    strides,
    IN_BOUNDS: tl.constexpr,
    DIM: tl.constexpr,
    TILES: tl.constexpr,
    i: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Load tile i of the rows of a matrix ``[row_count, DIM]``, zero outside of the matrix.

    IN_BOUNDS: True if no row lies outside.
    """
    FIRST: tl.constexpr = (TILES >> (16 * i + 12)) & 0xFFF
    WIDTH: tl.constexpr = 1 << ((TILES >> (16 * i + 8)) & 0xF)
    dims = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + (rows[:, None] * (strides[2] * ALIGNMENT) + dims[None, :] * strides[3])
    if IN_BOUNDS and FIRST + WIDTH <= DIM:
        tile = tl.load(pointers)
    elif IN_BOUNDS:
        tile = tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)
    elif FIRST + WIDTH <= DIM:
        tile = tl.load(pointers, mask=rows[:, None] < row_count, other=0.0)
    else:
        tile = tl.load(pointers, mask=(rows[:, None] < row_count) & (dims[None, :] < DIM), other=0.0)
    return tile


@triton.jit
def _queries(
    q,
    q_strides,
    batch,
    head,
    first_query,
    rows,
    row_count,
    HEAD_DIM: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FP32_RANGE: tl.constexpr,
):
    """Load the tiles of a block of queries, divided by a power of two if FP32_RANGE."""
    q = _start(q, q_strides, batch, head, first_query, ALIGNMENT)
    tiles = ()
    for i in tl.static_range(TILES & 0xFF):
        tile = _load(q, rows, row_count, q_strides, False, HEAD_DIM, TILES, i, ALIGNMENT)
        if FP32_RANGE:
            bounded = clamp(tile.to(tl.float32), _MAX_QUERY)
            tile = (bounded * (1.0 / _QUERY_SCALE)).to(tile.dtype)
            if FEW_EXCHANGES:
                # This changes nothing, but keeps the lines above at once per number. Otherwise the compiler moves them
                # behind the exchange that gives each number to all threads that multiply with it.
                tile = tl.reduce(tile[:, :, None], 2, _keep)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _keep(one, other):
    """Reduce an axis of size 1."""
    return one


@triton.jit
def _values(
    v,
    v_strides,
    first_key,
    key_count,
    BLOCK_N: tl.constexpr,
    IN_BOUNDS: tl.constexpr,
    DIM: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Load the tiles of the values of ``BLOCK_N`` keys."""
    v += first_key * (v_strides[2] * ALIGNMENT)
    keys = tl.arange(0, BLOCK_N)
    tiles = ()
    for i in tl.static_range(TILES & 0xFF):
        tile = _load(v, keys, key_count - first_key, v_strides, IN_BOUNDS, DIM, TILES, i, ALIGNMENT)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _zero_tiles(BLOCK_M: tl.constexpr, TILES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(TILES & 0xFF):
        tiles = tiles + (_zero_tile(BLOCK_M, TILES, i),)
    return tiles


@triton.jit
def _zero_tile(BLOCK_M: tl.constexpr, TILES: tl.constexpr, i: tl.constexpr):
    WIDTH: tl.constexpr = 1 << ((TILES >> (16 * i + 8)) & 0xF)
    return tl.zeros((BLOCK_M, WIDTH), tl.float32)


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _masked_logits(
    queries,
    k,
    k_strides,
    first_key,
    key_count,
    mask,
    mask_query,
    mask_key,
    rows,
    row_count,
    logit_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IN_BOUNDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the logits of ``BLOCK_N`` keys, ``[BLOCK_M, BLOCK_N]`` in fp32, ``-inf`` where a key may not be read.

    The caller multiplies the logits by ``logit_scale``. With an additive mask they have this factor already, because
    such a mask is added to the true logits.
    IN_BOUNDS: True if all keys exist.
    """
    k += first_key * (k_strides[2] * ALIGNMENT)
    columns = tl.arange(0, BLOCK_N)
    key_count -= first_key
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(DIM_TILES & 0xFF):
        keys = _load(k, columns, key_count, k_strides, IN_BOUNDS, HEAD_DIM, DIM_TILES, i, ALIGNMENT)
        logits = _dot(queries[i], tl.trans(keys), logits, UPCAST, PRECISION)
    if MASK != "none":
        mask += first_key * mask_key
        if MASK_PER_QUERY:
            pointers = mask + (rows[:, None] * mask_query + columns[None, :] * mask_key)
            mask_values = tl.load(pointers, mask=(rows[:, None] < row_count) & (columns[None, :] < key_count), other=0)
        else:
            mask_values = tl.load(mask + columns * mask_key, mask=columns < key_count, other=0)[None, :]
        logits = masked(logits, mask_values, logit_scale, MASK)
    if not IN_BOUNDS and MASK != "bool":
        logits = tl.where(columns[None, :] < key_count, logits, float("-inf"))
    return logits


@triton.jit
def _sparse_weights(scaled, tau, power, POWER: tl.constexpr, FP32: tl.constexpr):
    """Compute the sparse weights, half of them for fp32: the sum may lie a rounding error above 1."""
    weights = sparse_weights(scaled, tau, power, POWER)
    if FP32:
        weights = weights * 0.5
    return weights


@triton.jit
def _dense_weights(scaled, power, FP32_RANGE: tl.constexpr):
    """Compute the dense weights before their division by their sum, divided by a power of two if FP32_RANGE."""
    if FP32_RANGE:
        weights = dense_weights(scaled, power, _DENSE_SCALE_BITS)
    else:
        weights = dense_weights(scaled, power, 0)
    return weights


@triton.jit
def _row_maximum(tiles):
    """Return the largest number of each row."""
    wide = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        if tiles[i].shape[1] != wide.shape[1]:
            wide = tl.max(_split_columns(wide, tiles[i].shape[1]), 1)
        wide = tl.maximum(wide, tiles[i])
    return tl.max(wide, 1)


@triton.jit
def _start_sums(one, other, BY_COLUMN: tl.constexpr):
    """Start the sums over the rows of two matrices with their first tiles.

    A sum over a row is an exchange between threads. BY_COLUMN saves most exchanges: it keeps one number for each column
    of a tile until :func:`_finish_sums`. That takes registers.
    """
    if BY_COLUMN:
        sums = (one, other)
    else:
        sums = row_sums(one, other)
    return sums


@triton.jit
def _add_to_sums(sums, one, other):
    """Add two more tiles, which are as wide as the tiles before or narrower."""
    if len(sums[0].shape) == 2:
        if sums[0].shape[1] != one.shape[1]:
            sums = row_sums(_split_columns(sums[0], one.shape[1]), _split_columns(sums[1], one.shape[1]))
    else:
        one, other = row_sums(one, other)
    return sums[0] + one, sums[1] + other


@triton.jit
def _split_columns(tile, WIDTH: tl.constexpr):
    """Reshape a tile to ``[rows, parts, WIDTH]``. Threads need no exchange to reduce the parts to one."""
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] // WIDTH, WIDTH))


@triton.jit
def _finish_sums(sums):
    """Return both sums, one number per row."""
    if len(sums[0].shape) == 2:
        sums = row_sums(sums[0], sums[1])
    return sums


@triton.jit
def _newton_sums(scaled, tau, power, POWER: tl.constexpr):
    """Sum ``relu(scaled - tau) ** power`` over the keys, and its slope divided by power."""
    total, slope = newton_terms(scaled[0], tau, power, POWER)
    sums = _start_sums(total, slope, True)
    for i in tl.static_range(1, len(scaled)):
        total, slope = newton_terms(scaled[i], tau, power, POWER)
        sums = _add_to_sums(sums, total, slope)
    return _finish_sums(sums)


@triton.jit
def _multiply(tiles, factor):
    """Multiply each row by its factor."""
    result = ()
    for j in tl.static_range(len(tiles)):
        result = result + (tiles[j] * factor[:, None],)
    return result


@triton.jit
def _accumulate(tiles, weights, values, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Compute ``tiles + weights @ values`` for one tile or block of keys."""
    result = ()
    for j in tl.static_range(len(tiles)):
        result = result + (_dot(weights.to(values[j].dtype), values[j], tiles[j], UPCAST, PRECISION),)
    return result


@triton.jit
def _largest(tiles):
    """Return the largest magnitude in each row."""
    largest = tl.max(tl.abs(tiles[0]), 1)
    for i in tl.static_range(1, len(tiles)):
        largest = tl.maximum(largest, tl.max(tl.abs(tiles[i]), 1))
    return largest


@triton.jit
def _inner_products(sparse, dense):
    """Compute <sparse, sparse> and <sparse, dense> of each row."""
    square = tl.sum(sparse[0] * sparse[0], 1)
    product = tl.sum(sparse[0] * dense[0], 1)
    for i in tl.static_range(1, len(sparse)):
        square += tl.sum(sparse[i] * sparse[i], 1)
        product += tl.sum(sparse[i] * dense[i], 1)
    return square, product


@triton.jit
def _square_of_rest(sparse, dense, share):
    """Compute the square of ``share * sparse - dense`` of each row."""
    rest = tl.zeros_like(share)
    for i in tl.static_range(len(sparse)):
        across = share[:, None] * sparse[i] - dense[i]
        rest += tl.sum(across * across, 1)
    return rest


@triton.jit
def _finish(
    sparse,
    dense,
    sparse_total,
    dense_total,
    maximum,
    out,
    out_strides,
    base,
    base_strides,
    joint_lse,
    lse_batch,
    lse_head,
    lse_query,
    batch,
    head,
    first_query,
    rows,
    row_count,
    guidance_scale,
    norm_threshold,
    orthogonal_scale,
    strength,
    DIM: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    RULE: tl.constexpr,
    RELATIVE: tl.constexpr,
    ORTHOGONAL: tl.constexpr,
    HAS_BASE: tl.constexpr,
    JOINT: tl.constexpr,
    FP32_RANGE: tl.constexpr,
    OUT_MAX: tl.constexpr,
):
    """Compute the output from the weighted sums over the keys, and write it to memory."""
    # Read-outs are the sums times these numbers.
    sparse_scale = reciprocal(tl.maximum(sparse_total, TINY))
    dense_scale = reciprocal(tl.maximum(dense_total, TINY))
    if FP32_RANGE:
        # Their squares must neither over- nor underflow.
        scale, inverse = power_of_two_scale(_largest(sparse))
        sparse = _multiply(sparse, inverse)
        sparse_scale = clamp(sparse_scale * scale, FP32_MAX)
        scale, inverse = power_of_two_scale(_largest(dense))
        dense = _multiply(dense, inverse)
        dense_scale = clamp(dense_scale * scale, FP32_MAX)
    square = tl.zeros_like(sparse_scale)
    share = square
    rest = square
    if RULE == "gag":
        square, product = _inner_products(sparse, dense)
        share = share_of_sparse(square, product)
        if ORTHOGONAL:
            rest = _square_of_rest(sparse, dense, share)
    on_sparse, on_dense = guidance_factors(
        square, share, rest, sparse_scale, dense_scale, guidance_scale, norm_threshold, orthogonal_scale, strength,
        RULE, RELATIVE, ORTHOGONAL, FP32_RANGE,
    )  # fmt: skip
    if JOINT:
        pointers = joint_lse + batch * lse_batch + head * lse_head + (first_query + rows) * lse_query
        joint = tl.load(pointers, mask=rows < row_count, other=0.0).to(tl.float32)
        if FP32_RANGE:
            dense_total *= tl.exp2(_DENSE_SCALE_BITS * 1.0)
        mass = text_mass(dense_total, maximum, joint)
        on_sparse *= mass
        on_dense *= mass
    out = _start(out, out_strides, batch, head, first_query, ALIGNMENT)
    if HAS_BASE:
        base = _start(base, base_strides, batch, head, first_query, ALIGNMENT)
    else:
        on_dense += dense_scale
    for i in tl.static_range(TILES & 0xFF):
        guided = sparse[i] * on_sparse[:, None] + dense[i] * on_dense[:, None]
        if HAS_BASE:
            unguided = _load(base, rows, row_count, base_strides, False, DIM, TILES, i, ALIGNMENT)
            guided += unguided.to(tl.float32)
        guided = clamp(guided, OUT_MAX).to(out.dtype.element_ty)
        dims = ((TILES >> (16 * i + 12)) & 0xFFF) + tl.arange(0, 1 << ((TILES >> (16 * i + 8)) & 0xF))
        pointers = out + rows[:, None] * (out_strides[2] * ALIGNMENT) + dims[None, :] * out_strides[3]
        tl.store(pointers, guided, mask=(rows[:, None] < row_count) & (dims[None, :] < DIM))
