# SPDX-License-Identifier: GPL-3.0-or-later
"""The row path: products by the vendor's library, and between them Triton kernels that need no matrix units.

For each chunk of queries: logits by one product, both weights by one kernel, both read-outs by one product, and the
guided output by one kernel. It runs where the fused kernel cannot: with Triton 3.0 to 3.2, on cards without matrix
units, for more keys than fit, and where the fused kernel would spill registers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import eager, numerics
from ..config import GuidanceConfig
from ..entmax import newton_steps
from ..numerics import has_wide_products, mask_part
from . import compiled, guard, installation
from .launch import _FP32, _alignment, _current_device, _power, _to_fp32, register_operator

# Rows of logits and weights are padded to a multiple of so many keys, so that a card can read 16 bytes at once.
_UNIT = 16
# Largest dimension of a head: sums of more products could overflow (_KEY_SCALE).
MAX_HEAD_DIM = 512
# Where the tensors have the range of fp32, keys are clamped to _MAX_KEY and divided by _KEY_SCALE, powers of two. So no
# sum of 512 products with finite queries overflows.
_MAX_KEY = 2.0**54
_KEY_SCALE = 2.0**64

# Keys of the longest row that is held on chip, by one warp and by several. A warp needs no exchange through memory.
_KEYS_OF_A_WARP = 1024
_KEYS_ON_CHIP = 4096
# Shorter rows share the programs of rows of this length.
_SHORTEST_BLOCK = 64
# Keys of a block of longer rows.
_LONG_BLOCK = 2048
# Numbers of a tile that a warp holds at least; then a thread has enough work.
_NUMBERS_OF_A_WARP = 512


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
) -> None:
    """Do the work of :func:`gag_core.eager.guide` by products and row kernels, or by that function.

    Before the first call of each pair of programs :mod:`gag_core.triton.guard` checks their numbers.
    """
    if torch.compiler.is_compiling():
        _operator(out, q, k, v, base, mask, joint_lse, scale, *dataclasses.astuple(config))
        return
    if not (q.shape[2] and installation.is_usable()):
        eager.guide(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)
        return
    chunks: Iterator[None] = iter(())

    def start() -> None:
        nonlocal chunks
        chunks = _launch_chunks(out, q, k, v, config, base, mask, scale, joint_lse)
        next(chunks)

    program = _checked(out, q, v, config, base, mask, joint_lse)
    if guard.attempt(program, start, launch, out, q, k, v, config, base, mask, joint_lse):
        # The first chunk is written. No other path could begin anew where out and base are one tensor.
        for _ in chunks:
            pass
    else:
        eager.guide(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)


_operator = register_operator(guide)


def launch(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    base: Tensor | None,
    mask: Tensor | None,
    scale: float,
    joint_lse: Tensor | None,
) -> None:
    """Do the work of :func:`gag_core.eager.guide` by products and row kernels, checked or not."""
    for _ in _launch_chunks(out, q, k, v, config, base, mask, scale, joint_lse):
        pass


def _launch_chunks(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    base: Tensor | None,
    mask: Tensor | None,
    scale: float,
    joint_lse: Tensor | None,
) -> Iterator[None]:
    """Compute one chunk of queries after the other, and yield after each."""
    batch, heads, queries, dim = q.shape
    keys, value_dim = v.shape[2:]
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    half_products = has_wide_products(q)
    length = _padded(keys)
    # The logits in fp32 and both weights, which take half of that with half_products; later both read-outs. Without
    # half_products queries are copied.
    per_query = 2 * length + 2 * value_dim if half_products else 3 * length + 2 * value_dim + dim
    parts = eager.chunks(q, per_query=per_query, per_head=length * (dim + value_dim))
    with _current_device(q.device):
        for part, chunks_of_part in parts:
            dtype = q.dtype if half_products else torch.float32
            part_keys = _prepared_keys(k[part], length, dtype, scale < 0.0).transpose(1, 2)
            part_values = _prepared(v[part], length, dtype)
            for chunk in chunks_of_part:
                _guide_chunk(
                    out[chunk],
                    q[chunk],
                    part_keys,
                    part_values,
                    keys,
                    config,
                    None if base is None else base[chunk],
                    mask_part(mask, *chunk),
                    abs(scale),
                    None if joint_lse is None else joint_lse[chunk],
                )
                yield


def _padded(keys: int) -> int:
    """Return the length of a row of logits."""
    return keys + -keys % _UNIT


def _guide_chunk(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_count: int,
    config: GuidanceConfig,
    base: Tensor | None,
    mask: Tensor | None,
    scale: float,
    joint_lse: Tensor | None,
) -> None:
    """Compute one chunk from prepared keys ``[planes, D, length]`` and values ``[planes, length, D_v]``."""
    _, heads, queries, dim = q.shape
    planes, length, _ = values.shape
    plan = _plan_for(out, q, length, config, base, mask, joint_lse)
    logits = _product(q.reshape(planes, queries, dim), keys)
    weights = values.new_empty((planes, 2, queries, length))
    mass = logits.new_empty((planes, queries if joint_lse is not None else 0))
    unread = (0, 0, 0, 0)  # strides of tensors that are missing, in whose place another one stands
    plan.weights_kernel[(-(-queries // plan.weights["BLOCK_M"]) * planes,)](
        logits,
        logits if mask is None else mask,
        *(unread if mask is None else mask.stride()),
        logits if joint_lse is None else joint_lse,
        *(unread[:3] if joint_lse is None else joint_lse.stride()),
        weights,
        mass,
        heads,
        queries,
        key_count,
        length // _UNIT,
        # Above 0, so that masked logits stay -inf, and finite, so that the largest logit stays 0.
        min(max(scale * plan.key_scale, _FP32.tiny), _FP32.max),
        plan.power,
        **plan.weights,
    )
    del logits
    read_outs = _product(weights.view(planes, 2 * queries, length), values)
    del weights
    numbers = (config.guidance_scale, config.norm_threshold, config.orthogonal_scale, config.strength)
    plan.guidance_kernel[(-(-queries // plan.guidance["BLOCK_M"]) * planes,)](
        read_outs,
        mass,
        *_with_strides(out, plan.guidance["UNIT"]),
        *((read_outs, *unread) if base is None else _with_strides(base, plan.guidance["UNIT"])),
        heads,
        queries,
        *map(_to_fp32, numbers),
        **plan.guidance,
    )


def _plan_for(
    out: Tensor,
    q: Tensor,
    length: int,
    config: GuidanceConfig,
    base: Tensor | None,
    mask: Tensor | None,
    joint_lse: Tensor | None,
) -> _Plan:
    """Return the plan of a call or of a chunk of it; ``mask`` has a size or the stride 0 for each query."""
    return _plan(
        q.dtype,
        length,
        out.shape[3],
        (config.rule, config.alpha, config.norm_mode, config.orthogonal_scale != 0.0),
        _alignment(q.dtype, tuple(tensor.stride() for tensor in (out, base) if tensor is not None)),
        "none" if mask is None else "bool" if mask.dtype in (torch.bool, torch.uint8) else "additive",
        mask is not None and q.shape[2] > 1 and mask.shape[2] > 1 and mask.stride(2) != 0,
        base is not None,
        joint_lse is not None,
    )


def _checked(
    out: Tensor,
    q: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    base: Tensor | None,
    mask: Tensor | None,
    joint_lse: Tensor | None,
) -> guard.Program:
    """Return what the guard knows of the two programs of a call, by all that the compiler makes binaries of."""
    keys = v.shape[2]
    plan = _plan_for(out, q, _padded(keys), config, base, mask, joint_lse)
    given = [tensor for tensor in (out, base) if tensor is not None]
    strides = tuple(compiled.integer_kind(stride) for tensor in given for stride in tensor.stride())
    kinds = compiled.pointer_kinds([tensor for tensor in (*given, mask, joint_lse) if tensor is not None])
    settings = (*plan.weights.items(), *plan.guidance.items())
    present = [key.lower() for key in ("HAS_BASE", "JOINT", "ORTHOGONAL", "RELATIVE") if plan.guidance[key]]
    description = (
        f"{plan.weights_kernel.__name__}, {keys} keys, {out.shape[3]} numbers of a value, {q.dtype}, mask "
        f"{plan.weights['MASK']}, {' '.join([config.rule, *present])}, power {plan.weights['POWER']}"
    )
    return guard.program("row", (plan.weights_kernel.__name__, settings, strides, kinds), description)


class _Plan(NamedTuple):
    """The parts of both launches that depend on shapes and the program alone."""

    weights_kernel: Any
    weights: dict[str, Any]
    guidance_kernel: Any
    guidance: dict[str, Any]
    key_scale: float
    power: float


@lru_cache(maxsize=1024)
def _plan(
    dtype: torch.dtype,
    length: int,
    value_dim: int,
    variant: tuple[str, float, str, bool],
    unit: int,
    mask: str,
    mask_per_query: bool,
    has_base: bool,
    is_joint: bool,
) -> _Plan:
    """Plan the launches for a chunk of queries; ``length`` is that of a row of logits.

    ``variant`` has the settings that select the program: rule, alpha, norm_mode, and True if orthogonal_scale is not 0.
    """
    from . import row_kernels

    rule, alpha, norm_mode, orthogonal = variant
    power, form = _power(alpha)
    block_n, block_d = max(_SHORTEST_BLOCK, _power_of_two(length)), _power_of_two(value_dim)
    kernel = row_kernels.row_weights_kernel
    if block_n > _KEYS_ON_CHIP:
        kernel, block_n = row_kernels.long_row_weights_kernel, _LONG_BLOCK
    fp32_range = dtype != torch.float16
    weights = {
        "BLOCK_M": max(1, _NUMBERS_OF_A_WARP // block_n),
        "BLOCK_N": block_n,
        "POWER": form,
        "STEPS": newton_steps(length, power),
        "MASK": mask,
        "MASK_PER_QUERY": mask_per_query,
        "JOINT": is_joint,
        "FP32_RANGE": fp32_range,
        "UNIT": _UNIT,
        "num_warps": 1 if block_n <= _KEYS_OF_A_WARP else 4,
    }
    guidance = {
        "VALUE_DIM": value_dim,
        "BLOCK_M": max(1, _NUMBERS_OF_A_WARP // block_d),
        "BLOCK_D": block_d,
        "RULE": rule,
        "RELATIVE": norm_mode == "relative",
        "ORTHOGONAL": orthogonal,
        "HAS_BASE": has_base,
        "JOINT": is_joint,
        "FP32_RANGE": fp32_range,
        "OUT_MAX": torch.finfo(dtype).max,
        "UNIT": unit,
        "num_warps": 1,
    }
    key_scale = _KEY_SCALE if fp32_range else 1.0
    return _Plan(kernel, weights, row_kernels.row_guidance_kernel, guidance, key_scale, power)


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def _with_strides(tensor: Tensor, unit: int) -> tuple[Tensor | int, ...]:
    """Return the tensor and its strides, all but the last in units."""
    return tensor, *(stride // unit for stride in tensor.stride()[:-1]), tensor.stride(-1)


def _prepared(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Copy keys or values ``[B, H, N, D]`` to a contiguous ``[B * H, length, D]`` of this dtype; padding is zero."""
    batch, heads, tokens, dim = x.shape
    copy = torch.empty((batch, heads, length, dim), dtype=dtype, device=x.device)
    copy[:, :, :tokens] = x
    if length > tokens:
        copy[:, :, tokens:].zero_()
    return copy.view(batch * heads, length, dim)


def _prepared_keys(k: Tensor, length: int, dtype: torch.dtype, negative: bool) -> Tensor:
    """Copy keys as :func:`_prepared` does, so that no product with finite queries overflows.

    ``negative`` turns their sign around.
    """
    copy = _prepared(k, length, dtype)
    if k.dtype != torch.float16:
        return copy.clamp_(-_MAX_KEY, _MAX_KEY).mul_(math.copysign(1.0 / _KEY_SCALE, -1.0 if negative else 1.0))
    return copy.neg_() if negative else copy


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply ``[planes, n, m]`` by ``[planes, m, l]`` in the dtype of b, with a result in fp32."""
    if b.dtype == torch.float32:
        return torch.bmm(a.to(torch.float32), b)
    product = torch.empty((*a.shape[:2], b.shape[2]), dtype=torch.float32, device=a.device)
    numerics.multiply_wide(a, b, 1.0, product)
    return product
