# SPDX-License-Identifier: GPL-3.0-or-later
"""Implementations of attention that the benchmark compares, and an exact one in fp64 to measure their errors.

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
from gag_core import eager, geometry
from gag_core.attention import use_implementation
from gag_core.triton import launch

CONFIG = gag_core.GuidanceConfig()

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Entmax = Callable[[Tensor], Tensor]
Guide = Callable[..., None]  # the arguments of gag_core.eager.guide; joint_lse may be missing
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


def all_at_once(entmax: Entmax) -> Guide:
    """Return guidance as other packs compute it: all logits at once, both weight matrices, two products."""

    def guide(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: gag_core.GuidanceConfig,
        *,
        base: Tensor | None,
        mask: Tensor | None,
        scale: float,
        joint_lse: Tensor | None = None,
    ) -> None:
        assert mask is None, "the benchmark has no masks"
        logits = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
        dense_weights = logits.softmax(dim=-1)
        sparse_weights = entmax(logits)
        dense = torch.matmul(dense_weights, v.float())
        sparse = torch.matmul(sparse_weights, v.float())
        guided = gag_core.combine(sparse, dense, config)
        if base is not None and joint_lse is not None:
            mass = (logits.logsumexp(dim=-1) - joint_lse).exp().unsqueeze(-1)
            guided = base + mass * (guided - dense)
        out.copy_(guided)

    return guide


def sort_based_entmax15(logits: Tensor) -> Tensor:
    """Compute 1.5-entmax of the last axis from sorted rows (Peters et al. 2019, arXiv 1905.05702): ``[..., n]``."""
    x = (logits - logits.amax(dim=-1, keepdim=True)) / 2
    ordered, _ = torch.sort(x, dim=-1, descending=True)
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean = ordered.cumsum(-1) / count
    mean_of_squares = (ordered**2).cumsum(-1) / count
    # Threshold for a support of the k largest entries, for every k. Where k * variance > 1 there is none: clamped.
    missing = (1 - count * (mean_of_squares - mean**2)) / count
    threshold = mean - missing.clamp(min=0).sqrt()
    support = (threshold <= ordered).sum(dim=-1, keepdim=True)
    return (x - threshold.gather(-1, support - 1)).clamp(min=0) ** 2


def package_entmax15(logits: Tensor) -> Tensor:
    """Compute 1.5-entmax of the last axis by the package ``entmax``, which the inventors of entmax published."""
    weights: Tensor = importlib.import_module("entmax").entmax15(logits, dim=-1)
    return weights


SDPA = Method("SDPA", "torch's scaled_dot_product_attention, no guidance", plain=True)
FUSED = Method("fused", "gag_core's kernel, as gag_core picks it")
EAGER = Method("eager", "gag_core's plain PyTorch path", guided_by(eager.guide))
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
OURS = (FUSED, EAGER, COMPILED)


def available(
    device: torch.device,
    dtype: torch.dtype,
    with_compiled: bool,
    with_anderson: bool = False,
    with_alphas: bool = False,
) -> tuple[list[Method], list[str]]:
    """Return the methods that can run here, and notes on those that cannot."""
    methods, notes = [SDPA, EAGER, SORT], []
    sample = torch.empty(1, 1, 1, 64, device=device, dtype=dtype)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # for tests; its times would mean nothing
    if launch.can_run(sample, sample, CONFIG) and not interpreted:
        methods.insert(1, FUSED)
    else:
        notes.append(f"{FUSED.name}: its kernel does not run on {device} here")
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


def still_works(method: Method, q: Tensor, v: Tensor) -> bool:
    """True if the method's own implementation ran: where a kernel fails, the plain path takes over."""
    return method is not FUSED or launch.can_run(q, v, CONFIG)


class Exact(NamedTuple):
    """Plain and guided attention in fp64."""

    plain: Tensor
    guided: Tensor


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: int = 0,
    rows: slice = slice(None),
    config: gag_core.GuidanceConfig = CONFIG,
) -> Exact:
    """Compute attention of some queries (``rows``) in fp64.

    The default settings are written out here, with entmax by sorting; other settings are computed by ``gag_core`` in
    fp64. ``text``: as in :meth:`Method.attention`.
    """
    q, k, v = q[:, :, rows].double(), k.double(), v.double()
    logits = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    plain = torch.matmul(logits.softmax(dim=-1), v)
    if not text:
        return Exact(plain, _guided(logits, plain, v, config, q, k))
    text_logits, text_values = logits[..., :text], v[:, :, :text]
    dense = torch.matmul(text_logits.softmax(dim=-1), text_values)
    mass = logits.softmax(dim=-1)[..., :text].sum(dim=-1, keepdim=True)
    text_guided = _guided(text_logits, dense, text_values, config, q, k[:, :, :text])
    guided = plain + mass * (text_guided - dense)
    is_text = torch.arange(k.shape[2], device=q.device)[rows, None] < text
    return Exact(plain, torch.where(is_text, plain, guided))


def _guided(logits: Tensor, dense: Tensor, v: Tensor, config: gag_core.GuidanceConfig, q: Tensor, k: Tensor) -> Tensor:
    if config != CONFIG:
        return gag_core.guided_attention(q, k, v, config)
    sparse = torch.matmul(sort_based_entmax15(logits), v)
    along = ((sparse - dense) * sparse).sum(-1, keepdim=True) / (sparse * sparse).sum(-1, keepdim=True)
    guidance = along * sparse
    length = guidance.norm(dim=-1, keepdim=True)
    shrink = geometry.cap(length, torch.full_like(length, CONFIG.norm_threshold)) / length.clamp_min(1e-300)
    return sparse + CONFIG.guidance_scale * shrink * guidance
