# SPDX-License-Identifier: GPL-3.0-or-later
"""Count of the launches on a card, and of the bytes that they move, from the shapes of the tensors alone.

    python dev.py run benchmarks.speed.launches

prints both for guided text attentions of models, without a card: the tensors lie on torch's device "meta", which
computes nothing. They are those of a card with a torch that multiplies half-precision matrices with a result in fp32.
The plain path is that of the CPU, in the chunks of a card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gag_core
from benchmarks.speed.memory import MIB, StorageTracker
from gag_core import eager, numerics

# Operations that launch nothing, although their schemas say that they make a tensor of their own.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "scalar_tensor")
# Operations that read no element of these arguments.
_UNREAD = {"copy_": "self", "fill_": "self", "zero_": "self", "new_full": "self", "ones_like": "self"}


class LaunchCounter(TorchDispatchMode):
    """Count the operations inside a ``with`` block that are neither views nor allocations.

    Attributes:
        launches: number of these operations. A few of torch's operations, such as logsumexp, launch more than one
            kernel; they count once.
        bytes: the bytes that they read and write. An operation reads each of its inputs once, and elements that share
            one place in memory count once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema  # type: ignore[attr-defined]
        name = schema.name.removeprefix("aten::")
        named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
        written = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
        is_view = not written and any(returned.alias_info for returned in schema.returns)
        if name in _FREE or is_view:
            return result
        outputs = written[0].name if written else ""
        read = [value for key, value in named.items() if key != outputs and key != _UNREAD.get(name)]
        if written and not written[0].kwarg_only and name not in _UNREAD:
            read.append(named[outputs])  # an operation in place reads its tensor too
        if name == "gather":
            read = [result, named["index"]]
        self.launches += 1
        self.bytes += sum(map(size, tree_leaves((read, named[outputs] if written else result))))
        return result


def size(tensor: object) -> int:
    """Return the bytes of a tensor, without those that an expanded axis repeats; 0 for anything else."""
    if not isinstance(tensor, Tensor):
        return 0
    return tensor.element_size() * math.prod(
        length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride
    )


class Call(NamedTuple):
    """The text attention of a model, as ComfyUI calls it.

    ``joint`` is True where the text is part of a joint attention, whose output guidance is added to.
    """

    model: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    dtype: torch.dtype
    joint: bool = False

    def __str__(self) -> str:
        return f"{self.model}: {self.queries} x {self.keys}, {self.heads} heads of {self.dim}, batch {self.batch}"


CALLS = (
    Call("SDXL", 2, 10, 4096, 77, 64, torch.float16),
    Call("SDXL", 2, 20, 1024, 77, 64, torch.float16),
    Call("Flux", 1, 24, 4096, 512, 128, torch.bfloat16, joint=True),
    Call("Wan at 480p", 1, 12, 32760, 512, 128, torch.bfloat16),
)


class Count(NamedTuple):
    """Launches and bytes of a guided attention, and the largest number of bytes that it holds at once."""

    launches: int
    bytes: int
    peak: int


@contextmanager
def wide_products_on_meta(available: bool) -> Iterator[None]:
    """Let device "meta" multiply half-precision matrices with a result in fp32, as CUDA does, or not.

    torch's "meta" has this product without the factor alone, which moves as many bytes.
    """

    def multiply(a: Tensor, b: Tensor, factor: float, out: Tensor) -> None:
        torch.bmm(a, b, out_dtype=torch.float32, out=out)

    has_products = mock.patch.object(numerics, "_multiplies_wide", lambda device, dtype: available)
    with has_products, mock.patch.object(numerics, "multiply_wide", multiply):
        yield


def count(call: Call, *, on_card: bool = True, wide_products: bool = True) -> Count:
    """Count one guided call.

    Args:
        call: the call.
        on_card: False for the plain path.
        wide_products: False for a torch or a device that multiplies half-precision matrices with a result in half
            precision alone.
    """

    def tensor(tokens: int) -> Tensor:
        merged = torch.empty(call.batch, tokens, call.heads, call.dim, dtype=call.dtype, device="meta")
        return merged.transpose(1, 2)

    q, k, v, out = map(tensor, (call.queries, call.keys, call.keys, call.queries))
    base = tensor(call.queries) if call.joint else None
    lse = torch.empty(call.batch, call.heads, call.queries, device="meta") if call.joint else None

    def guide() -> None:
        eager.guide(
            out, q, k, v, gag_core.GuidanceConfig(), base=base, mask=None, scale=call.dim**-0.5, joint_lse=lse,
            on_card=on_card,
        )  # fmt: skip

    products = wide_products_on_meta(wide_products)
    with torch.no_grad(), products, LaunchCounter() as launches, StorageTracker() as storages:
        guide()
    return Count(launches.launches, launches.bytes, storages.peak)


def main() -> None:
    """Print a table for docs/benchmark.md."""
    print("| attention | launches, plain : card | moved, plain : card | held at once, card |\n|---|---:|---:|---:|")
    for call in CALLS:
        plain, card = count(call, on_card=False), count(call)
        print(
            f"| {call} | {plain.launches} : {card.launches} | {plain.bytes / 1e9:.2f} : {card.bytes / 1e9:.2f} GB "
            f"| {card.peak / MIB:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
