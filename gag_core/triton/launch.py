# SPDX-License-Identifier: GPL-3.0-or-later
"""Launches of the fused kernel: tile sizes, and the row path where the kernel cannot be trusted."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import GuidanceConfig
from ..entmax import newton_steps
from . import compiled, guard, installation

# Largest head dimension: queries and keys of so many numbers fit on chip.
MAX_HEAD_DIM = 256
_SMALLEST_TILE = 16
_FP32 = torch.finfo(torch.float32)
_FP32_TINY, _FP32_MAX = _FP32.tiny, _FP32.max


class _Tiling(NamedTuple):
    """Queries of a program, its warps, and its widest tiles of keys and of head dimensions."""

    block_m: int
    num_warps: int
    block_n: int
    block_d: int


# Largest number of keys whose logits are held on chip. With more keys, logits are computed anew in every pass.
_MAX_KEYS_ON_CHIP = {torch.float16: 512, torch.bfloat16: 512, torch.float32: 128}
# Tilings by the number of fp32 numbers that a program holds for each query: its logits and both read-outs. Warps of 16
# queries each need no exchange with each other, and a thread then holds half of those numbers. Narrower tiles keep more
# of them in registers. Numbers that do not fit would go through memory, so warps share queries instead. Chosen, without
# a card, by the instructions that compiled programs for sm_80, sm_90 and sm_120 execute, and by their spills.
_TILING = _Tiling(64, 4, block_n=64, block_d=64)
_TILINGS = (
    (400, _TILING),
    (480, _Tiling(64, 4, block_n=32, block_d=64)),
    (512, _Tiling(32, 4, block_n=64, block_d=128)),
    (math.inf, _Tiling(32, 8, block_n=64, block_d=128)),
)
# For head dimensions of values above 128: compilers spill thousands of bytes if warps share more queries.
_WIDE_VALUES_TILING = _Tiling(16, 4, block_n=64, block_d=64)
# fp32 takes twice the registers, and has no direct path into the matrix units.
_FP32_TILING = _Tiling(16, 4, block_n=32, block_d=64)


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
    """Do the work of :func:`gag_core.eager.guide` by the fused kernel, or by the row path where it cannot be trusted.

    Before the first call of each program :mod:`gag_core.triton.guard` checks its numbers.
    """
    if torch.compiler.is_compiling():
        _operator(out, q, k, v, base, mask, joint_lse, scale, *dataclasses.astuple(config))
        return
    if q.shape[2] and installation.is_usable():
        ready = _prepare(out, q, k, v, config, base, mask, scale, joint_lse)
        if guard.attempt(ready.program, ready.start, _launch, out, q, k, v, config, base, mask, joint_lse):
            return
    from . import row  # which needs this module

    row.guide(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)


_SCHEMA = (
    "(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor? base, Tensor? mask, Tensor? joint_lse, float scale, "
    "str rule, float guidance_scale, float norm_threshold, str norm_mode, float orthogonal_scale, float alpha, "
    "float strength, bool merge_heads, int anderson_depth, float anderson_regularization) -> ()"
)


def register_operator(guide: Callable[..., None]) -> Callable[..., None]:
    """Register a function with the arguments of :func:`guide` as an operator of torch.

    A compiled graph calls an operator without tracing into it. Its arguments are those of ``_SCHEMA``.
    """

    def by_fields(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        base: Tensor | None,
        mask: Tensor | None,
        joint_lse: Tensor | None,
        scale: float,
        *fields: Any,
    ) -> None:
        guide(out, q, k, v, GuidanceConfig(*fields), base=base, mask=mask, scale=scale, joint_lse=joint_lse)

    # More than one copy of this package may be loaded, and each registers an operator of its own.
    name = re.sub(r"\W", "_", guide.__module__) + f"_{id(guide):x}::guide"
    operator = torch.library.custom_op(name, by_fields, mutates_args=("out",), schema=_SCHEMA)
    operator.register_fake(lambda *args: None)
    return operator


_operator = register_operator(guide)


def tiles(length: int, largest: int) -> tuple[tuple[int, int], ...]:
    """Cover ``length`` with few tiles ``(first, width)``, together not much longer than ``length``.

    Widths are powers of two from 16 to ``largest``.
    """
    found: list[tuple[int, int]] = []
    first = 0
    while first < length:
        rest = length - first
        width = max(_SMALLEST_TILE, 1 << (rest - 1).bit_length())
        # One wide tile that is nearly full is better than several narrow ones.
        if width > _SMALLEST_TILE and rest <= 0.75 * width:
            width //= 2
        width = min(width, largest)
        found.append((first, width))
        first += width
    return tuple(found)


def rounded(keys: int, block_n: int) -> int:
    """Round a number of keys up, so that prompts of other lengths share programs: there are 8 for up to 256 keys.

    One, two and more prompts of 77 tokens stay as short as 16 tokens allow, 32 and 64. ``block_n`` is the widest tile.
    Only the last tile of the result reaches beyond the keys.
    """
    step = 16 if 64 < keys <= 80 else 32 if keys <= 160 else 64
    step = min(step, block_n)
    return -(-keys // step) * step


def packed(some_tiles: tuple[tuple[int, int], ...]) -> int:
    """Pack a list of tiles into one integer, as ``kernels.py`` reads it."""
    codes = (first << 4 | width.bit_length() - 1 for first, width in some_tiles)
    return len(some_tiles) | sum(code << (16 * i + 8) for i, code in enumerate(codes))


def _power(alpha: float) -> tuple[float, int]:
    """Return ``1 / (alpha - 1)``, and the form of it that kernels are built for: 2, 1, or 0 for any other power."""
    power = 1.0 / (alpha - 1.0)
    return power, int(power) if power in (1.0, 2.0) else 0


def _launch(
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
    """Do the work of :func:`gag_core.eager.guide` by the kernel, checked or not."""
    if q.shape[2]:
        _prepare(out, q, k, v, config, base, mask, scale, joint_lse).start()


class _Plan(NamedTuple):
    """The parts of a launch that depend on shapes, strides and the program alone.

    ``programs`` are the guard's programs by the kinds of the pointers, see :func:`compiled.pointer_kinds`.
    """

    kernel: compiled.Kernel
    grid: compiled.Grid
    strides: tuple[tuple[int, ...], ...]
    query_scale: float
    power: float
    programs: dict[Hashable, guard.Program]


class _Ready(NamedTuple):
    """A launch that is ready to start."""

    plan: _Plan
    program: guard.Program
    kinds: Hashable
    arguments: list[Any]
    device: torch.device

    def start(self) -> None:
        with _current_device(self.device):
            self.plan.kernel.start(self.kinds, self.plan.grid, self.arguments)


def _prepare(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    base: Tensor | None,
    mask: Tensor | None,
    scale: float,
    joint_lse: Tensor | None,
) -> _Ready:
    """Make a call of :func:`gag_core.eager.guide`, with at least one query, ready to start."""
    shape, value_shape = q.shape, v.shape
    if scale < 0.0:
        q, scale = -q, -scale
    # A kernel is given q in the place of a tensor that is missing, and does not read it.
    missing = base is None, mask is None, joint_lse is None
    tensors = [q, k, v, out]
    q_strides = base_strides = mask_strides = q.stride()
    lse_strides = q_strides[:3]
    if base is None:
        base = q
    else:
        base_strides = base.stride()
        tensors.append(base)
    if mask is None:
        mask = q
    else:
        mask_strides = _expanded_strides(mask.stride(), mask.shape, shape, value_shape[2])
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        tensors.append(mask)
    if joint_lse is None:
        joint_lse = q
    else:
        lse_strides = joint_lse.stride()
        tensors.append(joint_lse)
    plan = _plan(
        shape,
        value_shape,
        q.dtype,
        precision_of(q.device),
        (q_strides, k.stride(), v.stride(), out.stride(), base_strides, mask_strides, lse_strides),
        missing,
        mask.dtype == torch.uint8,
        (config.rule, config.alpha, config.norm_mode, config.orthogonal_scale != 0.0),
    )
    kinds = compiled.pointer_kinds(tensors)
    program = plan.programs.get(kinds)
    if program is None:
        program = plan.programs[kinds] = _checked(plan, kinds, q, v)
    strides = plan.strides
    # Above 0, so that masked logits stay -inf, and finite, so that the largest logit stays 0.
    logit_scale = min(max(scale * plan.query_scale, _FP32_TINY), _FP32_MAX)
    numbers = (config.guidance_scale, config.norm_threshold, config.orthogonal_scale, config.strength)
    arguments = [
        *(q, strides[0], k, strides[1], v, strides[2], out, strides[3]),
        # Strides of the last two are arguments of their own; see formulas.VARYING.
        *(base, strides[4], mask, *strides[5], joint_lse, *strides[6]),
        *(shape[1], shape[2], value_shape[2], logit_scale, plan.power, *map(_to_fp32, numbers)),
    ]
    return _Ready(plan, program, kinds, arguments, q.device)


@lru_cache(maxsize=1024)
def _expanded_strides(
    strides: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...], keys: int
) -> tuple[int, ...]:
    """Return the strides of a mask that is expanded to the logits of queries of ``shape``."""
    own = zip(strides, sizes, (*shape[:3], keys), strict=True)
    return tuple(stride if size == wanted else 0 for stride, size, wanted in own)


def _checked(plan: _Plan, kinds: Hashable, q: Tensor, v: Tensor) -> guard.Program:
    """Return the state of a program, by all that the compiler makes a binary of its own for."""
    settings, name = plan.kernel.settings, plan.kernel.function.__name__
    # The last stride of a mask is not among formulas.VARYING.
    of_tensors = (*plan.strides[:5], plan.strides[5][-1:])
    strides = tuple(compiled.integer_kind(stride) for of_tensor in of_tensors for stride in of_tensor)
    varying = tuple(compiled.has_32_bits(stride) for of_tensor in plan.strides[5:] for stride in of_tensor)
    present = [key.lower() for key in ("HAS_BASE", "JOINT", "ORTHOGONAL", "RELATIVE") if settings[key]]
    description = (
        f"{name}, {v.shape[2]} keys of {q.shape[3]}, {q.dtype}, mask {settings['MASK']}, "
        f"{' '.join([settings['RULE'], *present])}, power {settings['POWER']}"
    )
    return guard.program("fused", (name, tuple(settings.items()), strides, varying, kinds), description)


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    dtype: torch.dtype,
    precision: str,
    strides: tuple[tuple[int, ...], ...],
    missing: tuple[bool, bool, bool],
    mask_is_bool: bool,
    variant: tuple[str, float, str, bool],
) -> _Plan:
    """Plan a launch. Plans are cached, because the time of a launch itself counts where a model is small for the card.

    ``strides`` are those of q, k, v, output, base, mask and logsumexp. ``missing`` is True for each of the last three
    that is not given. ``variant`` has the settings that select the program: rule, alpha, norm_mode, and True if
    orthogonal_scale is not 0.
    """
    from . import formulas, kernels

    batch, heads, queries, dim = shape
    keys, value_dim = value_shape[2:]
    rule, alpha, norm_mode, orthogonal = variant
    no_base, no_mask, no_lse = missing
    power, form = _power(alpha)
    fp32_range = dtype != torch.float16
    alignment = _alignment(dtype, strides[: 4 if no_base else 5])
    settings: dict[str, Any] = {
        "HEAD_DIM": dim,
        "VALUE_DIM": value_dim,
        "POWER": form,
        "STEPS": newton_steps(keys, power),
        "RULE": rule,
        "ORTHOGONAL": orthogonal,
        "RELATIVE": norm_mode == "relative",
        "HAS_BASE": not no_base,
        "MASK": "none" if no_mask else "bool" if mask_is_bool else "additive",
        "MASK_PER_QUERY": not no_mask and queries > 1 and strides[5][2] != 0,
        "JOINT": not no_lse,
        "ALIGNMENT": alignment,
        "FP32_RANGE": fp32_range,
        "UPCAST": formulas.INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": precision,
        "OUT_MAX": torch.finfo(dtype).max,
    }
    if keys <= _MAX_KEYS_ON_CHIP[dtype]:
        kernel = kernels.guided_attention_kernel
        tiling = _tiling(rounded(keys, _TILING.block_n), value_dim, dtype)
        key_tiles = tiles(rounded(keys, tiling.block_n), tiling.block_n)
        warps_share_queries = tiling.block_m < 16 * tiling.num_warps
        settings |= {"KEY_TILES": packed(key_tiles), "WARPS_SHARE_QUERIES": warps_share_queries}
    else:
        kernel = kernels.guided_attention_long_kernel
        block_n = _FP32_TILING.block_n if dtype == torch.float32 else _TILING.block_n
        max_key_blocks = 1 << (-(-keys // block_n) - 1).bit_length()
        tiling = _tiling(block_n + max_key_blocks, value_dim, dtype)
        settings |= {"BLOCK_N": block_n, "MAX_KEY_BLOCKS": max_key_blocks}
    settings |= {
        "DIM_TILES": packed(tiles(dim, tiling.block_d)),
        "VALUE_TILES": packed(tiles(value_dim, tiling.block_d)),
        "BLOCK_M": tiling.block_m,
        "num_warps": tiling.num_warps,
        "num_stages": 1 if dtype == torch.float32 else 2,
    }
    aligned = [(*(stride // alignment for stride in of_tensor[:-1]), of_tensor[-1]) for of_tensor in strides[:5]]
    grid = (-(-queries // tiling.block_m) * batch * heads, 1, 1)
    query_scale = kernels.QUERY_SCALE if fp32_range else 1.0
    return _Plan(compiled.Kernel(kernel, settings), grid, (*aligned, *strides[5:]), query_scale, power, {})


def numbers_of_query(keys: int, value_dim: int, dtype: torch.dtype) -> int:
    """Return how many fp32 numbers a program holds for each query: its logits and both read-outs."""
    if keys > _MAX_KEYS_ON_CHIP[dtype]:
        block_n = _FP32_TILING.block_n if dtype == torch.float32 else _TILING.block_n
        keys = block_n + (1 << (-(-keys // block_n) - 1).bit_length())
    return keys + 2 * value_dim


def _tiling(logits: int, value_dim: int, dtype: torch.dtype) -> _Tiling:
    """Choose the tiling of a program that holds ``logits`` logits for each query beside both read-outs."""
    numbers = logits + 2 * value_dim
    if dtype == torch.float32:
        return _FP32_TILING
    if numbers > 480 and value_dim > 128:
        return _WIDE_VALUES_TILING
    return next(tiling for most, tiling in _TILINGS if numbers <= most)


def precision_of(device: torch.device) -> str:
    """Return the precision of products in fp32, as ``tl.dot`` names it: NVIDIA's matrix units take three of tf32."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def _alignment(dtype: torch.dtype, strides: tuple[tuple[int, ...], ...]) -> int:
    """Return how many numbers a card may read at once by the strides: as many as 16 bytes hold, or 1.

    Triton finds this out by itself only for strides that are multiples of 16. The stride of a head of 40 is not.
    """
    at_once = 16 // dtype.itemsize
    return at_once if all(stride % at_once == 0 for of_tensor in strides for stride in of_tensor[:-1]) else 1


def _to_fp32(value: float) -> float:
    """Return the value, or infinity where it does not fit into fp32, as in a tensor."""
    return math.copysign(math.inf, value) if abs(value) > _FP32_MAX else float(value)


def _current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current device: kernels start on the current one, which may not be that of the tensors."""
    if device.type == "cpu":
        return nullcontext()
    return torch.cuda.device(device) if device.type == "cuda" else torch.xpu.device(device)
