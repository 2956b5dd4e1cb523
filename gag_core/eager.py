# SPDX-License-Identifier: GPL-3.0-or-later
"""Guided attention and joint attention in plain torch operations, in chunks of queries.

This path runs everywhere, and faster implementations are tested against it. :func:`guide` cuts the queries into
chunks; :func:`guided_chunk` does the work on one of them.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import card
from .anderson import KeySpace, retrieve_with_coefficients
from .config import GuidanceConfig
from .entmax import dense_weights_, is_forward_mode, logsumexp_from_sum, reusable, scale_and_shift_, sparse_weights
from .geometry import guidance_factors, text_mass
from .numerics import (
    CardKeys,
    ConfigNumbers,
    Keys,
    config_numbers,
    mask_part,
    prepare_values,
    weighted_sum_,
    work_dtype,
    write_saturated,
)

# Largest number of tensor elements that the work on a chunk of queries holds at once. On a CPU it should stay near the
# size of the caches and, with copies of keys and values, below twice the size of the output (_CPU_CHUNK_OF_OUTPUT).
_CPU_CHUNK = 3 << 19
_CPU_CHUNK_OF_OUTPUT = 1.9
# A megabyte is always allowed: in smaller chunks most of the time goes into starting operations.
_LEAST_CPU_CHUNK = 1 << 18
# On other devices each operation is a launch. These are 512 MiB in fp32, less than the feed-forward layer of a large
# model takes. For long videos it takes more: 12 times the queries' bytes in Wan 1.3B, 5 times (1.8 GB) in Wan 14B.
# There a chunk may take 10 times the queries' bytes, up to 1 GiB.
_CHUNK = 1 << 27
_LARGEST_CHUNK = 1 << 28
_CHUNK_OF_QUERIES = 10
# Fraction of the chunk budget for copies of keys and values. Where copies for all heads need more, heads are split.
_COPIES_OF_CHUNK = 0.25
# On a CPU products of a multiple of 16 keys take a fifth less time than products of a few keys less.
_KEY_MULTIPLE = 16
# Outputs that rule "anderson" holds beside those of other rules, and for each of its differences.
_OUTPUTS_ANDERSON = 16
_OUTPUTS_PER_DIFFERENCE = 8
# Rows of a bias that the memory-efficient kernel reads begin at multiples of so many elements.
_BIAS_ALIGNMENT = 16

# Batch rows and heads whose keys and values are copied together.
Part = tuple[slice, slice]
# Batch rows, heads and queries that are computed together.
Chunk = tuple[slice, slice, slice]


def chunks(
    q: Tensor, *, per_query: int, per_head: int, whole_heads: bool = False
) -> tuple[tuple[Part, tuple[Chunk, ...]], ...]:
    """Cut queries ``[B, H, N_q, D]`` into parts of the batch and heads, and each part into chunks of queries.

    A chunk is small enough to hold ``per_query`` elements for each of its queries and heads, beside ``per_head``
    elements for each head, which are copies of keys and values. ``whole_heads`` keeps all heads of a query in one
    chunk. Batch rows come one by one where possible, because products then need no copies of the queries: in the layout
    that models have, the heads of several rows do not lie at equal distances.
    """
    most, least = min(_LARGEST_CHUNK, max(_CHUNK, _CHUNK_OF_QUERIES * q.nbytes // 4)), 0
    if q.device.type == "cpu":
        most, least = min(_CPU_CHUNK, int(_CPU_CHUNK_OF_OUTPUT * q.numel())), _LEAST_CPU_CHUNK
    return _chunks_within(most, least, q.shape, per_query, per_head, whole_heads)


@lru_cache(maxsize=256)
def _chunks_within(
    most: int, least: int, shape: tuple[int, ...], per_query: int, per_head: int, whole_heads: bool
) -> tuple[tuple[Part, tuple[Chunk, ...]], ...]:
    """Do the work of :func:`chunks` for chunks that hold ``most`` elements, of which ``least`` are always allowed."""
    batch, heads, queries, _ = shape
    if not queries:
        return ()
    heads_at_once = heads if whole_heads else min(heads, max(1, int(_COPIES_OF_CHUNK * max(most, least)) // per_head))
    budget = max(least, most // 2, most - heads_at_once * per_head)
    per_row = heads_at_once * queries * per_query
    # One more chunk costs more than chunks that are a tenth larger.
    query_slices = _slices_of(queries, math.ceil(queries / max(1, math.ceil(per_row / budget - 0.1))))
    rows_at_once = max(1, int(1.1 * budget) // per_row) if heads_at_once == heads else 1
    return tuple(
        ((rows, some_heads), tuple((rows, some_heads, some_queries) for some_queries in query_slices))
        for rows in _slices_of(batch, rows_at_once)
        for some_heads in _slices_of(heads, heads_at_once)
    )


def _slices_of(size: int, at_once: int) -> list[slice]:
    """Split ``size`` into the fewest slices of at most ``at_once``, nearly equal."""
    step = math.ceil(size / math.ceil(size / at_once))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def padding(tokens: int) -> int:
    """Return the number of tokens that are missing to a multiple of 16, or 0 where it is above a 16th of ``tokens``."""
    pad = -tokens % _KEY_MULTIPLE
    return pad if _KEY_MULTIPLE * pad <= tokens else 0


def retrieve(
    q: Tensor, keys: Keys, v: Tensor, alpha: float, mask: Tensor | None, with_logsumexp: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the sparse and the dense read-out of a chunk, and the logsumexp of its logits if asked for.

    Args:
        q: ``[B, H, N_q, D]``.
        keys: prepared keys.
        v: values in the work dtype, padded as the keys are.
        alpha: sparsity of the sparse read-out.
        mask: the part of the mask for these queries.
        with_logsumexp: True if the logsumexp is wanted.

    Returns:
        Two tensors ``[B, H, N_q, D_v]``, and ``[B, H, N_q, 1]`` or None; all in the work dtype.
    """
    logits, logits_scale = keys.logits(q, mask)
    scaled, maximum = scale_and_shift_(logits, alpha, logits_scale)
    # The softmax overwrites the scaled logits, so the sparse weights come first.
    sparse = None if alpha == 1.0 else torch.matmul(sparse_weights(scaled, alpha), v)
    weights, total = dense_weights_(scaled, alpha)
    dense = torch.matmul(weights, v)
    lse = logsumexp_from_sum(maximum, logits_scale, total) if with_logsumexp else None
    return dense.clone() if sparse is None else sparse, dense, lse


def guided_chunk(
    q: Tensor,
    keys: Keys,
    v: Tensor,
    value_scale: Tensor,
    space: KeySpace | None,
    config: GuidanceConfig,
    numbers: ConfigNumbers,
    mask: Tensor | None,
    base: Tensor | None,
    joint_lse: Tensor | None,
) -> Tensor:
    """Compute the result of :func:`guide` for one chunk of queries, in the work dtype.

    Args:
        q, mask, base, joint_lse: the parts for these queries, as in :func:`guide`.
        keys: prepared keys.
        v: values divided by ``value_scale``, in the work dtype, padded as the keys are.
        value_scale: the scale, of rank 4.
        space: the keys as patterns, for rule "anderson"; None for other rules.
        config: the settings.
        numbers: the numbers of the config in the work dtype.
    """
    anderson_vector = None
    if space is None:
        # At strength 0 only the dense read-out is wanted.
        alpha = config.alpha if config.strength else 1.0
        sparse, dense, lse = retrieve(q, keys, v, alpha, mask, with_logsumexp=joint_lse is not None)
        discrepancy = torch.sub(sparse, dense, out=reusable(dense))
    else:
        sparse, dense, lse, anderson_vector = retrieve_with_coefficients(q, keys, space, config, mask)
        discrepancy = sparse - dense
    on_sparse, on_vector = guidance_factors(sparse, discrepancy, value_scale, config, numbers, anderson_vector)
    # The change of the read-out is the sum of these vectors, each times its factor.
    vectors, factors = [sparse, discrepancy], [on_sparse, on_vector]
    if anderson_vector is not None:
        vectors, factors = [*vectors, anderson_vector], [on_sparse, numbers.strength, on_vector]
    if lse is not None and joint_lse is not None:
        mass = text_mass(lse, joint_lse.unsqueeze(-1).to(lse.dtype))
        for index, factor in enumerate(factors):
            factors[index] = mass * factor
    if base is None:
        # The change is added to the dense read-out, which is 1 * S - 1 * (S - D): so it joins the same sum.
        factors[0] += 1.0
        factors[1] -= 1.0
    result = weighted_sum_(value_scale, *zip(vectors, factors, strict=True))
    return result if base is None else result.add_(base)


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
    joint_lse: Tensor | None = None,
    on_card: bool | None = None,
) -> None:
    """Write ``base + mass * strength * (guided - dense)`` to ``out``, chunk by chunk.

    Args:
        out: ``[B, H, N_q, D_v]``, any strides.
        q, k, v, config, scale: as in :func:`gag_core.guided_attention`.
        base: ``[B, H, N_q, D_v]``; None takes the dense read-out.
        mask: as in :func:`gag_core.guided_attention`, of rank 4.
        joint_lse: ``[B, H, N_q]``, logsumexp of the logits of a longer sequence that these keys are part of. The mass
            is the share of the softmax over that sequence that falls on these keys. None is a mass of 1.
        on_card: True to compute the chunks by :mod:`gag_core.card`, if it supports the config. None leaves it to the
            device.
    """
    if config.rule == "uniform":
        from . import uniform  # which needs this module

        uniform.guide(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)
        return
    if (_is_card(q.device) if on_card is None else on_card) and card.supports(config):
        _guide_on_card(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)
        return
    # Without a sparse retrieval there is no coefficient to solve for.
    solve = config.rule == "anderson" and config.alpha != 1.0 and config.strength != 0.0
    pad = 0 if solve else padding(k.shape[2])
    tokens, dim, value_dim = k.shape[2] + pad, k.shape[3], v.shape[3]
    # While the threshold is searched: two or three times the logits. Then: the logits once and both read-outs. At the
    # end: both read-outs and a product.
    per_query = max((2 if config.alpha == 1.5 else 3) * tokens, tokens + 2 * value_dim, 3 * value_dim)
    per_head = tokens * (dim + value_dim)
    if solve:
        per_query = 3 * tokens + (_OUTPUTS_ANDERSON + _OUTPUTS_PER_DIFFERENCE * config.anderson_depth) * value_dim
        per_head += tokens * (3 * dim + value_dim)
    if q.dtype.itemsize < 4:  # queries in half precision are copied to fp32
        per_query += dim
    value_axes = (-3, -2, -1) if config.merge_heads else (-2, -1)
    parts = chunks(q, per_query=per_query, per_head=per_head, whole_heads=config.merge_heads)
    numbers = config_numbers(config, work_dtype(q))
    for part, chunks_of_part in parts:
        keys = Keys.prepare(k[part], scale, pad)
        values, value_scale = prepare_values(v[part], value_axes, pad)
        space = KeySpace.prepare(k[part], values, scale) if solve else None
        for chunk in chunks_of_part:
            result = guided_chunk(
                q[chunk],
                keys,
                values,
                value_scale,
                space,
                config,
                numbers,
                mask_part(mask, *chunk),
                None if base is None else base[chunk],
                None if joint_lse is None else joint_lse[chunk],
            )
            write_saturated(out[chunk], result)
            del result  # otherwise it is held beside the tensors of the next chunk


def _is_card(device: torch.device) -> bool:
    """Return True if tensors on a device are computed by :mod:`gag_core.card`, at this moment."""
    return device.type in card.DEVICES and not is_forward_mode() and not torch.compiler.is_compiling()


def _guide_on_card(
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
    """Do the work of :func:`guide` by :mod:`gag_core.card`."""
    per_query, per_head = card.elements_per_query(k, v, config), k.shape[2] * (k.shape[3] + v.shape[3])
    numbers = config_numbers(config, work_dtype(q))
    for part, chunks_of_part in chunks(q, per_query=per_query, per_head=per_head, whole_heads=config.merge_heads):
        memory = card.prepare(k[part], v[part], scale, config)
        for chunk in chunks_of_part:
            card.guided_chunk(
                out[chunk],
                q[chunk],
                memory,
                config,
                numbers,
                mask_part(mask, *chunk),
                None if base is None else base[chunk],
                None if joint_lse is None else joint_lse[chunk],
            )


def attention_with_logsumexp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention and the logsumexp of its logits.

    torch's fused attention returns both where one of its kernels takes these tensors. Otherwise the logsumexp costs one
    more product of queries and keys, chunk by chunk. ``mask`` is of rank 4.

    Returns:
        The attention output ``[B, H, N_q, D_v]`` in the dtype of q, and the logsumexp ``[B, H, N_q]``.
    """
    bias = _additive_mask(mask, q)
    # In forward-mode differentiation torch has no derivative of its fused attention.
    is_forward = forward_ad._current_level >= 0
    fused = None if is_forward else _fused_attention(q, k, v, bias, scale)
    if fused is None:
        return plain_attention(q, k, v, mask, scale), logsumexp_of_logits(q, k, mask, scale)
    if bias is None:
        return fused
    unreadable = _unreadable(bias)
    return fused[0].masked_fill(unreadable, 0.0), fused[1].masked_fill(unreadable.squeeze(-1), -torch.inf)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute softmax attention ``[B, H, N_q, D_v]`` by torch; zeros where no key may be read.

    ``mask`` is None or of rank 4.
    """
    bias = _additive_mask(mask, q)
    is_forward = forward_ad._current_level >= 0
    exact = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if is_forward else nullcontext()
    with exact:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out if bias is None else out.masked_fill(_unreadable(bias), 0.0)


def _unreadable(bias: Tensor) -> Tensor:
    """Return True for queries that may read no key, ``[..., N_q, 1]``. torch's kernels disagree about these."""
    return (bias == -torch.inf).all(dim=-1, keepdim=True)


def logsumexp_of_logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, on_card: bool | None = None) -> Tensor:
    """Compute the logsumexp over the keys, ``[B, H, N_q]`` in the work dtype; ``-inf`` where no key may be read.

    ``on_card`` is True to compute chunks by :mod:`gag_core.card`. None leaves it to the device.
    """
    result = torch.empty(q.shape[:3], dtype=work_dtype(q), device=q.device)
    on_card = _is_card(q.device) if on_card is None else on_card
    for part, chunks_of_part in chunks(q, per_query=2 * k.shape[2], per_head=k.shape[2] * k.shape[3]):
        if on_card:
            card_keys = CardKeys.prepare(k[part], scale)
            for chunk in chunks_of_part:
                result[chunk] = card.logsumexp(q[chunk], card_keys, mask_part(mask, *chunk))
            continue
        keys = Keys.prepare(k[part], scale)
        for chunk in chunks_of_part:
            logits, logits_scale = keys.logits(q[chunk], mask_part(mask, *chunk))
            # Clamped above, because differences of infinities are NaN. A logit that overflows below weighs nothing.
            logits.mul_(logits_scale).clamp_(max=torch.finfo(logits.dtype).max)
            result[chunk] = logits.logsumexp(dim=-1)
    return result


def _additive_mask(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the mask as torch's kernels take it: additive, in the dtype of q."""
    if mask is None or mask.dtype == q.dtype:
        return mask
    if mask.dtype != torch.bool:
        # A finite number beyond the range of the dtype must stay finite: infinities added to logits give NaN.
        largest = min(torch.finfo(mask.dtype).max, torch.finfo(q.dtype).max)
        return mask.clamp(-largest, largest).masked_fill(mask == -torch.inf, -torch.inf).to(q.dtype)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Compute attention and logsumexp by torch's own kernels, or return None where no such kernel takes these tensors.

    The kernels are called below torch's public function, which drops the logsumexp. The conditions are those of the
    kernels. For a torch that lacks a kernel, or whose kernel refuses for a reason not foreseen here, the result is
    None too, and the caller takes the general path.
    """
    if v.shape[3] != q.shape[3] or q.dtype == torch.float64:
        return None
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    aten = torch.ops.aten
    try:
        if q.device.type == "cpu":
            if bias is not None and bias.shape[-1] == 1:
                # Older torch, such as 2.4, reads one number for each key all the same, beyond the end of the bias.
                bias = bias.expand(*bias.shape[:-1], k.shape[2]).contiguous()
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=bias, scale=scale
            )
            return out, lse
        if q.device.type == "cuda":
            if bias is None and q.dtype != torch.float32 and q.shape[3] % 8 == 0 and q.shape[3] <= 256:
                out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
            else:
                aligned = None if bias is None else _aligned_bias(bias, (*q.shape[:3], k.shape[2]))
                out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, aligned, True, scale=scale)[:2]
            # The memory-efficient kernel pads the rows of its logsumexp.
            return out, lse[:, :, : q.shape[2]]
    except torch.cuda.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError):
        return None
    return None


def _aligned_bias(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Expand the bias to ``shape``, with rows that begin where the memory-efficient kernel can read them.

    Rows, heads and queries that share a bias keep sharing its memory.
    """
    if bias.shape[-1] == 1:
        bias = bias.expand(*bias.shape[:-1], shape[-1])
    extra = -shape[-1] % _BIAS_ALIGNMENT
    misaligned = any(
        stride % _BIAS_ALIGNMENT for stride, size in zip(bias.stride()[:-1], bias.shape[:-1], strict=True) if size > 1
    )
    if extra or bias.stride(-1) != 1 or misaligned:
        bias = torch.nn.functional.pad(bias, (0, extra)).contiguous()[..., : shape[-1]]
    return bias.expand(shape)
