# SPDX-License-Identifier: GPL-3.0-or-later
"""Compiled kernels that are kept, because Triton's own launch looks each of them up anew.

An ordinary launch, ``kernel[grid](...)``, binds all arguments, finds out what the compiler would use of them, and makes
a key of that: 20 to 50 microseconds. ``kernel.warmup(...)`` returns the compiled kernel, and ``compiled[grid](...)``
starts it in 4, as in Triton's tutorial on the fused softmax. :class:`Kernel` does so, for both kinds of kernels. Its
caller must then know itself which arguments need another compiled kernel: see :func:`pointer_kinds`. Numbers in strides
belong to it too.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Hashable, Sequence
from typing import Any

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

Grid = tuple[int, int, int]

_can_keep = True


class Kernel:
    """A kernel with its compile-time arguments, which keeps what Triton compiles of it.

    Attributes:
        function: the function decorated with ``triton.jit``, whose compile-time arguments come last.
        settings: the compile-time arguments and the options of the compiler.
    """

    __slots__ = ("_kept", "function", "settings")

    def __init__(self, function: Any, settings: dict[str, Any]) -> None:
        self.function, self.settings = function, settings
        self._kept: dict[Hashable, _Kept] = {}

    def start(self, kinds: Hashable, grid: Grid, arguments: Sequence[Any]) -> None:
        """Start the kernel on the current device and stream, and compile it first if need be.

        Where Triton is not as known here, and in its interpreter, the kernel is started in the ordinary way.

        Args:
            kinds: all that the compiler uses of the arguments and that differs between calls of this object.
            grid: the numbers of programs.
            arguments: all arguments that are not known at compile time, by position.
        """
        kept = self._kept.get(kinds)
        if kept is None:
            # A kernel whose first start fails is not kept, because a lack of memory passes.
            self._kept[kinds] = self._first_start(grid, arguments)
        else:
            kept.start(grid, arguments)

    def _first_start(self, grid: Grid, arguments: Sequence[Any]) -> _Kept:
        """Compile the kernel for these arguments if need be, start it, and return how to start it again."""
        global _can_keep
        ordinary = _Kept(self.function, (), self.settings)
        problem = None
        if _can_keep:
            try:
                kept = self._compiled(grid, arguments)
                if kept is not None:
                    kept.start(grid, arguments)
                    return kept
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                problem = error
        ordinary.start(grid, arguments)
        if problem is not None:  # the arguments are right, then
            _can_keep = False
            log.debug("GAG keeps no compiled kernels with this Triton: %r", problem)
        return ordinary

    def _compiled(self, grid: Grid, arguments: Sequence[Any]) -> _Kept | None:
        """Return the compiled kernel for these arguments, or None where Triton has none."""
        import triton

        version = installation.version()
        if version is None or version < _FIRST_VERSION:
            return None
        compiled = self.function.warmup(*arguments, grid=grid, **self.settings)
        if not isinstance(compiled, triton.compiler.CompiledKernel):
            return None
        names = list(inspect.signature(self.function.fn).parameters)[len(arguments) :]
        return _Kept(compiled, tuple(self.settings[name] for name in names), {})


class _Kept:
    """An object of Triton's that starts a kernel, and the arguments that it takes in each call.

    Attributes:
        program: a compiled kernel, or in the ordinary way the function decorated with ``triton.jit``.
        constants: the compile-time arguments by position.
        settings: the compile-time arguments and the options of the compiler by name.
    """

    __slots__ = ("_launcher", "constants", "program", "settings")

    def __init__(self, program: Any, constants: tuple[Any, ...], settings: dict[str, Any]) -> None:
        self.program, self.constants, self.settings = program, constants, settings
        # The last grid, and what the program gives for it. One attribute, because threads may start one kernel at once.
        self._launcher: tuple[Grid, Any] | None = None

    def start(self, grid: Grid, arguments: Sequence[Any]) -> None:
        """Start the kernel on the current device and stream."""
        launcher = self._launcher
        if launcher is None or launcher[0] != grid:
            launcher = self._launcher = (grid, self.program[grid])
        launcher[1](*arguments, *self.constants, **self.settings)


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
