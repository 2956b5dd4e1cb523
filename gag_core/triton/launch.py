# SPDX-License-Identifier: GPL-3.0-or-later
"""Launches of the fused kernel: tile sizes, and the plain torch path where the kernel fails."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import eager
from ..config import GuidanceConfig
from ..echo import plain
from ..entmax import newton_steps

log = logging.getLogger("comfyui-gag")

# Largest head dimension: queries and keys of so many numbers fit on chip.
MAX_HEAD_DIM = 256
_SMALLEST_TILE = 16
_FP32 = torch.finfo(torch.float32)

# Calls that failed once are not tried again: path, device, dtype, head dimensions, True for many keys, form of power.
_CallKey = tuple[str, torch.device, torch.dtype, int, int, bool, int]
_failed: set[_CallKey] = set()
_warned: set[torch.device] = set()


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
    """Do the work of :func:`gag_core.eager.guide` by a kernel.

    If the kernel fails, this calls :func:`gag_core.eager.guide` instead, and logs the reason once per device.
    """
    if torch.compiler.is_compiling():
        _operator(out, q, k, v, base, mask, joint_lse, scale, *dataclasses.astuple(config))
    elif not attempt("fused", _launch, out, q, k, v, config, base, mask, scale, joint_lse):
        eager.guide(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)


def attempt(
    path: str,
    launch: Callable[..., None],
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    *rest: Tensor | float | None,
) -> bool:
    """Launch kernels, and return True if that worked. Such a call is not tried again after it failed."""
    key = _call_key(path, q, v, config)
    if key in _failed:
        return False
    try:
        launch(out, q, k, v, config, *rest)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers, drivers and cards can raise anything
        _failed.add(key)
        if q.device not in _warned:
            _warned.add(q.device)
            text = plain(error, 2000).replace("\\n", " ")  # compilers write many lines
            reason = plain(" ".join(f"{type(error).__name__}: {text}".split()), 300)
            log.warning(
                "GAG's %s kernel does not work on %s, so the plain PyTorch path is used from now on: the same "
                "picture, slower (GAG_KERNELS=eager in the environment chooses that path from the start). Reason: %s",
                path,
                q.device,
                reason,
            )
        return False
    return True


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


def _call_key(path: str, q: Tensor, v: Tensor, config: GuidanceConfig) -> _CallKey:
    many_keys = v.shape[2] > _MAX_KEYS_ON_CHIP[q.dtype]
    return path, q.device, q.dtype, q.shape[3], v.shape[3], many_keys, _power(config.alpha)[1]


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
    batch, heads, queries, _ = q.shape
    if queries == 0:
        return
    if scale < 0.0:
        q, scale = -q, -scale
    if mask is not None:
        mask = mask.expand(batch, heads, queries, k.shape[2])
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    # A kernel is given q in the place of a tensor that is missing, and does not read it.
    missing = base is None, mask is None, joint_lse is None
    tensors = (q, k, v, out, *(q if tensor is None else tensor for tensor in (base, mask, joint_lse)))
    plan = _plan(
        q.shape,
        v.shape,
        q.dtype,
        precision_of(q.device),
        (*(tensor.stride() for tensor in tensors[:6]), tensors[6].stride()[:3]),
        missing,
        mask is not None and mask.dtype == torch.uint8,
        (config.rule, config.alpha, config.norm_mode, config.orthogonal_scale != 0.0),
    )
    numbers = (config.guidance_scale, config.norm_threshold, config.orthogonal_scale, config.strength)
    pointers_and_strides: list[Any] = [
        part for pair in zip(tensors[:5], plan.strides[:5], strict=True) for part in pair
    ]
    # Strides of the others are arguments of their own; see formulas.VARYING.
    for tensor, strides in zip(tensors[5:], plan.strides[5:], strict=True):
        pointers_and_strides += [tensor, *strides]
    with _current_device(q.device):
        plan.kernel[plan.grid](
            *pointers_and_strides,
            heads,
            queries,
            k.shape[2],
            # Above 0, so that masked logits stay -inf, and finite, so that the largest logit stays 0.
            min(max(scale * plan.query_scale, _FP32.tiny), _FP32.max),
            plan.power,
            *map(_to_fp32, numbers),
            **plan.settings,
        )


class _Plan(NamedTuple):
    """The parts of a launch that depend on shapes, strides and the program alone."""

    kernel: Any
    grid: tuple[int]
    strides: tuple[tuple[int, ...], ...]
    query_scale: float
    power: float
    settings: dict[str, Any]


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
    grid = (-(-queries // tiling.block_m) * batch * heads,)
    query_scale = kernels.QUERY_SCALE if fp32_range else 1.0
    return _Plan(kernel, grid, (*aligned, *strides[5:]), query_scale, power, settings)


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
    return math.copysign(math.inf, value) if abs(value) > _FP32.max else float(value)


def _current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current device: kernels start on the current one, which may not be that of the tensors."""
    if device.type == "cpu":
        return nullcontext()
    return torch.cuda.device(device) if device.type == "cuda" else torch.xpu.device(device)
