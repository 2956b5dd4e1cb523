# SPDX-License-Identifier: GPL-3.0-or-later
"""Watches an attn2 replacement of another node: which part of the text that it was handed does it read?

A replacement may read all of the text (image adapters), some of its tokens (regional prompts), or texts of its own. It
may call any attention function. But each of them passes the keys to operations of torch, which a mode of torch sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Operations with which attention functions read keys: products, and copies in another layout or dtype. Others, such as
# a multiplication by a weight, make another text of the keys.
_READING = {
    *("reshape", "contiguous", "clone", "to", "flatten", "float", "half", "bfloat16", "type", "repeat_interleave"),
    *("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
}


class ReadTokens(TorchFunctionMode):
    """Records the tokens of some keys ``[B, N, C]`` that operations read while the mode is on."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        batch, self._tokens, width = keys.shape
        self._memory = memory_of(keys)
        self._first, self._row, self._token = keys.storage_offset(), keys.stride(0), keys.stride(1)
        self._numbers = batch * width
        self._read: list[slice] = []
        self._viewed: list[slice] = []

    @property
    def ranges(self) -> list[slice]:
        """Ranges of tokens that were read, in their order.

        Attention of other packs may take a view of the keys to a kernel of its own, which is no operation of torch. So
        a view of all tokens counts if nothing else was read. Keys without memory cannot be watched, and count as read.
        """
        if self._memory is None:
            return [slice(0, self._tokens)]
        return self._read or [part for part in self._viewed if part == slice(0, self._tokens)][:1]

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and record the part of the keys that it reads or views."""
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        for tensor in _tensors((args, kwargs)):
            if not self._is_part(tensor):
                continue
            if isinstance(out, Tensor) and self._is_part(out):
                self._record(out, self._viewed)
            elif name in _READING:
                self._record(tensor, self._read)
        return out

    def _is_part(self, tensor: Tensor) -> bool:
        return self._memory is not None and tensor.layout == torch.strided and memory_of(tensor) == self._memory

    def _record(self, part: Tensor, ranges: list[slice]) -> None:
        offset = part.storage_offset() - self._first
        first = (offset % self._row if self._row else offset) // max(self._token, 1)
        count = min(part.numel() // self._numbers, self._tokens - first)
        tokens = slice(first, first + count)
        if count > 0 and tokens not in ranges:
            ranges.append(tokens)


def memory_of(tensor: Tensor) -> int | None:
    """Return the address of a tensor's memory; None for a tensor without one, as in a transform of torch.func."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


def _tensors(value: Any) -> Iterable[Tensor]:
    """Yield the tensors among the arguments of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
