# SPDX-License-Identifier: GPL-3.0-or-later
"""Controls that change the read-out of the text plainly. They are no nodes of the pack.

Each takes the place of the implementation that ``gag_core`` picks, behind a GAG node. So it acts on exactly the
attention calls that guidance acts on, in the same steps, and in joint attentions at constant text mass m:
``out = base + m * change``. The formulas, with D the dense, S the sparse and U the uniform read-out (the mean of the
values), and g the amount:

    gain              g D
    sparse gain       S + g S - D
    from sparse       S + g (S - U) - D
    empty prompt      g (D - E), with E the read-out of the empty prompt by the same queries
    text mass         the text's share of a joint softmax, times 1 + g before the softmax is normalised
    GAG's mean gain   strength (S + mean(c) S - D), with c the factor ``<guided, S> / <S, S> - 1`` that GAG has for a
                      head and query; the mean is over heads, queries or both
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Guide = Callable[..., None]
GAIN, SPARSE_GAIN, FROM_SPARSE, EMPTY, MASS = "gain", "sparse gain", "from sparse", "empty prompt", "text mass"
# Axes of ``[B, H, N, D]`` that the mean of GAG's gain is taken over.
MEANS = {"mean gain over queries": (2,), "mean gain over heads": (1,), "mean gain over both": (1, 2)}
NAMES = (GAIN, SPARSE_GAIN, FROM_SPARSE, EMPTY, MASS, *MEANS)


@dataclass
class EmptyPrompt:
    """Keys and values of the empty prompt by call of a model call, ``[1, H, N, D]``. A UNet's never change in a run."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def record(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Any, **more: Any) -> None:
        """Compute plain attention in the place of guidance, and keep the last row's keys and values."""
        self.keys.append(k[-1:].clone())
        self.values.append(v[-1:].clone())
        out.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=more["scale"]))


def control(name: str, amount: float, guide: Guide, empty: EmptyPrompt | None) -> Guide:
    """Return a control with the arguments of ``gag_core.attention.default_guide``.

    Args:
        name: one of NAMES.
        amount: g.
        guide: ``gag_core.attention.default_guide``, for sparse read-outs and GAG's own gain.
        empty: the empty prompt, for EMPTY.
    """
    calls = 0

    def controlled(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: Any,
        *,
        base: Tensor | None,
        mask: Tensor | None,
        scale: float,
        joint_lse: Tensor | None = None,
    ) -> None:
        nonlocal calls
        assert mask is None, "the small models have no masks"
        logits = torch.matmul(q.float() * scale, k.float().transpose(-1, -2))
        dense = torch.matmul(logits.softmax(dim=-1), v.float())
        base = dense if base is None else base
        mass = torch.ones(1) if joint_lse is None else (logits.logsumexp(-1) - joint_lse).exp().unsqueeze(-1)
        if name == MASS:
            out.copy_((base + amount * mass * dense) / (1.0 + amount * mass))
            return
        if name == GAIN:
            change = amount * dense
        elif name == EMPTY:
            assert empty is not None
            index = calls % len(empty.keys)
            calls += 1
            keys, values = (each[index].expand(q.shape[0], -1, -1, -1) for each in (empty.keys, empty.values))
            read_out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=scale)
            change = amount * (dense - read_out)
        else:
            sparse = torch.empty_like(out)
            guide(sparse, q, k, v, only_sparse(config), base=None, mask=None, scale=scale)
            if name == SPARSE_GAIN:
                change = (1.0 + amount) * sparse - dense
            elif name == FROM_SPARSE:
                change = sparse + amount * (sparse - v.float().mean(dim=2, keepdim=True)) - dense
            else:
                guided = torch.empty_like(out)
                guide(guided, q, k, v, replace(config, strength=1.0), base=None, mask=None, scale=scale)
                gain = gain_of(guided, sparse).mean(dim=MEANS[name], keepdim=True)
                change = config.strength * (sparse * (1.0 + gain) - dense)
        out.copy_(base + mass * change)

    return controlled


def gain_of(guided: Tensor, sparse: Tensor) -> Tensor:
    """Compute the factor c with ``guided = S + c S`` of each head and query, ``[B, H, N, 1]``, for zeta = 0."""
    square = (sparse * sparse).sum(dim=-1, keepdim=True).clamp_min(1e-12)
    return (guided * sparse).sum(dim=-1, keepdim=True) / square - 1.0


def only_sparse(config: Any) -> Any:
    """Return the settings of which the guided read-out is S."""
    return replace(config, rule="gag", guidance_scale=0.0, strength=1.0)
