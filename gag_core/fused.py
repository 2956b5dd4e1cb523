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
# What a program holds for its queries (logits, read-outs) should fit into its warps' registers, with as much again for
# what it works with: fewer fp32 numbers per warp than this.
_NUMBERS_PER_WARP = 4096
_RULES = ("gag", "pladis")
# Below it, rounding in fp32 is raised to a power that shows; see entmax.py.
_LEAST_ALPHA = 1.05
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Older cards have no matrix units that Triton knows how to use.
_OLDEST_NVIDIA = (8, 0)

# What failed once is not tried again: device, dtype, head dimensions, whether the keys are many, the form of the power.
_Kind = tuple[torch.device, torch.dtype, int, int, bool, int]
_failed: set[_Kind] = set()
_warned: set[torch.device] = set()


class _Sizes(NamedTuple):
    """How the work is cut, by dtype: fp32 takes twice the registers and no direct way into the matrix units.

    The logits of up to ``keys_on_chip`` keys are held; those of more are computed anew in every pass.
    """

    keys_on_chip: int
    key_tile: int
    dim_tile: int
    most_queries: int
    stages: int


_HALF_SIZES = _Sizes(keys_on_chip=512, key_tile=64, dim_tile=128, most_queries=64, stages=2)
_FP32_SIZES = _Sizes(keys_on_chip=128, key_tile=32, dim_tile=64, most_queries=16, stages=1)


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


def _sizes(q: Tensor) -> _Sizes:
    return _FP32_SIZES if q.dtype == torch.float32 else _HALF_SIZES


def _power(config: GuidanceConfig) -> tuple[float, int]:
    """``1 / (alpha - 1)``, and that as the kernels tell the cheap ones from others: 2, 1 or 0."""
    power = 1.0 / (config.alpha - 1.0)
    return power, int(power) if power in (1.0, 2.0) else 0


def _kind(q: Tensor, v: Tensor, config: GuidanceConfig) -> _Kind:
    return q.device, q.dtype, q.shape[3], v.shape[3], v.shape[2] > _sizes(q).keys_on_chip, _power(config)[1]


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
    from . import kernels

    batch, heads, queries, dim = q.shape
    keys, value_dim = v.shape[2:]
    if queries == 0:
        return
    sizes = _sizes(q)
    power, form = _power(config)
    mask_kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    settings: dict[str, Any] = {
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "DIM_TILES": tiles(dim, sizes.dim_tile),
        "VALUE_TILES": tiles(value_dim, sizes.dim_tile),
        "POWER": form,
        "STEPS": newton_steps(keys, power),
        "RULE": config.rule,
        "RELATIVE": config.norm_mode == "relative",
        "HAS_BASE": base is not None,
        "MASK": mask_kind,
        "JOINT": joint_lse is not None,
        "WIDE": q.dtype != torch.float16,
        "UPCAST": kernels.INTERPRETED and q.dtype == torch.bfloat16,
        "PRECISION": "tf32x3" if q.device.type == "cuda" and torch.version.hip is None else "ieee",
        "LIMIT": torch.finfo(out.dtype).max,
    }
    if keys <= sizes.keys_on_chip:
        kernel = kernels.guided_attention_kernel
        key_tiles = tiles(keys, sizes.key_tile)
        settings["KEY_TILES"] = key_tiles
        held = sum(width for _, width in key_tiles) + 2 * value_dim
    else:
        kernel = kernels.guided_attention_long_kernel
        blocks = -(-keys // sizes.key_tile)
        settings |= {
            "KEY_BLOCK": sizes.key_tile,
            "MOST_KEY_BLOCKS": 1 << (blocks - 1).bit_length(),
        }
        held = sizes.key_tile + settings["MOST_KEY_BLOCKS"] + 2 * value_dim
    block, warps = block_of_queries(held, sizes.most_queries)
    # Where there is no such tensor the kernel is given another one, which it does not read.
    tensors = (q, k, v, out, out if base is None else base, q if mask is None else mask)
    lse = q[..., 0] if joint_lse is None else joint_lse
    arguments = [part for tensor in (*tensors, lse) for part in (tensor, tensor.stride())]
    grid = (-(-queries // block) * batch * heads,)
    numbers = (power, config.guidance_scale, config.norm_threshold, config.orthogonal_scale, config.strength)
    with _on(q.device):
        kernel[grid](
            *arguments,
            heads,
            queries,
            keys,
            *map(_fp32, (scale, *numbers)),
            BLOCK=block,
            num_warps=warps,
            num_stages=sizes.stages,
            **settings,
        )


def block_of_queries(numbers_per_query: int, most: int) -> tuple[int, int]:
    """How many queries a program does, and with how many warps, if it holds so many fp32 numbers for each."""
    block = most if numbers_per_query <= 256 else min(most, 32)
    return block, 4 if block * numbers_per_query < 4 * _NUMBERS_PER_WARP else 8


def _fp32(number: float) -> float:
    """What does not fit into the kernel's fp32 becomes infinite, as it does in a tensor."""
    return math.copysign(math.inf, number) if abs(number) > torch.finfo(torch.float32).max else float(number)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels start on the current device, which need not be the tensor's."""
    if device.type == "cpu":
        return nullcontext()
    return torch.cuda.device(device) if device.type == "cuda" else torch.xpu.device(device)
