# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard of the kernels: a check of each compiled program against the eager path, and a memory of failures.

A compiler can make a program that runs and gives wrong numbers, and no exception tells of that. So before the first
call of each program a small problem is computed by the program and by :func:`gag_core.eager.guide`, in fp64 on the CPU.
The problem has the strides, dtypes and alignment of the call, which select the program. Its numbers are random, such
that each part of a program shows in the result: each key has weight in some row, and about half of the rows are capped.
In the call itself a fault could be hidden, for example behind a mask that hides the last keys of a short prompt.

A program that fails is off until the process ends, and no other program with it. Three kinds of errors are no fault
of a program: a lack of memory, which may pass; an error that another kernel left behind; an error that does not come
again.

The check waits for the card once. There is none after it, and none while a CUDA graph is captured: a call that is
captured uses a program only if the program was checked before.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import sys
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import eager
from ..config import GuidanceConfig
from ..echo import plain

log = logging.getLogger("comfyui-gag")

# A function with the arguments of :func:`gag_core.eager.guide`.
Guide = Callable[..., None]

# The size of the check: more than one block of queries, the last of them not full, and the stride between heads.
_QUERIES = 80
_HEADS = 2
# Distance of numbers near 1. Cards may round the factors of fp32 products to 11 bits or cut them off there (TF32).
_ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-9}
# Limits of the error over all rows and in the worst row, in units of the rounding. Programs that round weights and
# output to nearest stay below a third of them, those that cut bits off below four fifths.
_LIMIT = 1.5
_ROW_LIMIT = 6.0

_DRIVER_ERROR = re.compile(r"(cuda|hip|xpu|triton)( driver)? error|native api", re.IGNORECASE)


class Program:
    """One compiled program of a kernel path, and its state.

    Attributes:
        path: name of the path, such as ``"fused"``.
        description: its case, in words for messages.
        is_checked: True if it gave the right numbers.
        is_off: True if it failed, and must not be used again.
    """

    __slots__ = ("description", "is_checked", "is_off", "path")

    def __init__(self, path: str, description: str) -> None:
        self.path, self.description = path, description
        self.is_checked = self.is_off = False


_programs: dict[tuple[str, Hashable], Program] = {}
_warned: set[tuple[str, torch.device, str]] = set()


def program(path: str, key: Hashable, description: str) -> Program:
    """Return the program of a kernel path by its key: all that the compiler makes a binary of its own for."""
    return _programs.setdefault((path, key), Program(path, description))


_check_context: Callable[[], AbstractContextManager[object]] = nullcontext


def check_within(context: Callable[[], AbstractContextManager[object]]) -> None:
    """Let each check from now on, and with it the first compilation of a program, run within ``context()``.

    A host that keeps account of a model's allocations can so leave out those of a check.
    """
    global _check_context
    _check_context = context


def attempt(
    program: Program,
    start: Callable[[], None],
    kernel: Guide,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    base: Tensor | None,
    mask: Tensor | None,
    joint_lse: Tensor | None,
) -> bool:
    """Compute a call by a program, if the program can be trusted.

    Args:
        program: the program that the call uses.
        start: does the call. It must write to ``out`` only at its end, because ``out`` and ``base`` may be one tensor.
        kernel: the same kernel with other arguments, those of :func:`gag_core.eager.guide`. It is called with tensors
            of the same strides, dtypes and alignment, and must use the same program for them.
        out, q, k, v, config, base, mask, joint_lse: arguments of the call, as in :func:`gag_core.eager.guide`.

    Returns:
        True if ``out`` was written. If False, ``out`` is as before, and the caller takes the next path.

    Raises:
        RuntimeError: the card reports an error that would stop any other path too.
    """
    if not program.is_checked:
        if program.is_off or _is_capturing(q.device):
            return False

        def check() -> None:
            difference = _difference(kernel, out, q, k, v, config, base, mask, joint_lse)
            if difference is None:
                program.is_checked = True
            else:
                _turn_off_for_wrong_numbers(program, q.device, difference)

        with _check_context():
            _wait(q.device)  # an error that another kernel left behind is raised here
            _try(check, program, q.device)
        if not program.is_checked:
            return False
    return _try(start, program, q.device)


def _try(action: Callable[[], None], program: Program, device: torch.device, *, is_second: bool = False) -> bool:
    """Do the action, and return True if it was done. If not, and the program is to blame for it, turn the program off.

    Errors of the driver may be those of another kernel: they are reported late, and some of them only once.
    """
    try:
        action()
        return True
    except Exception as raised:  # compilers, drivers and cards can raise anything
        error = raised
    if _is_out_of_memory(error):
        return False
    if _DRIVER_ERROR.search(str(error)) and not is_second:
        if _is_capturing(device):
            raise error  # it has ended the capture
        try:
            _wait(device)
        except Exception:  # drivers can raise anything; it is raised again below
            # The card takes no more work from this process. There was no error before the check, so the program of a
            # check is to blame. Later anything may be.
            if not program.is_checked:
                _turn_off_for_error(program, device, error)
            raise
        return _try(action, program, device, is_second=True)
    _turn_off_for_error(program, device, error)
    return False


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "out of memory" in str(error).lower()


def _is_capturing(device: torch.device) -> bool:
    """Return True if the work of this thread is recorded in a CUDA graph, and not done."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _wait(device: torch.device) -> None:
    """Wait until the card has done its work; raises errors of that work."""
    if device.type != "cpu":
        getattr(torch, device.type).current_stream(device).synchronize()


class _Difference(NamedTuple):
    """An error and its limit, relative to the size of guidance and read-out."""

    error: float
    limit: float


class _Problem(NamedTuple):
    """The tensors of a check."""

    q: Tensor
    k: Tensor
    v: Tensor
    base: Tensor | None
    mask: Tensor | None
    joint_lse: Tensor | None

    def solve(self, guide: Guide, out: Tensor, config: GuidanceConfig) -> Tensor:
        """Let ``guide`` write to ``out``, and return it."""
        q, k, v, base, mask, joint_lse = self
        guide(out, q, k, v, config, base=base, mask=mask, scale=q.shape[3] ** -0.5, joint_lse=joint_lse)
        return out

    def in_fp64(self) -> _Problem:
        """Copy the numbers exactly to the CPU."""
        base = None if self.base is None else _fp64(self.base)
        mask = None if self.mask is None else self.mask.cpu() if self.mask.dtype == torch.bool else _fp64(self.mask)
        joint_lse = None if self.joint_lse is None else _fp64(self.joint_lse)
        return _Problem(_fp64(self.q), _fp64(self.k), _fp64(self.v), base, mask, joint_lse)


def _difference(
    kernel: Guide,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    base: Tensor | None,
    mask: Tensor | None,
    joint_lse: Tensor | None,
) -> _Difference | None:
    """Solve a problem like the given call by the kernel and by the eager path; return None if they agree."""
    heads, queries, value_dim = min(_HEADS, q.shape[1]), min(_QUERIES, q.shape[2]), v.shape[3]
    # About the length of the guidance vectors relative to S. Each number of S is about 0.6.
    threshold = 0.7 * math.sqrt(config.alpha - 1.0)
    config = dataclasses.replace(
        config,
        guidance_scale=2.0,
        norm_threshold=threshold if config.norm_mode == "relative" else 0.6 * threshold * math.sqrt(value_dim),
        orthogonal_scale=0.5 if config.orthogonal_scale else 0.0,
        strength=1.0,
    )
    problem = _problem(q, k, v, base, mask, joint_lse, heads, queries)
    unwritten = torch.full((1, heads, queries, value_dim), math.nan, dtype=torch.float64, device="cpu")
    result = _fp64(problem.solve(kernel, _laid_out_as(out, unwritten), config))

    exact = problem.in_fp64()
    expected = exact.solve(eager.guide, unwritten.clone(), config)
    size = _root_mean_square(expected if exact.base is None else expected - exact.base)
    if exact.base is not None:
        read_out = exact._replace(base=None, joint_lse=None)
        size += _root_mean_square(read_out.solve(eager.guide, unwritten, dataclasses.replace(config, strength=0.0)))
    error, rounding = result - expected, _ROUNDING[q.dtype]
    over_all = _Difference(_root_mean_square(error) / size, _LIMIT * rounding)
    worst_row = _Difference(float(error.norm(dim=-1).max()) / size, _ROW_LIMIT * rounding)
    return next((found for found in (over_all, worst_row) if not found.error <= found.limit), None)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor | None,
    mask: Tensor | None,
    joint_lse: Tensor | None,
    heads: int,
    queries: int,
) -> _Problem:
    """Make a problem like that of the given tensors, with one batch row."""
    # A generator of its own, because the random numbers of the process make the user's pictures.
    random = torch.Generator("cpu").manual_seed(0)
    keys, dim, value_dim = k.shape[2], k.shape[3], v.shape[3]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64, device="cpu")

    if base is not None:
        base = _laid_out_as(base, 0.25 * normal(1, heads, queries, value_dim))
    if mask is not None:
        readable = uniform(1, heads, queries, keys) < 0.7
        readable[..., 0] = True
        values = readable if mask.dtype == torch.bool else normal(*readable.shape).masked_fill(~readable, -math.inf)
        mask = _laid_out_as(mask.expand(*q.shape[:3], keys), values)
    if joint_lse is not None:
        # The logsumexp of the text is about log(keys) + 2, so the text has a fifth to all of the mass.
        joint_lse = _laid_out_as(joint_lse, math.log(keys) + 2.0 + uniform(1, heads, queries))
    return _Problem(
        _laid_out_as(q, 2.0 * normal(1, heads, queries, dim)),  # logits have a standard deviation of 2
        _laid_out_as(k, normal(1, heads, keys, dim)),
        _laid_out_as(v, normal(1, heads, keys, value_dim)),
        base,
        mask,
        joint_lse,
    )


def _fp64(tensor: Tensor) -> Tensor:
    return tensor.cpu().double()


def _root_mean_square(rows: Tensor) -> float:
    """Return the root of the mean square of the norms of the rows."""
    return float(rows.square().sum(-1).mean().sqrt())


def _laid_out_as(like: Tensor, values: Tensor) -> Tensor:
    """Copy values to a tensor that a program is compiled for as it is for ``like``: dtype, strides and alignment.

    Args:
        like: a tensor of a call.
        values: of the same rank, with sizes of at most those of ``like``, on the CPU. Where ``like`` repeats one number
            along a dimension (stride 0), the first is repeated.

    Returns:
        A tensor with the sizes of ``values``. Memory between its elements is NaN, so that reading it shows.
    """
    repeated = values.shape
    values = values[tuple(slice(1 if stride == 0 else None) for stride in like.stride())]
    offset = like.data_ptr() % 16 // like.dtype.itemsize
    size = offset + 1 + sum((length - 1) * stride for length, stride in zip(values.shape, like.stride(), strict=True))
    memory = torch.full((size,), True if like.dtype == torch.bool else math.nan, dtype=like.dtype, device=like.device)
    tensor = memory.as_strided(values.shape, like.stride(), offset)
    tensor.copy_(values)
    return tensor.expand(repeated)


def _turn_off_for_wrong_numbers(program: Program, device: torch.device, difference: _Difference) -> None:
    if _turn_off(program, device, "wrong numbers"):
        log.warning(
            "GAG's %s kernel gives wrong numbers on %s, so it is not used for such calls: the picture is right, but it "
            "takes longer. In the check it was off by %s, where rounding explains %s. Case: %s. Update torch and the "
            "driver if you can, and please report this line to us. GAG_KERNELS=eager in the environment turns all "
            "kernels off.",
            program.path,
            _card_and_versions(device),
            _percent(difference.error),
            _percent(difference.limit),
            program.description,
        )


def _percent(value: float) -> str:
    return f"{100.0 * value:.2g}%" if math.isfinite(value) else "numbers that are not finite"


def _turn_off_for_error(program: Program, device: torch.device, error: Exception) -> None:
    if _turn_off(program, device, type(error).__name__):
        text = plain(error, 2000).replace("\\n", " ")  # compilers write many lines
        log.warning(
            "GAG's %s kernel does not work on %s, so it is not used for such calls: the same picture, slower. "
            "Reason: %s. Case: %s. Please report this line to us. GAG_KERNELS=eager in the environment turns all "
            "kernels off.",
            program.path,
            _card_and_versions(device),
            plain(" ".join(f"{type(error).__name__}: {text}".split()), 300),
            program.description,
        )


def _turn_off(program: Program, device: torch.device, cause: str) -> bool:
    """Turn the program off; return True if it is the first of its path on this device that fails for this cause.

    Users hear of the first. All are in the log for developers.
    """
    program.is_off, program.is_checked = True, False
    log.debug("GAG's %s kernel is off for %s on %s: %s", program.path, program.description, device, cause)
    is_first = (program.path, device, cause) not in _warned
    _warned.add((program.path, device, cause))
    return is_first


def _card_and_versions(device: torch.device) -> str:
    module: Any = getattr(torch, device.type, None)
    try:
        name = f"{plain(module.get_device_name(device))}, {device}"
    except Exception:  # a CPU, or a card that has failed
        name = str(device)
    triton_version = plain(getattr(sys.modules.get("triton"), "__version__", "unknown"))
    return f"{name} (torch {torch.__version__}, Triton {triton_version})"
