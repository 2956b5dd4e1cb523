# SPDX-License-Identifier: GPL-3.0-or-later
"""Counter of the multiplications that matrix products and torch's own attention do inside a ``with`` block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::dot"}


class WorkCounter(TorchDispatchMode):
    """Counts the work inside a ``with`` block.

    Attributes:
        products: number of multiply-adds in matrix products.
        attention: number of multiply-adds in torch's own attention.
        attention_calls: number of calls of torch's own attention.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = 0
        self.attention = 0
        self.attention_calls = 0

    @property
    def total(self) -> int:
        return self.products + self.attention

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name  # type: ignore[attr-defined]
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if "scaled_dot_product" in name:
            q, k, v = tensors[:3]
            self.attention += math.prod(q.shape) * k.shape[-2] + math.prod(q.shape[:-1]) * k.shape[-2] * v.shape[-1]
            self.attention_calls += 1
        elif name in PRODUCTS:
            left, right = tensors[-2:]
            self.products += math.prod(left.shape) * (right.shape[-1] if right.dim() > 1 else 1)
        return func(*args, **(kwargs or {}))
