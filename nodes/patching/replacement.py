# SPDX-License-Identifier: GPL-3.0-or-later
"""The tokens that an attn2 replacement of another node reads, of the text that it was handed.

A replacement may read all of the text (image adapters), some of its tokens or other tokens for each query (regional
prompts), or texts of its own. It may call any attention function. But each of them passes the keys to operations of
torch, which a mode of torch sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Operations with which attention functions read keys: products, and copies in another layout or dtype. Others, such as
# a multiplication by a weight, make another text of the keys.
_READING = {
    *("reshape", "contiguous", "clone", "to", "flatten", "float", "half", "bfloat16", "type", "repeat_interleave"),
    *("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
}
# Operations that mask the logits of an attention.
_MASKING = {"masked_fill", "masked_fill_"}


class Read(NamedTuple):
    """Tokens that an attention reads, and its mask: None or of rank 4, for these tokens."""

    tokens: slice
    mask: Tensor | None = None


class ReadTokens(TorchFunctionMode):
    """Records the tokens of some keys ``[B, N, C]`` that operations read while the mode is on, and the masks on them.

    Args:
        keys: keys of the text.
        queries: number of queries of each row.
    """

    def __init__(self, keys: Tensor, queries: int) -> None:
        super().__init__()
        self._batch, self._tokens, width = keys.shape
        self._queries = queries
        self._memory = memory_of(keys)
        self._first, self._row, self._token = keys.storage_offset(), keys.stride(0), keys.stride(1)
        self._numbers = self._batch * width
        self._read: list[Read] = []
        self._viewed: list[Read] = []
        # True while masks belong to the tokens that were read last.
        self._is_first_reading = False

    @property
    def reads(self) -> list[Read]:
        """Ranges of tokens that were read, in their order.

        Attention of other packs may take a view of the keys to a kernel of its own, which is no operation of torch. So
        a view of all tokens counts if nothing else was read. Keys without memory cannot be watched, and count as read.
        """
        whole = slice(0, self._tokens)
        if self._memory is None:
            return [Read(whole)]
        return self._read or [part for part in self._viewed if part.tokens == whole][:1]

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
                self._is_first_reading = self._record(tensor, self._read)
                if name == "scaled_dot_product_attention":
                    self._add_mask((kwargs or {}).get("attn_mask", args[3] if len(args) > 3 else None))
                    self._is_first_reading = False  # it has no logits that could be masked later
        if name in _MASKING and len(args) > 1 and self._are_logits(args[0]):
            self._add_mask(args[1].logical_not().expand(args[0].shape))
        return out

    def _is_part(self, tensor: Tensor) -> bool:
        return self._memory is not None and tensor.layout == torch.strided and memory_of(tensor) == self._memory

    def _are_logits(self, tensor: Tensor) -> bool:
        """Return True for a tensor of the shape of the logits of the tokens that were read last."""
        if not self._is_first_reading:
            return False
        tokens = self._read[-1].tokens
        return tensor.ndim in (3, 4) and tensor.shape[-2:] == (self._queries, tokens.stop - tokens.start)

    def _add_mask(self, mask: Any) -> None:
        """Add a mask to the tokens that were read last, unless an earlier reading of them had none or another."""
        if not isinstance(mask, Tensor) or not self._is_first_reading:
            return
        last = self._read[-1]
        if mask.ndim == 3 and mask.shape[0] % self._batch == 0:  # rows and heads in one dimension
            mask = mask.reshape(self._batch, -1, *mask.shape[1:])
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        rows, _, queries, tokens = mask.shape[-4:]
        sizes = (self._batch, self._queries, last.tokens.stop - last.tokens.start)
        if mask.ndim == 4 and all(one in (1, size) for one, size in zip((rows, queries, tokens), sizes, strict=True)):
            self._read[-1] = last._replace(mask=mask if last.mask is None else last.mask & mask)

    def _record(self, part: Tensor, reads: list[Read]) -> bool:
        """Record the tokens of a part of the keys; return True if they were not read before."""
        offset = part.storage_offset() - self._first
        first = (offset % self._row if self._row else offset) // max(self._token, 1)
        count = min(part.numel() // self._numbers, self._tokens - first)
        tokens = slice(first, first + count)
        is_new = count > 0 and all(tokens != read.tokens for read in reads)
        if is_new:
            reads.append(Read(tokens))
        return is_new


def memory_of(tensor: Tensor) -> int | None:
    """Return the address of a tensor's memory; None for a tensor without one, as in a transform of torch.func."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # which of the two depends on the torch version and the transform
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
