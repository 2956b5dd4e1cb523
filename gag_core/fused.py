# SPDX-License-Identifier: GPL-3.0-or-later
"""Guided attention by the Triton kernels: when they are used, how they are launched, what happens if they fail."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager
from .config import GuidanceConfig
from .entmax import newton_steps

log = logging.getLogger("comfyui-gag")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_MOST_HEAD_DIM = 256
_SMALLEST_TILE = 16
_RULES = ("gag", "pladis")
# Below it, rounding in fp32 is raised to a power that shows; see entmax.py.
_LEAST_ALPHA = 1.05
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_FP32 = torch.finfo(torch.float32)

# Older cards have no matrix units that Triton knows how to use.
_OLDEST_NVIDIA = (8, 0)

# What failed once is not tried again: device, dtype, head dimensions, whether the keys are many, the form of the power.
_Kind = tuple[torch.device, torch.dtype, int, int, bool, int]
_failed: set[_Kind] = set()
_warned: set[torch.device] = set()


class _Cut(NamedTuple):
    """How the work is cut: the queries of a program, its warps, its widest tiles of keys and of head dimensions."""

    queries: int
    warps: int
    key_tile: int
    dim_tile: int


# Up to so many keys their logits are held; those of more are computed anew in every pass.
_KEYS_ON_CHIP = {torch.float16: 512, torch.bfloat16: 512, torch.float32: 128}
# By how many fp32 numbers a program holds for each query, its logits and both read-outs. Warps of 16 queries each need
# no exchange with each other, and a thread holds half of those numbers then. Narrower tiles keep more of them in
# registers; what does not fit would go through memory, so warps share queries instead. Chosen, without a card, by the
# instructions that compiled programs for sm_80, sm_90 and sm_120 execute, and by what they spill.
_CUT = _Cut(64, 4, key_tile=64, dim_tile=64)
_CUTS_OF_MORE = (
    (480, _Cut(64, 4, key_tile=32, dim_tile=64)),
    (512, _Cut(32, 4, key_tile=64, dim_tile=128)),
    (math.inf, _Cut(32, 8, key_tile=64, dim_tile=128)),
)
# Compilers spill thousands of bytes of such read-outs if warps share more queries.
_CUT_OF_WIDE_VALUES = _Cut(16, 4, key_tile=64, dim_tile=64)
# fp32 takes twice the registers and no direct way into the matrix units.
_CUT_OF_FP32 = _Cut(16, 4, key_tile=32, dim_tile=64)


def takes(q: Tensor, v: Tensor, config: GuidanceConfig) -> bool:
    """Whether the kernels can compute this, here, and have not failed at it before."""
    return (
        _runs_on(q.device)
        and q.dtype in _DTYPES
        and config.rule in _RULES
        and config.alpha >= _LEAST_ALPHA
        and _kind(q, v, config) not in _failed
        and not config.merge_heads
        and max(q.shape[3], v.shape[3]) <= _MOST_HEAD_DIM
    )


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
    joint_lse: Tensor | None,
) -> None:
    """As :func:`eager.guide`, by a kernel; if that fails, by :func:`eager.guide`, saying why once per device."""
    if torch.compiler.is_compiling():
        _operator(out, q, k, v, base, mask, joint_lse, scale, *dataclasses.astuple(config))
        return
    try:
        _launch(out, q, k, v, config, base, mask, scale, joint_lse)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler, a driver and a card of somebody else's: anything can come out of them
        _failed.add(_kind(q, v, config))
        if q.device not in _warned:
            _warned.add(q.device)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            log.warning(
                "GAG's fused kernel does not work on %s, so the plain PyTorch path is used from now on: the same "
                "picture, slower. Reason: %s",
                q.device,
                reason,
            )
        eager.guide(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)


_SCHEMA = (
    "(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor? base, Tensor? mask, Tensor? joint_lse, float scale, "
    "str rule, float guidance_scale, float norm_threshold, str norm_mode, float orthogonal_scale, float alpha, "
    "float strength, bool merge_heads, int anderson_depth, float anderson_regularization) -> ()"
)


def _guide_by_fields(
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


def _registered() -> Callable[..., None]:
    """:func:`guide` as an operator of torch's, which a compiled graph calls without looking inside."""
    # More than one copy of this package may be loaded, and each registers its own.
    name = re.sub(r"\W", "_", __name__) + f"_{id(guide):x}::guide"
    operator = torch.library.custom_op(name, _guide_by_fields, mutates_args=("out",), schema=_SCHEMA)
    operator.register_fake(lambda *args: None)
    return operator


_operator = _registered()


def tiles(length: int, largest: int) -> tuple[tuple[int, int], ...]:
    """``(first, width)`` of tiles that cover ``length``: few, of widths that are powers of two from 16 to
    ``largest``, and together not much longer than ``length``."""
    found: list[tuple[int, int]] = []
    first = 0
    while first < length:
        rest = length - first
        width = max(_SMALLEST_TILE, 1 << (rest - 1).bit_length())
        # Nearly full, one wide tile is better than several narrow ones.
        if width > _SMALLEST_TILE and rest <= 0.75 * width:
            width //= 2
        width = min(width, largest)
        found.append((first, width))
        first += width
    return tuple(found)


def _runs_on(device: torch.device) -> bool:
    if device.type == "cuda" and torch.version.hip is None:
        return _HAS_TRITON and torch.cuda.get_device_capability(device) >= _OLDEST_NVIDIA
    return _HAS_TRITON and device.type in ("cuda", "xpu")


def _power(alpha: float) -> tuple[float, int]:
    """``1 / (alpha - 1)``, and that as the kernels tell the cheap ones from others: 2, 1 or 0."""
    power = 1.0 / (alpha - 1.0)
    return power, int(power) if power in (1.0, 2.0) else 0


def _kind(q: Tensor, v: Tensor, config: GuidanceConfig) -> _Kind:
    return q.device, q.dtype, q.shape[3], v.shape[3], v.shape[2] > _KEYS_ON_CHIP[q.dtype], _power(config.alpha)[1]


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
    # Where there is no such tensor the kernel is given another one, which it does not read.
    missing = base is None, mask is None, joint_lse is None
    tensors = (q, k, v, out, *(q if one is None else one for one in (base, mask, joint_lse)))
    plan = _plan(
        q.shape,
        v.shape,
        q.dtype,
        q.device.type,
        tuple(tensor.stride() for tensor in tensors),
        missing,
        mask is not None and mask.dtype == torch.uint8,
        (config.rule, config.alpha, config.norm_mode, config.orthogonal_scale != 0.0),
    )
    numbers = (config.guidance_scale, config.norm_threshold, config.orthogonal_scale, config.strength)
    arguments = [part for pair in zip(tensors, plan.strides, strict=True) for part in pair]
    with _on(q.device):
        plan.kernel[plan.grid](
            *arguments,
            heads,
            queries,
            k.shape[2],
            # Above 0, so that it keeps masked logits at -inf, and finite, so that it keeps the largest one at 0.
            min(max(scale * plan.query_unit, _FP32.tiny), _FP32.max),
            plan.power,
            *map(_fp32, numbers),
            **plan.settings,
        )


class _Plan(NamedTuple):
    """What of a launch depends on neither numbers nor contents of tensors."""

    kernel: Any
    grid: tuple[int]
    strides: tuple[tuple[int, ...], ...]
    query_unit: float
    power: float
    settings: dict[str, Any]


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    strides: tuple[tuple[int, ...], ...],
    missing: tuple[bool, bool, bool],
    mask_is_bool: bool,
    way: tuple[str, float, str, bool],
) -> _Plan:
    """Remembered, because in a model that a card is through with quickly each launch's own time counts.

    ``strides`` are those of q, k, v, output, base, mask and logsumexp; the last three may be ``missing``; ``way`` is
    what of the config there are other programs for.
    """
    from . import kernels

    batch, heads, queries, dim = shape
    keys, value_dim = value_shape[2:]
    rule, alpha, norm_mode, orthogonal = way
    no_base, no_mask, no_lse = missing
    power, form = _power(alpha)
    wide = dtype != torch.float16
    alignment = _alignment(dtype, strides[: 4 if no_base else 5])
    settings: dict[str, Any] = {
        "DIM": dim,
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
        "WIDE": wide,
        "UPCAST": kernels.INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "tf32x3" if device == "cuda" and torch.version.hip is None else "ieee",
        "LIMIT": torch.finfo(dtype).max,
    }
    if keys <= _KEYS_ON_CHIP[dtype]:
        kernel = kernels.guided_attention_kernel
        cut = _cut_of(keys, value_dim, dtype)
        settings |= {"KEY_TILES": tiles(keys, cut.key_tile), "SHARED": cut.queries < 16 * cut.warps}
    else:
        kernel = kernels.guided_attention_long_kernel
        key_block = _CUT_OF_FP32.key_tile if dtype == torch.float32 else _CUT.key_tile
        most_blocks = 1 << (-(-keys // key_block) - 1).bit_length()
        cut = _cut_of(key_block + most_blocks, value_dim, dtype)
        settings |= {"KEY_BLOCK": key_block, "MOST_KEY_BLOCKS": most_blocks}
    settings |= {
        "DIM_TILES": tiles(dim, cut.dim_tile),
        "VALUE_TILES": tiles(value_dim, cut.dim_tile),
        "BLOCK": cut.queries,
        "num_warps": cut.warps,
        "num_stages": 1 if dtype == torch.float32 else 2,
    }
    aligned = [(*(step // alignment for step in steps[:-1]), steps[-1]) for steps in strides[:5]]
    grid = (-(-queries // cut.queries) * batch * heads,)
    return _Plan(kernel, grid, (*aligned, *strides[5:]), kernels.QUERY_UNIT if wide else 1.0, power, settings)


def _cut_of(logits: int, value_dim: int, dtype: torch.dtype) -> _Cut:
    """How to cut the work if a program holds so many logits for each query beside both read-outs."""
    held = logits + 2 * value_dim
    if dtype == torch.float32:
        return _CUT_OF_FP32
    if held <= 400:
        return _CUT
    if held > 480 and value_dim > 128:
        return _CUT_OF_WIDE_VALUES
    return next(cut for most, cut in _CUTS_OF_MORE if held <= most)


def _alignment(dtype: torch.dtype, strides: tuple[tuple[int, ...], ...]) -> int:
    """How many numbers a card may read at once, as far as the strides go: as many as 16 bytes hold, or one.

    Triton sees this by itself for strides that are multiples of 16, which that of a head of 40 is not.
    """
    at_once = 16 // dtype.itemsize
    return at_once if all(step % at_once == 0 for steps in strides for step in steps[:-1]) else 1


def _fp32(number: float) -> float:
    """What does not fit into the kernel's fp32 becomes infinite, as it does in a tensor."""
    return math.copysign(math.inf, number) if abs(number) > _FP32.max else float(number)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels start on the current device, which need not be the tensor's."""
    if device.type == "cpu":
        return nullcontext()
    return torch.cuda.device(device) if device.type == "cuda" else torch.xpu.device(device)
