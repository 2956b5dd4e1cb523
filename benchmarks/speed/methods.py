# SPDX-License-Identifier: GPL-3.0-or-later
"""Implementations of attention that the benchmark compares.

All methods but plain attention call the public functions of ``gag_core``, in which they replace the function that
computes the guidance (``use_implementation``). So checks, the output's layout and joint attention are the same for all.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import gag_core
from gag_core import eager
from gag_core.attention import use_implementation
from gag_core.baselines import Guide, all_at_once, sort_based_entmax15
from gag_core.triton import choice

CONFIG = gag_core.GuidanceConfig()

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Swap = Callable[[], AbstractContextManager[object]]


class Method(NamedTuple):
    """One implementation of attention.

    Attributes:
        name: short name, unique.
        about: explanation for the table's legend.
        swaps: function that returns what makes ``gag_core`` use the implementation; it is called once for each shape.
        plain: True for attention without guidance.
        config: settings of the guidance.
    """

    name: str
    about: str
    swaps: Callable[[], list[Swap]] = list
    plain: bool = False
    config: gag_core.GuidanceConfig = CONFIG

    def attention(self, text: int) -> Attention:
        """Return the attention of q, k and v; with text, a joint attention whose first ``text`` tokens are the text."""
        if self.plain:
            return torch.nn.functional.scaled_dot_product_attention

        def guided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if text:
                return gag_core.guided_joint_attention(q, k, v, slice(0, text), self.config)
            return gag_core.guided_attention(q, k, v, self.config)

        return guided


@contextmanager
def swapped(swaps: Sequence[Swap]) -> Iterator[None]:
    """Replace functions inside the context: enter each of ``swaps``."""
    with ExitStack() as stack:
        for swap in swaps:
            stack.enter_context(swap())
        yield


def guided_by(guide: Guide) -> Callable[[], list[Swap]]:
    """Return ``swaps`` of a :class:`Method` that make ``gag_core`` compute the guidance with this function."""
    return lambda: [partial(use_implementation, guide)]


def compiled() -> list[Swap]:
    """Return ``swaps`` for the plain path, on any device, with a compiled :func:`guided_chunk`.

    Only the work on one chunk of queries is compiled, because compiling the loop over all chunks takes far longer.
    """
    torch.compiler.reset()  # otherwise torch stops compiling after some shapes
    compiled_chunk = torch.compile(eager.guided_chunk, dynamic=False)
    plain = partial(eager.guide, on_card=False)
    return [*guided_by(plain)(), partial(mock.patch.object, eager, "guided_chunk", compiled_chunk)]


def package_entmax15(logits: Tensor) -> Tensor:
    """Compute 1.5-entmax of the last axis by the package ``entmax``, which the inventors of entmax published."""
    weights: Tensor = importlib.import_module("entmax").entmax15(logits, dim=-1)
    return weights


SDPA = Method("SDPA", "torch's scaled_dot_product_attention, no guidance", plain=True)
FUSED = Method("fused", "gag_core's fused Triton kernel", guided_by(choice.guide_by("fused")))
ROW = Method("row", "gag_core's row kernels between products of torch", guided_by(choice.guide_by("row")))
EAGER = Method("eager", "gag_core's plain PyTorch path", guided_by(eager.guide))
UNIFORM = Method(
    "uniform",
    "rule uniform, which is plain attention to other values",
    config=gag_core.GuidanceConfig(rule="uniform", guidance_scale=0.5),
)
COMPILED = Method("compiled", "the eager path, its work on each chunk of queries through torch.compile", compiled)
SORT = Method(
    "sort-based",
    "the implementation of other packs: all logits at once, rows sorted",
    guided_by(all_at_once(sort_based_entmax15)),
)
PACKAGE = Method(
    "entmax package", "as sort-based, with the weights of that package", guided_by(all_at_once(package_entmax15))
)
ANDERSON = [
    Method(
        f"anderson depth {depth}",
        "another rule, which solves for its coefficient; compared with sort-based attention of the usual rule",
        config=gag_core.GuidanceConfig(rule="anderson", anderson_depth=depth),
    )
    for depth in (1, 3)
]
ALPHAS = [
    Method(
        f"alpha {alpha:g}",
        "another sparsity, implemented as gag_core picks; compared with sort-based attention of alpha 1.5",
        config=gag_core.GuidanceConfig(alpha=alpha),
    )
    for alpha in (1.25, 1.75, 2.0)
]
KERNELS: dict[choice.Path, Method] = {"fused": FUSED, "row": ROW}
OURS = (FUSED, ROW, EAGER, COMPILED)


def available(
    device: torch.device,
    dtype: torch.dtype,
    with_compiled: bool,
    with_anderson: bool = False,
    with_alphas: bool = False,
) -> tuple[list[Method], list[str]]:
    """Return the methods that can run here, and notes on those that cannot."""
    methods, notes = [SDPA, UNIFORM, EAGER, SORT], []
    for path, method in KERNELS.items():
        reason = choice.cannot_run(path, device)
        if os.environ.get("TRITON_INTERPRET") == "1":
            reason = "times in Triton's interpreter would mean nothing"
        if reason is None and choice.supports(path, dtype, 64, 64, CONFIG):
            methods.insert(methods.index(EAGER), method)
        else:
            notes.append(f"{method.name}: its kernels do not run on {device} here ({reason or dtype})")
    if with_compiled:
        methods.insert(methods.index(SORT), COMPILED)
    else:
        notes.append(f"{COMPILED.name}: only with --compiled")
    if importlib.util.find_spec("entmax") is not None:
        methods.append(PACKAGE)
    else:
        notes.append(f"{PACKAGE.name}: not installed (pip install entmax)")
    if with_anderson:
        methods += ANDERSON
    if with_alphas:
        methods += ALPHAS
    return methods, notes
