# SPDX-License-Identifier: GPL-3.0-or-later
"""Choice of the implementation for a call: the fused kernel, the row kernels, or plain torch.

The table follows from what was compiled without a card (``python dev.py run benchmarks.speed.kernel_matrix``): the row
kernels for nearly every card by every minor version of Triton that is in the table, the fused kernel for NVIDIA's cards
from 3.3 on. The rest is inferred: a version that was not tried counts as the newest older one that was, and a card as
its relatives. A program that compiles but spills more than 128 bytes of a thread's registers to memory is never
chosen. What the table does not know is computed by plain torch. The environment variable GAG_KERNELS chooses otherwise:
``auto`` (the table), ``fused``, ``row`` or ``eager``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import eager
from ..config import GuidanceConfig
from ..echo import echo
from . import environment, installation, launch, row
from .environment import PATHS as PATHS
from .environment import Path as Path

# A program may spill so many bytes of a thread's registers to memory.
MOST_SPILLED = 128

_RULES = ("gag", "pladis")
# Below this alpha a large power magnifies rounding in fp32 until it shows; see entmax.py.
_LEAST_ALPHA = 1.05
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Line(NamedTuple):
    """A line of the table.

    Attributes:
        cards: pattern of the names of the cards, ``sm_80`` for NVIDIA's compute capability 8.0, ``gfx1100`` for AMD.
        triton: the oldest version of Triton for which the line holds.
        fused: largest number of fp32 numbers for each query, its logits and both read-outs, for which the fused kernel
            is chosen; 0 for none.
        keys, keys_fp32: largest number of keys for which it is chosen, in half precision and in fp32.
        row: dtypes of the row kernels.
    """

    cards: str
    triton: tuple[int, int]
    fused: float
    keys: float
    keys_fp32: int
    row: tuple[torch.dtype, ...]


_ALL = _DTYPES
_NO_BF16 = (torch.float16, torch.float32)
# For each card the first line that fits counts.
_TABLE = (
    _Line("sm_8[0-9]|sm_90|sm_1[0-2][0-9]", (3, 3), fused=math.inf, keys=math.inf, keys_fp32=128, row=_ALL),
    _Line("sm_8[0-9]|sm_90", (3, 0), fused=0, keys=0, keys_fp32=0, row=_ALL),
    _Line("sm_7[0-5]", (3, 3), fused=0, keys=0, keys_fp32=0, row=_ALL),
    _Line("sm_7[0-5]", (3, 0), fused=0, keys=0, keys_fp32=0, row=_NO_BF16),
    # Triton 3.9 refuses these cards.
    _Line("gfx103.", (3, 9), fused=0, keys=0, keys_fp32=0, row=()),
    _Line("gfx11..", (3, 7), fused=206, keys=80, keys_fp32=80, row=_ALL),
    _Line("gfx90a|gfx94.|gfx103.|gfx11..|gfx12..", (3, 0), fused=0, keys=0, keys_fp32=0, row=_ALL),
)


def path_for(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, keys: int, config: GuidanceConfig
) -> Path:
    """Return the implementation for a call with these sizes.

    Args:
        device, dtype: of queries, keys and values.
        head_dim: head dimension of queries and keys.
        value_dim: head dimension of values.
        keys: number of keys.
        config: the settings.
    """
    if device.type not in ("cuda", "xpu"):
        return "eager"
    wanted = environment.wanted()
    if wanted == "auto":
        return path_by_line(_line_of(device), dtype, head_dim, value_dim, keys, config)
    for path in PATHS:
        if path == wanted and supports(path, dtype, head_dim, value_dim, config):
            return path
    return "eager"


def path_by_line(
    index: int | None, dtype: torch.dtype, head_dim: int, value_dim: int, keys: int, config: GuidanceConfig
) -> Path:
    """Return the path that a line of the table has for a call; the other arguments are those of :func:`path_for`."""
    if index is None:
        return "eager"
    line = _TABLE[index]
    fused = supports("fused", dtype, head_dim, value_dim, config)
    fused = fused and keys <= (line.keys_fp32 if dtype == torch.float32 else line.keys)
    if fused and launch.numbers_of_query(keys, value_dim, dtype) <= line.fused:
        return "fused"
    if dtype in line.row and supports("row", dtype, head_dim, value_dim, config):
        return "row"
    return "eager"


def guide_by(path: Path) -> Callable[..., None]:
    """Return a function with the arguments of :func:`gag_core.eager.guide` that uses this implementation and no other.

    For benchmarks and tests, as the argument of :func:`gag_core.attention.use_implementation`.

    Raises:
        ValueError: there is no such path. The function raises it where the path does not support a call.
        RuntimeError: by the function, where this path cannot run on the device. Other errors are those of the path.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(map(repr, PATHS))}, got {echo(path)}.")

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
        if path == "eager":
            eager.guide(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)
            return
        if (reason := cannot_run(path, q.device)) is not None:
            raise RuntimeError(f"Path '{path}' cannot run on {q.device}: {reason}. Path 'eager' runs everywhere.")
        if not supports(path, q.dtype, q.shape[3], v.shape[3], config):
            raise ValueError(
                f"Path '{path}' needs rule 'gag' or 'pladis', alpha from {_LEAST_ALPHA}, norms per head, fp16, bf16 or "
                f"fp32 and head dimensions up to {_MAX_HEAD_DIM[path]}, got {config.rule}, alpha {config.alpha}, "
                f"merge_heads {config.merge_heads}, {q.dtype} and {q.shape[3]}. Path 'eager' computes everything."
            )
        run = launch._launch if path == "fused" else row.launch
        run(out, q, k, v, config, base, mask, scale, joint_lse)

    return guide


def cannot_run(path: Path, device: torch.device) -> str | None:
    """Return the reason why a path cannot run on a device, or None. A program may still fail to compile."""
    if path == "eager":
        return None
    if triton_version() is None:
        return "Triton is not installed, or cannot be imported"
    if device.type not in ("cuda", "xpu") and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for NVIDIA's, AMD's and Intel's GPUs only"
    return None


_MAX_HEAD_DIM = {"fused": launch.MAX_HEAD_DIM, "row": row.MAX_HEAD_DIM}


def supports(path: Path, dtype: torch.dtype, head_dim: int, value_dim: int, config: GuidanceConfig) -> bool:
    """Return True if a path computes such a call, on a device where it can run."""
    if path == "eager":
        return True
    return (
        dtype in _DTYPES
        and config.rule in _RULES
        and config.alpha >= _LEAST_ALPHA
        and not config.merge_heads
        and max(head_dim, value_dim) <= _MAX_HEAD_DIM[path]
    )


def _line_of(device: torch.device) -> int | None:
    """Return the index of the line for a device, or None for one that the table does not know."""
    return _known_line_of(device)


# A compiled graph takes the results of these as constants; so that of _line_of is a number, and not a line itself. This
# is what torch.compiler.assume_constant_result does, but that would import all of torch's compiler.
for _function in (environment.wanted, _line_of):
    vars(_function)["_dynamo_marked_constant"] = True


@lru_cache(maxsize=64)
def _known_line_of(device: torch.device) -> int | None:
    version = triton_version()
    return None if version is None else line_for(card_of(device), version)


def line_for(card: str, version: tuple[int, int]) -> int | None:
    """Return the index of the line for a card and a version of Triton, or None if there is none."""
    fitting = (i for i, line in enumerate(_TABLE) if re.fullmatch(line.cards, card) and version >= line.triton)
    return next(fitting, None)


def card_of(device: torch.device) -> str:
    """Return the name of a card as the table has it; "unknown" for others than NVIDIA's and AMD's."""
    if device.type != "cuda":
        return "unknown"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    # ZLUDA lets AMD's cards pass for NVIDIA's, but Triton's programs for these do not run there.
    if "ZLUDA" in torch.cuda.get_device_name(device):
        return "unknown"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | None:
    """Return the version of Triton, major and minor; None if there is no Triton that makes kernels."""
    return installation.version() if installation.is_usable() else None
