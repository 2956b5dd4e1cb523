# SPDX-License-Identifier: GPL-3.0-or-later
"""The Triton kernels: both read-outs, the geometry and the blend in one pass; only the output leaves the chip.

A program does a block of queries of one head. Head dimensions and keys are cut into tiles whose widths are powers of
two (77 keys cost 80 and not 128, a head of 40 costs 48 and not 64), written ``(first, width)``; a tuple of tiles stands
for a row, and loops over it are unrolled. What is computed is written down in ``eager.py``, ``entmax.py`` and
``geometry.py``, which the tests hold this file to.

Arguments that both kernels take:
    q, k, v, out, base, mask: pointers, each with its four strides; ``base`` and ``mask`` are the output and q where
        there is none (``HAS_BASE``, ``MASK``). ``joint_lse`` has three strides.
    DIM, VALUE_DIM: head dimension of q and k, and of v; DIM_TILES, VALUE_TILES: their tiles.
    power: ``1 / (alpha - 1)``. POWER: 2 or 1 where it is that, which is cheaper, and else 0.
    STEPS: Newton steps that find the threshold.
    WIDE: the tensors' range is that of fp32 (fp16's is not), so that products and sums of them could overflow.
    UPCAST: Triton's interpreter runs, and multiplies the bits of bf16 as if they were integers.
    PRECISION: how fp32 is multiplied, as ``tl.dot`` names it.
    LIMIT: the largest finite number of the output's dtype.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter runs these on the CPU: slow, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Keeps 0 / 0 at 0, and is no denormal, which GPUs may flush to 0.
_TINY = tl.constexpr(1.2e-38)
_FP32_MAX = tl.constexpr(3.4028234663852886e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
# No sum of 256 products of numbers within the first overflows, nor one of values with weights that are so much smaller.
_FACTOR_LIMIT = tl.constexpr(2.0**59)
_WEIGHT_BITS = tl.constexpr(20)


@triton.jit(do_not_specialize=["heads", "query_count", "key_count"])
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
    mask_strides,
    joint_lse,
    lse_strides,
    heads,
    query_count,
    key_count,
    scale,
    power,
    guidance_scale,
    cap,
    orthogonal_scale,
    strength,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_TILES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    STEPS: tl.constexpr,
    RULE: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    MASK: tl.constexpr,
    JOINT: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Guided attention with the logits of a whole row on chip."""
    first, head, batch = _place(query_count, heads, BLOCK)
    rows = tl.arange(0, BLOCK)
    row_count = query_count - first
    queries = _load_tiles(_at(q, q_strides, batch, head, first), rows, row_count, q_strides, DIM, DIM_TILES)
    queries = _bounded(queries, WIDE)
    k = _at(k, k_strides, batch, head, 0)
    v = _at(v, v_strides, batch, head, 0)
    mask = _at(mask, mask_strides, batch, head, first)

    logits = ()
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    for i in tl.static_range(len(KEY_TILES)):
        columns = KEY_TILES[i][0] + tl.arange(0, KEY_TILES[i][1])
        tile = _logits(
            queries, k, k_strides, columns, key_count, mask, mask_strides, rows, row_count, scale,
            BLOCK, KEY_TILES[i][1], DIM, DIM_TILES, MASK, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
        logits = logits + (tile,)
        maximum = tl.maximum(maximum, tl.max(tile, 1))

    scaled = ()
    for i in tl.static_range(len(KEY_TILES)):
        scaled = scaled + (_scaled(logits[i], maximum, power),)
    threshold = tl.full((BLOCK,), -1.0, tl.float32)
    for _ in range(STEPS):
        total = tl.zeros((BLOCK,), tl.float32)
        slope = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(len(KEY_TILES)):
            tile_total, tile_slope = _sums(scaled[i], threshold, power, POWER)
            total += tile_total
            slope += tile_slope
        threshold = _next_threshold(threshold, total, slope, power, POWER)

    sparse_total = tl.zeros((BLOCK,), tl.float32)
    dense_total = tl.zeros((BLOCK,), tl.float32)
    sparse = _zeros(BLOCK, VALUE_TILES)
    dense = _zeros(BLOCK, VALUE_TILES)
    for i in tl.static_range(len(KEY_TILES)):
        columns = KEY_TILES[i][0] + tl.arange(0, KEY_TILES[i][1])
        values = _load_tiles(v, columns, key_count, v_strides, VALUE_DIM, VALUE_TILES)
        weights = _sparse(scaled[i], threshold, power, POWER, WIDE)
        sparse_total += tl.sum(weights, 1)
        sparse = _accumulated(sparse, weights, values, UPCAST, PRECISION)
        weights = _dense(scaled[i], power, WIDE)
        dense_total += tl.sum(weights, 1)
        dense = _accumulated(dense, weights, values, UPCAST, PRECISION)

    _finish(
        sparse, dense, sparse_total, dense_total, maximum,
        _at(out, out_strides, batch, head, first), out_strides,
        _at(base, base_strides, batch, head, first), base_strides,
        _at(joint_lse, lse_strides, batch, head, first), lse_strides,
        rows, row_count, guidance_scale, cap, orthogonal_scale, strength,
        VALUE_DIM, VALUE_TILES, RULE, RELATIVE, HAS_BASE, JOINT, WIDE, LIMIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "query_count", "key_count"])
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
    mask_strides,
    joint_lse,
    lse_strides,
    heads,
    query_count,
    key_count,
    scale,
    power,
    guidance_scale,
    cap,
    orthogonal_scale,
    strength,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_TILES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    MOST_KEY_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    STEPS: tl.constexpr,
    RULE: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    MASK: tl.constexpr,
    JOINT: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Guided attention over more keys than fit on chip: their logits are computed anew in every pass.

    The first pass is the dense read-out. It notes the largest logit of each block of keys, so that the search for the
    threshold and the sparse read-out pass over the blocks that cannot reach above it in any row.
    """
    first, head, batch = _place(query_count, heads, BLOCK)
    rows = tl.arange(0, BLOCK)
    row_count = query_count - first
    queries = _load_tiles(_at(q, q_strides, batch, head, first), rows, row_count, q_strides, DIM, DIM_TILES)
    queries = _bounded(queries, WIDE)
    k = _at(k, k_strides, batch, head, 0)
    v = _at(v, v_strides, batch, head, 0)
    mask = _at(mask, mask_strides, batch, head, first)
    key_blocks = tl.cdiv(key_count, KEY_BLOCK)
    block_numbers = tl.arange(0, MOST_KEY_BLOCKS)

    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    block_maximum = tl.full((BLOCK, MOST_KEY_BLOCKS), float("-inf"), tl.float32)
    dense_total = tl.zeros((BLOCK,), tl.float32)
    dense = _zeros(BLOCK, VALUE_TILES)
    for number in range(key_blocks):
        columns = number * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
        logits = _logits(
            queries, k, k_strides, columns, key_count, mask, mask_strides, rows, row_count, scale,
            BLOCK, KEY_BLOCK, DIM, DIM_TILES, MASK, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
        largest = tl.max(logits, 1)
        block_maximum = tl.where(block_numbers[None, :] == number, largest[:, None], block_maximum)
        earlier = maximum
        maximum = tl.maximum(maximum, largest)
        # Both are -inf where nothing could be read so far; then there is nothing to rescale.
        rescale = tl.where(earlier == float("-inf"), 0.0, tl.exp(earlier - maximum))
        weights = _dense(_scaled(logits, maximum, power), power, WIDE)
        dense_total = dense_total * rescale + tl.sum(weights, 1)
        values = _load_tiles(v, columns, key_count, v_strides, VALUE_DIM, VALUE_TILES)
        dense = _accumulated(_times(dense, rescale), weights, values, UPCAST, PRECISION)

    block_maximum = _scaled(block_maximum, maximum, power)
    threshold = tl.full((BLOCK,), -1.0, tl.float32)
    for _ in range(STEPS):
        reach = tl.max(block_maximum - threshold[:, None], 0)
        total = tl.zeros((BLOCK,), tl.float32)
        slope = tl.zeros((BLOCK,), tl.float32)
        for number in range(key_blocks):
            if tl.sum(tl.where(block_numbers == number, reach, 0.0)) > 0.0:
                columns = number * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
                logits = _logits(
                    queries, k, k_strides, columns, key_count, mask, mask_strides, rows, row_count, scale,
                    BLOCK, KEY_BLOCK, DIM, DIM_TILES, MASK, WIDE, UPCAST, PRECISION,
                )  # fmt: skip
                block_total, block_slope = _sums(_scaled(logits, maximum, power), threshold, power, POWER)
                total += block_total
                slope += block_slope
        threshold = _next_threshold(threshold, total, slope, power, POWER)

    reach = tl.max(block_maximum - threshold[:, None], 0)
    sparse_total = tl.zeros((BLOCK,), tl.float32)
    sparse = _zeros(BLOCK, VALUE_TILES)
    for number in range(key_blocks):
        if tl.sum(tl.where(block_numbers == number, reach, 0.0)) > 0.0:
            columns = number * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
            logits = _logits(
                queries, k, k_strides, columns, key_count, mask, mask_strides, rows, row_count, scale,
                BLOCK, KEY_BLOCK, DIM, DIM_TILES, MASK, WIDE, UPCAST, PRECISION,
            )  # fmt: skip
            weights = _sparse(_scaled(logits, maximum, power), threshold, power, POWER, WIDE)
            sparse_total += tl.sum(weights, 1)
            values = _load_tiles(v, columns, key_count, v_strides, VALUE_DIM, VALUE_TILES)
            sparse = _accumulated(sparse, weights, values, UPCAST, PRECISION)

    _finish(
        sparse, dense, sparse_total, dense_total, maximum,
        _at(out, out_strides, batch, head, first), out_strides,
        _at(base, base_strides, batch, head, first), base_strides,
        _at(joint_lse, lse_strides, batch, head, first), lse_strides,
        rows, row_count, guidance_scale, cap, orthogonal_scale, strength,
        VALUE_DIM, VALUE_TILES, RULE, RELATIVE, HAS_BASE, JOINT, WIDE, LIMIT,
    )  # fmt: skip


@triton.jit
def _place(query_count, heads, BLOCK: tl.constexpr):
    """First query, head and batch row of this program; 64 bits, because they are multiplied by strides."""
    blocks = tl.cdiv(query_count, BLOCK)
    program = tl.program_id(0)
    plane = program // blocks
    return (program % blocks).to(tl.int64) * BLOCK, (plane % heads).to(tl.int64), (plane // heads).to(tl.int64)


@triton.jit
def _at(pointer, strides, batch, head, row):
    return pointer + batch * strides[0] + head * strides[1] + row * strides[2]


@triton.jit
def _load(pointer, rows, row_count, strides, DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """``[rows, WIDTH]`` of a matrix ``[row_count, DIM]``; zero outside of it."""
    dims = FIRST + tl.arange(0, WIDTH)
    inside = (rows[:, None] < row_count) & (dims[None, :] < DIM)
    return tl.load(pointer + rows[:, None] * strides[2] + dims[None, :] * strides[3], mask=inside, other=0.0)


@triton.jit
def _load_tiles(pointer, rows, row_count, strides, DIM: tl.constexpr, TILES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tiles = tiles + (_load(pointer, rows, row_count, strides, DIM, TILES[i][0], TILES[i][1]),)
    return tiles


@triton.jit
def _zeros(BLOCK: tl.constexpr, TILES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tiles = tiles + (_zero_tile(BLOCK, TILES[i][1]),)
    return tiles


@triton.jit
def _zero_tile(BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    # A function of its own, because Triton takes the width out of a tuple as a constant only as an argument.
    return tl.zeros((BLOCK, WIDTH), tl.float32)


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _logits(
    queries,
    k,
    k_strides,
    columns,
    key_count,
    mask,
    mask_strides,
    rows,
    row_count,
    scale,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILES: tl.constexpr,
    MASK: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[BLOCK, WIDTH]`` in fp32, ``-inf`` where a key may not be read."""
    logits = tl.zeros((BLOCK, WIDTH), tl.float32)
    for i in tl.static_range(len(DIM_TILES)):
        keys = _load(k, columns, key_count, k_strides, DIM, DIM_TILES[i][0], DIM_TILES[i][1])
        logits = _dot(queries[i], tl.trans(_bounded((keys,), WIDE)[0]), logits, UPCAST, PRECISION)
    logits *= scale
    readable = columns[None, :] < key_count
    if MASK != "none":
        places = mask + rows[:, None] * mask_strides[2] + columns[None, :] * mask_strides[3]
        given = tl.load(places, mask=(rows[:, None] < row_count) & readable, other=0)
        if MASK == "bool":
            readable = readable & (given != 0)
        else:
            logits += given.to(tl.float32)
            logits = tl.where(logits > _FP32_MAX, _FP32_MAX, logits)
    return tl.where(readable, logits, float("-inf"))


@triton.jit
def _scaled(logits, maximum, power):
    """``(alpha - 1) (z - max z)``; the maximum of a row that may read nothing counts as 0."""
    return (logits - tl.where(maximum == float("-inf"), 0.0, maximum)[:, None]) * (1.0 / power)


@triton.jit
def _bounded(tiles, WIDE: tl.constexpr):
    """Queries or keys, of which no product overflows."""
    result = ()
    for i in tl.static_range(len(tiles)):
        tile = tiles[i]
        if WIDE:
            tile = _saturated(tile.to(tl.float32), _FACTOR_LIMIT).to(tile.dtype)
        result = result + (tile,)
    return result


@triton.jit
def _dense(scaled, power, WIDE: tl.constexpr):
    """``exp(z - max z)``, a power of 2 smaller if WIDE."""
    if WIDE:
        weights = tl.exp2(scaled * (power * _LOG2_E) - _WEIGHT_BITS)
    else:
        weights = tl.exp2(scaled * (power * _LOG2_E))
    return weights


@triton.jit
def _raised(numbers, exponent):
    """To a power above 0, of numbers from 0."""
    return tl.where(numbers > 0.0, tl.exp2(exponent * tl.log2(tl.maximum(numbers, _TINY))), 0.0)


@triton.jit
def _sparse(scaled, threshold, power, POWER: tl.constexpr, WIDE: tl.constexpr):
    """``relu(scaled - t) ** power``, half of it if WIDE: its sum may lie a rounding error above 1."""
    weights = tl.maximum(scaled - threshold[:, None], 0.0)
    if POWER == 2:
        weights = weights * weights
    elif POWER == 0:
        weights = _raised(weights, power)
    if WIDE:
        weights = weights * 0.5
    return weights


@triton.jit
def _sums(scaled, threshold, power, POWER: tl.constexpr):
    """Sums over the keys of ``relu(scaled - threshold) ** power`` and of its slope over power."""
    above = tl.maximum(scaled - threshold[:, None], 0.0)
    if POWER == 2:
        slopes = above
    elif POWER == 1:
        slopes = (above > 0.0).to(tl.float32)
    else:
        slopes = _raised(above, power - 1.0)
    return tl.sum(slopes * above, 1), tl.sum(slopes, 1)


@triton.jit
def _next_threshold(threshold, total, slope, power, POWER: tl.constexpr):
    """Closer to the root of ``||relu(scaled - t)||_power = 1`` by a step of Newton's, from below but for rounding."""
    if POWER == 2:
        norm = tl.sqrt(total)
        change = norm * (norm - 1.0)
    elif POWER == 1:
        change = total - 1.0
    else:
        change = total - _raised(total, 1.0 - 1.0 / power)
    return threshold + tl.where(slope > 0.0, change / tl.maximum(slope, _TINY), 0.0)


@triton.jit
def _times(tiles, factor):
    result = ()
    for j in tl.static_range(len(tiles)):
        result = result + (tiles[j] * factor[:, None],)
    return result


@triton.jit
def _accumulated(tiles, weights, values, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """``tiles + weights @ values`` of one block of keys."""
    result = ()
    for j in tl.static_range(len(tiles)):
        result = result + (_dot(weights.to(values[j].dtype), values[j], tiles[j], UPCAST, PRECISION),)
    return result


@triton.jit
def _norm(tiles):
    """Norm over a row, as ``(size, norm of the row over size)``: squares neither over- nor underflow."""
    size = tl.max(tl.abs(tiles[0]), 1)
    for i in tl.static_range(1, len(tiles)):
        size = tl.maximum(size, tl.max(tl.abs(tiles[i]), 1))
    size = tl.maximum(size, _TINY)
    squares = tl.zeros_like(size)
    for i in tl.static_range(len(tiles)):
        unit = tiles[i] / size[:, None]
        squares += tl.sum(unit * unit, 1)
    return size, tl.sqrt(squares)


@triton.jit
def _changes(
    sparse, dense, guidance_scale, cap, orthogonal_scale, strength, RULE: tl.constexpr, RELATIVE: tl.constexpr
):
    """``strength * (guided - dense)`` as tiles: ``geometry.correction_``."""
    changes = ()
    if RULE == "pladis":
        for i in tl.static_range(len(sparse)):
            changes = changes + ((sparse[i] - dense[i]) * (strength * guidance_scale),)
    else:
        size, norm = _norm(sparse)
        direction = ()
        along = tl.zeros_like(size)
        for i in tl.static_range(len(sparse)):
            direction = direction + (sparse[i] / size[:, None] / tl.maximum(norm, _TINY)[:, None],)
            along += tl.sum((sparse[i] - dense[i]) * direction[i], 1)
        along *= 1.0 - orthogonal_scale
        guidance = ()
        for i in tl.static_range(len(sparse)):
            guidance = guidance + ((sparse[i] - dense[i]) * orthogonal_scale + direction[i] * along[:, None],)
        guidance_size, guidance_norm = _norm(guidance)
        guidance_norm *= guidance_size
        limit = tl.zeros_like(size) + cap
        if RELATIVE:
            limit *= size * norm
        # Not a minimum: an infinite cap times a norm of 0 is not a number, and no cap.
        reach = tl.where(limit < guidance_norm, limit / tl.maximum(guidance_norm, _TINY), 1.0) * guidance_scale
        for i in tl.static_range(len(sparse)):
            changes = changes + ((guidance[i] * reach[:, None] + (sparse[i] - dense[i])) * strength,)
    return changes


@triton.jit
def _saturated(tile, LIMIT: tl.constexpr):
    """Clamped; NaN stays."""
    return tl.where(tile > LIMIT, LIMIT, tl.where(tile < -LIMIT, -LIMIT, tile))


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
    lse_strides,
    rows,
    row_count,
    guidance_scale,
    cap,
    orthogonal_scale,
    strength,
    DIM: tl.constexpr,
    TILES: tl.constexpr,
    RULE: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    JOINT: tl.constexpr,
    WIDE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """From the weighted sums over the keys to the output in memory."""
    mean_sparse, mean_dense = (), ()
    for i in tl.static_range(len(TILES)):
        tile = _saturated(sparse[i] / tl.maximum(sparse_total, _TINY)[:, None], _FP32_MAX)
        mean_sparse = mean_sparse + (tile,)
        tile = _saturated(dense[i] / tl.maximum(dense_total, _TINY)[:, None], _FP32_MAX)
        mean_dense = mean_dense + (tile,)
    changes = _changes(mean_sparse, mean_dense, guidance_scale, cap, orthogonal_scale, strength, RULE, RELATIVE)
    mass = tl.full(maximum.shape, 1.0, tl.float32)
    if JOINT:
        whole = tl.load(joint_lse + rows * lse_strides[2], mask=rows < row_count, other=0.0).to(tl.float32)
        mass = tl.exp(maximum + tl.log(dense_total) - whole)
        if WIDE:
            mass *= tl.exp2(_WEIGHT_BITS * 1.0)
        # Where no text may be read there is no mass, and the line above is not a number.
        mass = tl.where(dense_total > 0.0, tl.where(mass > 1.0, 1.0, mass), 0.0)
    for i in tl.static_range(len(TILES)):
        change = tl.where(changes[i] != changes[i], 0.0, changes[i])
        change = _saturated(change, _FP32_MAX) * mass[:, None]
        if HAS_BASE:
            unguided = _load(base, rows, row_count, base_strides, DIM, TILES[i][0], TILES[i][1]).to(tl.float32)
        else:
            unguided = mean_dense[i]
        guided = _saturated(unguided + change, LIMIT).to(out.dtype.element_ty)
        dims = TILES[i][0] + tl.arange(0, TILES[i][1])
        places = out + rows[:, None] * out_strides[2] + dims[None, :] * out_strides[3]
        tl.store(places, guided, mask=(rows[:, None] < row_count) & (dims[None, :] < DIM))
