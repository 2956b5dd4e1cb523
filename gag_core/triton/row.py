# SPDX-License-Identifier: GPL-3.0-or-later
"""The row path: products by the vendor's library, and between them Triton kernels that need no matrix units.

For each chunk of queries: logits by one product, both weights by one kernel, both read-outs by one product, and the
guided output by one kernel. It runs where the fused kernel cannot: with Triton 3.0 to 3.2, on cards without matrix
units, for more keys than fit, and where the fused kernel would spill registers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import eager, numerics
from ..config import GuidanceConfig
from ..entmax import newton_steps
from ..numerics import has_wide_products, mask_part
from . import compiled, guard, installation
from .launch import _FP32, _alignment, _current_device, _expanded_strides, _power, _to_fp32, register_operator

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
    plan = _plan_for(out, q, v, config, base, mask, joint_lse)
    kinds = _kinds(out, base, mask, joint_lse)
    chunks: Iterator[None] = iter(())

    def start() -> None:
        nonlocal chunks
        chunks = _launch_chunks(plan, kinds, out, q, k, v, config, base, mask, scale, joint_lse)
        next(chunks)

    if guard.attempt(_program(plan, kinds, q, v), start, launch, out, q, k, v, config, base, mask, joint_lse):
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
    plan, kinds = _plan_for(out, q, v, config, base, mask, joint_lse), _kinds(out, base, mask, joint_lse)
    for _ in _launch_chunks(plan, kinds, out, q, k, v, config, base, mask, scale, joint_lse):
        pass


def _launch_chunks(
    plan: _Plan,
    kinds: Hashable,
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
    """Compute one chunk of queries after the other, and yield after each. ``kinds`` are those of the whole tensors."""
    dim = q.shape[3]
    keys, value_dim = v.shape[2:]
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    length = _padded(keys)
    # The logits in fp32 and both weights, which take half of that with half_products; later both read-outs. Without
    # half_products queries are copied.
    per_query = 2 * length + 2 * value_dim if plan.half_products else 3 * length + 2 * value_dim + dim
    parts = eager.chunks(q, per_query=per_query, per_head=length * (dim + value_dim))
    # Above 0, so that masked logits stay -inf, and finite, so that the largest logit stays 0.
    logit_scale = min(max(abs(scale) * plan.key_scale, _FP32.tiny), _FP32.max)
    numbers = (config.guidance_scale, config.norm_threshold, config.orthogonal_scale, config.strength)
    factors = tuple(map(_to_fp32, numbers))
    dtype = q.dtype if plan.half_products else torch.float32
    with _current_device(q.device):
        if len(parts) == 1 == len(parts[0][1]):  # views of whole tensors would take a third of the call's CPU time
            memory = _Memory.prepare(k, v, length, dtype, scale < 0.0)
            _guide_chunk(plan, kinds, out, q, memory, logit_scale, factors, base, mask, joint_lse)
            yield
            return
        for part, chunks_of_part in parts:
            memory = _Memory.prepare(k[part], v[part], length, dtype, scale < 0.0)
            for chunk in chunks_of_part:
                some_out, some_mask = out[chunk], mask_part(mask, *chunk)
                some_base = None if base is None else base[chunk]
                some_lse = None if joint_lse is None else joint_lse[chunk]
                kinds = _kinds(some_out, some_base, some_mask, some_lse)
                _guide_chunk(
                    plan, kinds, some_out, q[chunk], memory, logit_scale, factors, some_base, some_mask, some_lse
                )
                yield


def _padded(keys: int) -> int:
    """Return the length of a row of logits."""
    return keys + -keys % _UNIT


def _guide_chunk(
    plan: _Plan,
    kinds: Hashable,
    out: Tensor,
    q: Tensor,
    memory: _Memory,
    logit_scale: float,
    factors: tuple[float, ...],
    base: Tensor | None,
    mask: Tensor | None,
    joint_lse: Tensor | None,
) -> None:
    """Compute one chunk of queries; ``kinds`` are those of its tensors."""
    keys, values, key_count = memory
    _, heads, queries, dim = q.shape
    planes, _, length = keys.shape
    logits = _product(q.reshape(planes, queries, dim), keys)
    weights = torch.empty((planes, 2 * queries, length), dtype=values.dtype, device=q.device)
    mass = None if joint_lse is None else torch.empty((planes, queries), dtype=torch.float32, device=q.device)
    # Kernels do not read tensors that are missing. In their place they get logits or read-outs.
    plan.weights.start(
        kinds,
        (-(-queries // plan.queries_of_weights) * planes, 1, 1),
        (
            *(logits, logits if mask is None else mask, *plan.mask_strides),
            *(logits if joint_lse is None else joint_lse, *plan.lse_strides, weights, logits if mass is None else mass),
            *(heads, queries, key_count, length // _UNIT, logit_scale, plan.power),
        ),
    )
    del logits
    read_outs = _product(weights, values)
    del weights
    plan.guidance.start(
        kinds,
        (-(-queries // plan.queries_of_guidance) * planes, 1, 1),
        (
            *(read_outs, read_outs if mass is None else mass, out, *plan.out_strides),
            *(read_outs if base is None else base, *plan.base_strides, heads, queries, *factors),
        ),
    )


def _kinds(out: Tensor, base: Tensor | None, mask: Tensor | None, joint_lse: Tensor | None) -> Hashable:
    """Return all that Triton's compiler uses of the pointers of both launches, see :func:`compiled.pointer_kinds`.

    The other tensors of a launch are new, so they are aligned. A chunk bounds their sizes.
    """
    return compiled.pointer_kinds([tensor for tensor in (out, base, mask, joint_lse) if tensor is not None])


def _program(plan: _Plan, kinds: Hashable, q: Tensor, v: Tensor) -> guard.Program:
    """Return what the guard knows of the two programs of a call, by all that the compiler makes binaries of."""
    program = plan.programs.get(kinds)
    if program is None:
        program = plan.programs[kinds] = _checked(plan, kinds, q, v)
    return program


def _checked(plan: _Plan, kinds: Hashable, q: Tensor, v: Tensor) -> guard.Program:
    """Return what the guard knows of the programs of a plan for pointers of these kinds."""
    # Only the last of the strides is not among the arguments that Triton is told not to specialise.
    of_tensors = (plan.out_strides, plan.base_strides, plan.mask_strides)
    strides = tuple(compiled.integer_kind(of_tensor[-1]) for of_tensor in of_tensors)
    varying = tuple(compiled.has_32_bits(stride) for one in (*of_tensors, plan.lse_strides) for stride in one)
    weights, guidance = plan.weights.settings, plan.guidance.settings
    name = plan.weights.function.__name__
    present = [key.lower() for key in ("HAS_BASE", "JOINT", "ORTHOGONAL", "RELATIVE") if guidance[key]]
    description = (
        f"{name}, {v.shape[2]} keys, {v.shape[3]} numbers of a value, {q.dtype}, mask {weights['MASK']}, "
        f"{' '.join([guidance['RULE'], *present])}, power {weights['POWER']}"
    )
    key = (name, tuple(weights.items()), tuple(guidance.items()), plan.half_products, strides, varying, kinds)
    return guard.program("row", key, description)


class _Plan(NamedTuple):
    """The parts of both launches that depend on the number of keys, the strides and the programs alone.

    Attributes:
        weights, guidance: the kernels.
        queries_of_weights, queries_of_guidance: queries of one program of each.
        out_strides, base_strides: strides as the kernels take them, the last in numbers and the others in units.
        mask_strides, lse_strides: strides in numbers; 0 where a mask repeats itself, and for a missing tensor.
        half_products: True if matrices in half precision are multiplied as they are, with a result in fp32.
        key_scale: the factor that logits are too small by.
        power: ``1 / (alpha - 1)``.
        programs: the guard's programs by the kinds of the pointers, see :func:`compiled.pointer_kinds`.
    """

    weights: compiled.Kernel
    guidance: compiled.Kernel
    queries_of_weights: int
    queries_of_guidance: int
    out_strides: tuple[int, ...]
    base_strides: tuple[int, ...]
    mask_strides: tuple[int, ...]
    lse_strides: tuple[int, ...]
    half_products: bool
    key_scale: float
    power: float
    programs: dict[Hashable, guard.Program]


def _plan_for(
    out: Tensor,
    q: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    base: Tensor | None,
    mask: Tensor | None,
    joint_lse: Tensor | None,
) -> _Plan:
    """Return the plan of a call, which is that of each chunk too."""
    keys, value_dim = v.shape[2:]
    return _plan(
        q.dtype,
        _padded(keys),
        value_dim,
        (config.rule, config.alpha, config.norm_mode, config.orthogonal_scale != 0.0),
        q.shape[2] == 1,
        has_wide_products(q),
        "none" if mask is None else "bool" if mask.dtype in (torch.bool, torch.uint8) else "additive",
        out.stride(),
        None if base is None else base.stride(),
        None if mask is None else _expanded_strides(mask.stride(), mask.shape, q.shape, keys),
        None if joint_lse is None else joint_lse.stride(),
    )


@lru_cache(maxsize=1024)
def _plan(
    dtype: torch.dtype,
    length: int,
    value_dim: int,
    variant: tuple[str, float, str, bool],
    one_query: bool,
    half_products: bool,
    mask: str,
    out_strides: tuple[int, ...],
    base_strides: tuple[int, ...] | None,
    mask_strides: tuple[int, ...] | None,
    lse_strides: tuple[int, ...] | None,
) -> _Plan:
    """Plan the launches of a call; ``length`` is that of a row of logits. Plans are cached, as in ``launch.py``.

    ``variant`` has the settings that select the program: rule, alpha, norm_mode, and True if orthogonal_scale is not 0.
    Strides are None for a tensor that is not given.
    """
    from . import row_kernels

    rule, alpha, norm_mode, orthogonal = variant
    power, form = _power(alpha)
    block_n, block_d = max(_SHORTEST_BLOCK, _power_of_two(length)), _power_of_two(value_dim)
    kernel = row_kernels.row_weights_kernel
    if block_n > _KEYS_ON_CHIP:
        kernel, block_n = row_kernels.long_row_weights_kernel, _LONG_BLOCK
    fp32_range = dtype != torch.float16
    weights: dict[str, Any] = {
        "BLOCK_M": max(1, _NUMBERS_OF_A_WARP // block_n),
        "BLOCK_N": block_n,
        "POWER": form,
        "STEPS": newton_steps(length, power),
        "MASK": mask,
        "MASK_PER_QUERY": mask_strides is not None and not one_query and mask_strides[2] != 0,
        "JOINT": lse_strides is not None,
        "FP32_RANGE": fp32_range,
        "UNIT": _UNIT,
        "num_warps": 1 if block_n <= _KEYS_OF_A_WARP else 4,
    }
    unit = _alignment(dtype, (out_strides,) if base_strides is None else (out_strides, base_strides))
    guidance: dict[str, Any] = {
        "VALUE_DIM": value_dim,
        "BLOCK_M": max(1, _NUMBERS_OF_A_WARP // block_d),
        "BLOCK_D": block_d,
        "RULE": rule,
        "RELATIVE": norm_mode == "relative",
        "ORTHOGONAL": orthogonal,
        "HAS_BASE": base_strides is not None,
        "JOINT": lse_strides is not None,
        "FP32_RANGE": fp32_range,
        "OUT_MAX": torch.finfo(dtype).max,
        "UNIT": unit,
        "num_warps": 1,
    }
    missing = (0, 0, 0, 0)
    return _Plan(
        compiled.Kernel(kernel, weights),
        compiled.Kernel(row_kernels.row_guidance_kernel, guidance),
        weights["BLOCK_M"],
        guidance["BLOCK_M"],
        _in_units(out_strides, unit),
        missing if base_strides is None else _in_units(base_strides, unit),
        mask_strides or missing,
        lse_strides or missing[:3],
        half_products,
        _KEY_SCALE if fp32_range else 1.0,
        power,
        {},
    )


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def _in_units(strides: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """Return strides in units, except for the last."""
    return *(stride // unit for stride in strides[:-1]), strides[-1]


class _Memory(NamedTuple):
    """Keys and values of some planes, with rows of padding behind them.

    Attributes:
        keys: ``[planes, D, length]``; its padding is not initialized. Kernels ignore logits of padding.
        values: ``[planes, length, D_v]``; its padding is zero.
        key_count: number of keys without padding.
    """

    keys: Tensor
    values: Tensor
    key_count: int

    @classmethod
    def prepare(cls, k: Tensor, v: Tensor, length: int, dtype: torch.dtype, negative: bool) -> _Memory:
        """Copy keys ``[B, H, N, D]`` and values ``[B, H, N, D_v]`` to contiguous tensors of this dtype.

        Keys are such that no product with finite queries overflows. ``negative`` turns their sign around.
        """
        batch, heads, tokens, dim = k.shape
        planes, value_dim, is_padded = batch * heads, v.shape[3], length > tokens
        keys = torch.empty((batch, heads, length, dim), dtype=dtype, device=k.device)
        values = (torch.zeros if is_padded else torch.empty)(
            (batch, heads, length, value_dim), dtype=dtype, device=v.device
        )
        some_keys = keys.narrow(2, 0, tokens) if is_padded else keys
        (values.narrow(2, 0, tokens) if is_padded else values).copy_(v)
        if k.dtype == torch.float16:
            some_keys.copy_(k)
            if negative:
                some_keys.neg_()
        else:
            if k.dtype == dtype:
                torch.clamp(k, -_MAX_KEY, _MAX_KEY, out=some_keys)
            else:  # the operation above does not change the dtype
                some_keys.copy_(k).clamp_(-_MAX_KEY, _MAX_KEY)
            some_keys.mul_(math.copysign(1.0 / _KEY_SCALE, -1.0 if negative else 1.0))
        transposed = keys.as_strided((planes, dim, length), (length * dim, 1, dim))
        return cls(transposed, values.view(planes, length, value_dim), tokens)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply ``[planes, n, m]`` by ``[planes, m, l]`` in the dtype of b, with a result in fp32."""
    if b.dtype == torch.float32:
        return torch.bmm(a.to(torch.float32), b)
    product = torch.empty((*a.shape[:2], b.shape[2]), dtype=torch.float32, device=a.device)
    numerics.multiply_wide(a, b, 1.0, product)
    return product
