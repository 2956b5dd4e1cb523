# SPDX-License-Identifier: GPL-3.0-or-later
"""The Triton kernels: both read-outs, the geometry and the blend in one pass; only the output leaves the chip.

A program does a block of queries of one head. Head dimensions and keys are cut into tiles whose widths are powers of
two (77 keys cost 80 and not 128, a head of 40 costs 48 and not 64), written ``(first, width)``; a tuple of tiles stands
for a row, and loops over it are unrolled. Only the last tile may reach beyond the end. What is computed is written down
in ``eager.py``, ``entmax.py`` and ``geometry.py``, which the tests hold this file to; what makes a card do it in few
instructions is said here.

Arguments that both kernels take:
    q, k, v, out, base, mask: pointers, each with its four strides; ``base`` and ``mask`` are the output and q where
        there is none (``HAS_BASE``, ``MASK``). ``joint_lse`` has three strides.
    ALIGNMENT: so many numbers can be read at once; the strides of q, k, v, out and base, but the last, are in it.
    logit_unit: what products of queries and keys are multiplied with to be logits; above 0.
    DIM, VALUE_DIM: head dimension of q and k, and of v; DIM_TILES, VALUE_TILES: their tiles.
    power: ``1 / (alpha - 1)``. POWER: 2 or 1 where it is that, which is cheaper, and else 0.
    STEPS: Newton steps that find the threshold.
    ORTHOGONAL: orthogonal_scale is not 0.
    MASK: "none", "bool" or "additive"; MASK_PER_QUERY: it is not the same for all queries.
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
# Reductions by functions of ours, which save exchanges between threads; the interpreter does those number by number.
FEW_EXCHANGES = tl.constexpr(not INTERPRETED)

# Keeps 0 / 0 at 0, and is no denormal, which GPUs may flush to 0.
_TINY = tl.constexpr(1.2e-38)
_FP32_MAX = tl.constexpr(3.4028234663852886e38)
# The reciprocal of a larger power of 2 is a denormal.
_LARGEST_UNIT = tl.constexpr(2.0**126)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Where products could overflow (WIDE), queries are bounded by the first and divided by the second, a power of 2, so
# that no sum of 256 products with any finite key overflows; and dense weights so that no sum of values does.
_MOST_QUERY = tl.constexpr(2.0**54)
QUERY_UNIT = 2.0**64
_QUERY_UNIT = tl.constexpr(QUERY_UNIT)
_DENSE_UNIT_BITS = tl.constexpr(20)
# With it, no sum of two products with numbers that fp16 holds overflows.
_MOST_FACTOR = tl.constexpr(2.0**100)


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
    logit_unit,
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
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
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
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Guided attention with the logits of a whole row on chip. SHARED: warps have queries in common."""
    first, head, batch = _place(query_count, heads, BLOCK)
    rows = tl.arange(0, BLOCK)
    row_count = query_count - first
    queries = _queries(q, q_strides, batch, head, first, rows, row_count, DIM, DIM_TILES, ALIGNMENT, WIDE)
    k = _at(k, k_strides, batch, head, 0, ALIGNMENT)
    v = _at(v, v_strides, batch, head, 0, ALIGNMENT)
    mask = _at(mask, mask_strides, batch, head, first, 1)

    logits = ()
    for i in tl.static_range(len(KEY_TILES)):
        tile = _logits(
            queries, k, k_strides, KEY_TILES[i][0], key_count, mask, mask_strides, rows, row_count, logit_unit,
            BLOCK, KEY_TILES[i][1], i < len(KEY_TILES) - 1, DIM, DIM_TILES, ALIGNMENT, MASK, MASK_PER_QUERY, UPCAST,
            PRECISION,
        )  # fmt: skip
        logits = logits + (tile,)
    maximum = _maximum(logits)
    # Of a row that may read nothing, -inf less this stays -inf.
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    if MASK == "additive":
        logit_unit = 1.0

    scaled = ()
    for i in tl.static_range(len(KEY_TILES)):
        scaled = scaled + (_scaled(logits[i], maximum, logit_unit / power),)
    threshold = tl.full((BLOCK,), -1.0, tl.float32)
    for _ in range(STEPS):
        total, slope = _sums(scaled, threshold, power, POWER)
        threshold = _next_threshold(threshold, total, slope, power, POWER)

    sparse = _zeros(BLOCK, VALUE_TILES)
    dense = _zeros(BLOCK, VALUE_TILES)
    for i in tl.static_range(len(KEY_TILES)):
        values = _values(
            v, v_strides, KEY_TILES[i][0], key_count,
            KEY_TILES[i][1], i < len(KEY_TILES) - 1, VALUE_DIM, VALUE_TILES, ALIGNMENT,
        )  # fmt: skip
        sparse_weights = _sparse(scaled[i], threshold, power, POWER, v.dtype.element_ty == tl.float32)
        sparse = _accumulated(sparse, sparse_weights, values, UPCAST, PRECISION)
        dense_weights = _dense(scaled[i], power, WIDE)
        dense = _accumulated(dense, dense_weights, values, UPCAST, PRECISION)
        if i == 0:
            totals = _begun(sparse_weights, dense_weights, SHARED)
        else:
            totals = _added(totals, sparse_weights, dense_weights)
    sparse_total, dense_total = _summed(totals)

    _finish(
        sparse, dense, sparse_total, dense_total, maximum * logit_unit,
        out, out_strides, base, base_strides, joint_lse, lse_strides, batch, head, first,
        rows, row_count, guidance_scale, cap, orthogonal_scale, strength,
        VALUE_DIM, VALUE_TILES, ALIGNMENT, RULE, RELATIVE, ORTHOGONAL, HAS_BASE, JOINT, WIDE, LIMIT,
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
    logit_unit,
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
    ORTHOGONAL: tl.constexpr,
    HAS_BASE: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    JOINT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
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
    queries = _queries(q, q_strides, batch, head, first, rows, row_count, DIM, DIM_TILES, ALIGNMENT, WIDE)
    k = _at(k, k_strides, batch, head, 0, ALIGNMENT)
    v = _at(v, v_strides, batch, head, 0, ALIGNMENT)
    mask = _at(mask, mask_strides, batch, head, first, 1)
    key_blocks = tl.cdiv(key_count, KEY_BLOCK)
    block_numbers = tl.arange(0, MOST_KEY_BLOCKS)
    # What is left to multiply the logits with.
    rest = logit_unit
    if MASK == "additive":
        rest = 1.0

    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    block_maximum = tl.full((BLOCK, MOST_KEY_BLOCKS), float("-inf"), tl.float32)
    dense_total = tl.zeros((BLOCK,), tl.float32)
    dense = _zeros(BLOCK, VALUE_TILES)
    for number in range(key_blocks):
        logits = _logits(
            queries, k, k_strides, number * KEY_BLOCK, key_count, mask, mask_strides, rows, row_count, logit_unit,
            BLOCK, KEY_BLOCK, False, DIM, DIM_TILES, ALIGNMENT, MASK, MASK_PER_QUERY, UPCAST, PRECISION,
        )  # fmt: skip
        largest = tl.max(logits, 1)
        block_maximum = tl.where(block_numbers[None, :] == number, largest[:, None], block_maximum)
        earlier = maximum
        maximum = tl.maximum(maximum, largest)
        # Both are -inf where nothing could be read so far; then there is nothing to rescale.
        rescale = tl.where(earlier == float("-inf"), 0.0, tl.exp2((earlier - maximum) * rest * _LOG2_E))
        largest = tl.where(maximum == float("-inf"), 0.0, maximum)
        weights = _dense(_scaled(logits, largest, rest / power), power, WIDE)
        dense_total = dense_total * rescale + tl.sum(weights, 1)
        values = _values(
            v, v_strides, number * KEY_BLOCK, key_count, KEY_BLOCK, False, VALUE_DIM, VALUE_TILES, ALIGNMENT
        )
        dense = _accumulated(_times(dense, rescale), weights, values, UPCAST, PRECISION)

    # Of a row that may read nothing, -inf less this stays -inf.
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    block_maximum = _scaled(block_maximum, maximum, rest / power)
    threshold = tl.full((BLOCK,), -1.0, tl.float32)
    for _ in range(STEPS):
        reach = tl.max(block_maximum - threshold[:, None], 0)
        total = tl.zeros((BLOCK,), tl.float32)
        slope = tl.zeros((BLOCK,), tl.float32)
        for number in range(key_blocks):
            if tl.sum(tl.where(block_numbers == number, reach, 0.0)) > 0.0:
                logits = _logits(
                    queries, k, k_strides, number * KEY_BLOCK, key_count, mask, mask_strides, rows, row_count,
                    logit_unit,
                    BLOCK, KEY_BLOCK, False, DIM, DIM_TILES, ALIGNMENT, MASK, MASK_PER_QUERY, UPCAST, PRECISION,
                )  # fmt: skip
                scaled = _scaled(logits, maximum, rest / power)
                block_total, block_slope = _sums((scaled,), threshold, power, POWER)
                total += block_total
                slope += block_slope
        threshold = _next_threshold(threshold, total, slope, power, POWER)

    reach = tl.max(block_maximum - threshold[:, None], 0)
    sparse_total = tl.zeros((BLOCK,), tl.float32)
    sparse = _zeros(BLOCK, VALUE_TILES)
    for number in range(key_blocks):
        if tl.sum(tl.where(block_numbers == number, reach, 0.0)) > 0.0:
            logits = _logits(
                queries, k, k_strides, number * KEY_BLOCK, key_count, mask, mask_strides, rows, row_count, logit_unit,
                BLOCK, KEY_BLOCK, False, DIM, DIM_TILES, ALIGNMENT, MASK, MASK_PER_QUERY, UPCAST, PRECISION,
            )  # fmt: skip
            scaled = _scaled(logits, maximum, rest / power)
            weights = _sparse(scaled, threshold, power, POWER, v.dtype.element_ty == tl.float32)
            sparse_total += tl.sum(weights, 1)
            values = _values(
                v, v_strides, number * KEY_BLOCK, key_count, KEY_BLOCK, False, VALUE_DIM, VALUE_TILES, ALIGNMENT
            )
            sparse = _accumulated(sparse, weights, values, UPCAST, PRECISION)

    _finish(
        sparse, dense, sparse_total, dense_total, maximum * rest,
        out, out_strides, base, base_strides, joint_lse, lse_strides, batch, head, first,
        rows, row_count, guidance_scale, cap, orthogonal_scale, strength,
        VALUE_DIM, VALUE_TILES, ALIGNMENT, RULE, RELATIVE, ORTHOGONAL, HAS_BASE, JOINT, WIDE, LIMIT,
    )  # fmt: skip


@triton.jit
def _place(query_count, heads, BLOCK: tl.constexpr):
    """First query, head and batch row of this program; 64 bits, because they are multiplied by strides."""
    blocks = tl.cdiv(query_count, BLOCK)
    program = tl.program_id(0)
    plane = program // blocks
    return (program % blocks).to(tl.int64) * BLOCK, (plane % heads).to(tl.int64), (plane // heads).to(tl.int64)


@triton.jit
def _at(pointer, strides, batch, head, row, ALIGNMENT: tl.constexpr):
    return pointer + (batch * strides[0] + head * strides[1] + row * strides[2]) * ALIGNMENT


@triton.jit
def _load(
    pointer,
    rows,
    row_count,
    strides,
    WHOLE: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """``[rows, WIDTH]`` of a matrix ``[row_count, DIM]``; zero outside of it. WHOLE: no row lies outside."""
    dims = FIRST + tl.arange(0, WIDTH)
    places = pointer + (rows[:, None] * (strides[2] * ALIGNMENT) + dims[None, :] * strides[3])
    if WHOLE and FIRST + WIDTH <= DIM:
        tile = tl.load(places)
    elif WHOLE:
        tile = tl.load(places, mask=dims[None, :] < DIM, other=0.0)
    elif FIRST + WIDTH <= DIM:
        tile = tl.load(places, mask=rows[:, None] < row_count, other=0.0)
    else:
        tile = tl.load(places, mask=(rows[:, None] < row_count) & (dims[None, :] < DIM), other=0.0)
    return tile


@triton.jit
def _queries(
    q,
    q_strides,
    batch,
    head,
    first,
    rows,
    row_count,
    DIM: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tiles of a block of queries, made smaller by a power of 2 if WIDE."""
    q = _at(q, q_strides, batch, head, first, ALIGNMENT)
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tile = _load(q, rows, row_count, q_strides, False, DIM, TILES[i][0], TILES[i][1], ALIGNMENT)
        if WIDE:
            bounded = _saturated(tile.to(tl.float32), _MOST_QUERY)
            tile = (bounded * (1.0 / _QUERY_UNIT)).to(tile.dtype)
            if FEW_EXCHANGES:
                # This does nothing, but that what is above is done once for each number: else it is moved behind the
                # exchange that gives each number to all threads which multiply with it.
                tile = tl.reduce(tile[:, :, None], 2, _first)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _first(one, other):
    return one


@triton.jit
def _values(
    v,
    v_strides,
    first,
    key_count,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    DIM: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Tiles of the values of ``WIDTH`` keys."""
    v += first * (v_strides[2] * ALIGNMENT)
    keys = tl.arange(0, WIDTH)
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tile = _load(v, keys, key_count - first, v_strides, WHOLE, DIM, TILES[i][0], TILES[i][1], ALIGNMENT)
        tiles = tiles + (tile,)
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
    first,
    key_count,
    mask,
    mask_strides,
    rows,
    row_count,
    logit_unit,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of ``WIDTH`` keys, ``[BLOCK, WIDTH]`` in fp32, ``-inf`` where a key may not be read.

    In logit units, but for an additive mask, which is added to what they are in truth. WHOLE: all keys are there.
    """
    k += first * (k_strides[2] * ALIGNMENT)
    columns = tl.arange(0, WIDTH)
    key_count -= first
    logits = tl.zeros((BLOCK, WIDTH), tl.float32)
    for i in tl.static_range(len(DIM_TILES)):
        keys = _load(k, columns, key_count, k_strides, WHOLE, DIM, DIM_TILES[i][0], DIM_TILES[i][1], ALIGNMENT)
        logits = _dot(queries[i], tl.trans(keys), logits, UPCAST, PRECISION)
    if MASK != "none":
        mask += first * mask_strides[3]
        if MASK_PER_QUERY:
            places = mask + (rows[:, None] * mask_strides[2] + columns[None, :] * mask_strides[3])
            given = tl.load(places, mask=(rows[:, None] < row_count) & (columns[None, :] < key_count), other=0)
        else:
            given = tl.load(mask + columns * mask_strides[3], mask=columns < key_count, other=0)[None, :]
        if MASK == "bool":
            logits = tl.where(given != 0, logits, float("-inf"))
        else:
            logits = _saturated(logits * logit_unit, _FP32_MAX) + given.to(tl.float32)
            logits = tl.where(logits > _FP32_MAX, _FP32_MAX, logits)
    if not WHOLE and MASK != "bool":
        logits = tl.where(columns[None, :] < key_count, logits, float("-inf"))
    return logits


@triton.jit
def _scaled(logits, maximum, unit):
    """``(alpha - 1) (z - max z)`` of logits in such units; in this order, because large ones would be rounded first."""
    return (logits - maximum[:, None]) * unit


@triton.jit
def _dense(scaled, power, WIDE: tl.constexpr):
    """``exp(z - max z)``, a power of 2 smaller if WIDE."""
    if WIDE:
        weights = tl.exp2(scaled * (power * _LOG2_E) - _DENSE_UNIT_BITS)
    else:
        weights = tl.exp2(scaled * (power * _LOG2_E))
    return weights


@triton.jit
def _raised(numbers, exponent):
    """To a power above 0, of numbers from 0."""
    return tl.where(numbers > 0.0, tl.exp2(exponent * tl.log2(tl.maximum(numbers, _TINY))), 0.0)


@triton.jit
def _sparse(scaled, threshold, power, POWER: tl.constexpr, FP32: tl.constexpr):
    """``relu(scaled - t) ** power``, half of it for fp32: their sum may lie a rounding error above 1."""
    weights = _above(scaled, threshold)
    if POWER == 2:
        weights = weights * weights
    elif POWER == 0:
        weights = _raised(weights, power)
    if FP32:
        weights = weights * 0.5
    return weights


@triton.jit
def _above(scaled, threshold):
    """``relu(scaled - t)``. It is 1 at most, and cards do a subtraction and a clamp to [0, 1] in one instruction."""
    return tl.clamp(scaled - threshold[:, None], 0.0, 1.0)


@triton.jit
def _maximum(tiles):
    """Largest number of each row."""
    wide = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        if tiles[i].shape[1] != wide.shape[1]:
            wide = tl.max(_columns_apart(wide, tiles[i].shape[1]), 1)
        wide = tl.maximum(wide, tiles[i])
    return tl.max(wide, 1)


@triton.jit
def _begun(one, other, BY_COLUMN: tl.constexpr):
    """The sums over rows of two tiles, so far.

    A sum over a row is an exchange between threads. BY_COLUMN saves most of them: until the end, which is
    :func:`_summed`, there is a number for each column of a tile. That takes registers.
    """
    if BY_COLUMN:
        sums = (one, other)
    else:
        sums = _both_sums(one, other)
    return sums


@triton.jit
def _added(sums, one, other):
    """The same with two more tiles, which are as wide or narrower."""
    if len(sums[0].shape) == 2:
        if sums[0].shape[1] != one.shape[1]:
            sums = _both_sums(_columns_apart(sums[0], one.shape[1]), _columns_apart(sums[1], one.shape[1]))
    else:
        one, other = _both_sums(one, other)
    return sums[0] + one, sums[1] + other


@triton.jit
def _columns_apart(tile, WIDTH: tl.constexpr):
    """``[rows, parts, WIDTH]`` of a tile: no thread has to exchange anything to reduce the parts to one."""
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] // WIDTH, WIDTH))


@triton.jit
def _summed(sums):
    """Both sums, a number a row."""
    if len(sums[0].shape) == 2:
        sums = _both_sums(sums[0], sums[1])
    return sums


@triton.jit
def _both_sums(one, other):
    """Sums over the rows of two tiles, in one exchange."""
    if FEW_EXCHANGES:
        both = tl.reduce((one, other), 1, _added_pairs)
    else:
        both = (tl.sum(one, 1), tl.sum(other, 1))
    return both


@triton.jit
def _added_pairs(one, other, more, other_more):
    return one + more, other + other_more


@triton.jit
def _sums(scaled, threshold, power, POWER: tl.constexpr):
    """Sums over the keys of ``relu(scaled - threshold) ** power`` and of its slope over power."""
    total, slope = _terms(scaled[0], threshold, power, POWER)
    sums = _begun(total, slope, True)
    for i in tl.static_range(1, len(scaled)):
        total, slope = _terms(scaled[i], threshold, power, POWER)
        sums = _added(sums, total, slope)
    return _summed(sums)


@triton.jit
def _terms(scaled, threshold, power, POWER: tl.constexpr):
    """What :func:`_sums` sums."""
    above = _above(scaled, threshold)
    if POWER == 2:
        slopes = above
    elif POWER == 1:
        slopes = (above > 0.0).to(tl.float32)
    else:
        slopes = _raised(above, power - 1.0)
    return slopes * above, slopes


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
    # Below the root the slope is 1 and more, but for a row that may read nothing.
    return threshold + change * _reciprocal(tl.maximum(slope, 1.0))


@triton.jit
def _reciprocal(numbers):
    """Of numbers from _TINY to its reciprocal. A division, exact to the last bit, takes twice as many instructions."""
    root = tl.rsqrt(numbers)
    return root * root


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
def _saturated(tile, LIMIT: tl.constexpr):
    """Clamped; NaN stays."""
    return tl.clamp(tile, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _unit(tiles):
    """Powers of 2, one a row and their reciprocals, of the size of the row's largest number: below it, by 4 at most."""
    largest = tl.max(tl.abs(tiles[0]), 1)
    for i in tl.static_range(1, len(tiles)):
        largest = tl.maximum(largest, tl.max(tl.abs(tiles[i]), 1))
    # No denormal, and neither is the reciprocal.
    largest = tl.minimum(tl.maximum(largest, _TINY), _LARGEST_UNIT)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _factors(
    sparse, dense, sparse_size, dense_size, guidance_scale, cap, orthogonal_scale, strength,
    RULE: tl.constexpr, RELATIVE: tl.constexpr, ORTHOGONAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Two numbers a row, a and b, with ``strength * (guided - dense) = a * sparse + b * dense``.

    The read-outs S and D are ``sparse_size * sparse`` and ``dense_size * dense``. All of ``geometry.correction_`` is
    linear in them but for norms and inner products, so that is all that a pass over the row is needed for.
    """
    if RULE == "pladis":
        of_sparse = sparse_size * (strength * guidance_scale)
        of_dense = dense_size * (-strength * guidance_scale)
    else:
        square = tl.zeros_like(sparse_size)
        product = tl.zeros_like(sparse_size)
        for i in tl.static_range(len(sparse)):
            square += tl.sum(sparse[i] * sparse[i], 1)
            product += tl.sum(sparse[i] * dense[i], 1)
        # The part along S of the discrepancy S - D is ``parallel * sparse``, of D ``share * dense_size * sparse``.
        share = product * _reciprocal(tl.maximum(square, _TINY))
        parallel = sparse_size - share * dense_size
        length = tl.sqrt(square)
        guidance_norm = tl.abs(parallel) * length
        if ORTHOGONAL:
            rest = tl.zeros_like(sparse_size)
            for i in tl.static_range(len(sparse)):
                across = share[:, None] * sparse[i] - dense[i]
                rest += tl.sum(across * across, 1)
            across_norm = tl.abs(orthogonal_scale) * dense_size * tl.sqrt(rest)
            larger = tl.maximum(tl.maximum(guidance_norm, across_norm), _TINY)
            guidance_norm /= larger
            across_norm /= larger
            guidance_norm = larger * tl.sqrt(guidance_norm * guidance_norm + across_norm * across_norm)
        limit = tl.zeros_like(square) + cap
        if RELATIVE:
            limit *= sparse_size * length
        # Not a minimum: an infinite cap times a norm of 0 is not a number, and no cap.
        reach = tl.where(limit < guidance_norm, limit / tl.maximum(guidance_norm, _TINY), 1.0) * guidance_scale
        of_sparse = strength * (sparse_size + reach * parallel)
        of_dense = -strength * dense_size
        if ORTHOGONAL:
            across = reach * orthogonal_scale
            of_sparse += strength * across * (share * dense_size)
            of_dense -= strength * across * dense_size
    # Where there is no direction nothing is changed.
    known = (of_sparse == of_sparse) & (of_dense == of_dense)
    if WIDE:
        of_sparse = _saturated(of_sparse, _LARGEST_UNIT)
        of_dense = _saturated(of_dense, _LARGEST_UNIT)
    else:
        of_sparse = _saturated(of_sparse, _MOST_FACTOR)
        of_dense = _saturated(of_dense, _MOST_FACTOR)
    return tl.where(known, of_sparse, 0.0), tl.where(known, of_dense, 0.0)


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
    batch,
    head,
    first,
    rows,
    row_count,
    guidance_scale,
    cap,
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
    WIDE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """From the weighted sums over the keys to the output in memory."""
    # Read-outs are these numbers times the sums.
    sparse_size = _reciprocal(tl.maximum(sparse_total, _TINY))
    dense_size = _reciprocal(tl.maximum(dense_total, _TINY))
    if WIDE:
        # Their squares must neither over- nor underflow.
        unit, inverse = _unit(sparse)
        sparse = _times(sparse, inverse)
        sparse_size = _saturated(sparse_size * unit, _FP32_MAX)
        unit, inverse = _unit(dense)
        dense = _times(dense, inverse)
        dense_size = _saturated(dense_size * unit, _FP32_MAX)
    of_sparse, of_dense = _factors(
        sparse, dense, sparse_size, dense_size, guidance_scale, cap, orthogonal_scale, strength,
        RULE, RELATIVE, ORTHOGONAL, WIDE,
    )  # fmt: skip
    if JOINT:
        places = _at(joint_lse, lse_strides, batch, head, first, 1) + rows * lse_strides[2]
        whole = tl.load(places, mask=rows < row_count, other=0.0).to(tl.float32)
        mass = dense_total * tl.exp2((_saturated(maximum, _FP32_MAX) - whole) * _LOG2_E)
        if WIDE:
            mass *= tl.exp2(_DENSE_UNIT_BITS * 1.0)
        # Where no text may be read there is no mass, and the line above is not a number.
        mass = tl.where(dense_total > 0.0, tl.where(mass > 1.0, 1.0, mass), 0.0)
        of_sparse *= mass
        of_dense *= mass
    out = _at(out, out_strides, batch, head, first, ALIGNMENT)
    if HAS_BASE:
        base = _at(base, base_strides, batch, head, first, ALIGNMENT)
    else:
        of_dense += dense_size
    for i in tl.static_range(len(TILES)):
        guided = sparse[i] * of_sparse[:, None] + dense[i] * of_dense[:, None]
        if HAS_BASE:
            unguided = _load(base, rows, row_count, base_strides, False, DIM, TILES[i][0], TILES[i][1], ALIGNMENT)
            guided += unguided.to(tl.float32)
        guided = _saturated(guided, LIMIT).to(out.dtype.element_ty)
        dims = TILES[i][0] + tl.arange(0, TILES[i][1])
        places = out + rows[:, None] * (out_strides[2] * ALIGNMENT) + dims[None, :] * out_strides[3]
        tl.store(places, guided, mask=(rows[:, None] < row_count) & (dims[None, :] < DIM))
