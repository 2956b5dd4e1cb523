# SPDX-License-Identifier: GPL-3.0-or-later
"""Compiled kernels that are kept, because Triton's own launch looks each of them up anew.

An ordinary launch, ``kernel[grid](...)``, binds all arguments, finds out what the compiler would use of them, and makes
a key of that: 20 to 50 microseconds. ``kernel.warmup(...)`` returns the compiled kernel, and ``compiled[grid](...)``
starts it in 4, as in Triton's tutorial on the fused softmax. The caller must then know itself which arguments need
another compiled kernel: see :func:`pointer_kinds`. Numbers in strides and compile-time arguments belong to it too.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import installation

log = logging.getLogger("comfyui-gag")

# Before 3.3 a compiled kernel takes no compile-time arguments.
_FIRST_VERSION = (3, 3)
# Triton aligns pointers and integers to so many bytes.
_ALIGNMENT = 16
# AMD's compiler uses other instructions for tensors in small memory.
_LARGEST_OFFSET = 2**31 - 1

_can_keep = True


class Kept(NamedTuple):
    """A compiled kernel and its grid. ``run(*arguments, *constants)`` starts it on the current device and stream.

    Attributes:
        run: the function that starts it.
        constants: the compile-time arguments.
    """

    run: Callable[..., object]
    constants: tuple[Any, ...]


def pointer_kinds(tensors: Sequence[Tensor]) -> Hashable:
    """Return all that Triton's compiler uses of pointers, and their device: dtypes, alignment, on AMD size."""
    together = 0
    for tensor in tensors:
        together |= tensor.data_ptr()
    # Nearly always all pointers are aligned.
    misaligned = together % _ALIGNMENT and tuple(tensor.data_ptr() % _ALIGNMENT != 0 for tensor in tensors)
    dtypes = tuple([tensor.dtype for tensor in tensors])
    if torch.version.hip is None:
        return tensors[0].device.index, dtypes, misaligned
    sizes = tuple(tensor.untyped_storage().size() <= _LARGEST_OFFSET for tensor in tensors)
    return tensors[0].device.index, dtypes, misaligned, sizes


def integer_kind(number: int) -> Hashable:
    """Return all that Triton's compiler uses of an integer argument."""
    return number == 1, number % _ALIGNMENT == 0, has_32_bits(number)


def has_32_bits(number: int) -> bool:
    """Return True if an integer argument has 32 bits: that is all that the compiler uses of one that varies."""
    return -(2**31) <= number < 2**31


def start(kernel: Any, grid: tuple[int, ...], settings: dict[str, Any], arguments: Sequence[Any]) -> Kept:
    """Compile a kernel for these arguments if need be, start it, and return how to start it again.

    Where Triton is not as known here, and in its interpreter, kernels are started in the ordinary way.

    Args:
        kernel: a function decorated with ``triton.jit``, whose compile-time arguments come last.
        grid: up to three numbers of programs.
        settings: the compile-time arguments and the options of the compiler.
        arguments: all other arguments of the kernel, by position.
    """
    global _can_keep
    ordinary = Kept(partial(kernel[grid], **settings), ())
    problem = None
    if _can_keep:
        try:
            kept = _kept(kernel, grid, settings, arguments)
            if kept is not None:
                kept.run(*arguments, *kept.constants)
                return kept
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = error
    ordinary.run(*arguments)
    if problem is not None:  # the arguments are right, then
        _can_keep = False
        log.debug("GAG keeps no compiled kernels with this Triton: %r", problem)
    return ordinary


def _kept(kernel: Any, grid: tuple[int, ...], settings: dict[str, Any], arguments: Sequence[Any]) -> Kept | None:
    """Return the compiled kernel for these arguments, or None where Triton has none."""
    import triton

    version = installation.version()
    if version is None or version < _FIRST_VERSION:
        return None
    compiled = kernel.warmup(*arguments, grid=grid, **settings)
    if not isinstance(compiled, triton.compiler.CompiledKernel):
        return None
    names = list(inspect.signature(kernel.fn).parameters)[len(arguments) :]
    return Kept(compiled[(*grid, 1, 1)[:3]], tuple(settings[name] for name in names))
