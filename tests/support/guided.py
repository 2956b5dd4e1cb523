# SPDX-License-Identifier: GPL-3.0-or-later
"""Comparison of ``guided_attention`` with the fp64 reference, and settings to compare it with."""

from __future__ import annotations

import torch
from torch import Tensor

import reference
from gag_core import GuidanceConfig, guided_attention
from tolerances import assert_close, extrapolation_error

PAPER = GuidanceConfig()
GENTLE = GuidanceConfig(guidance_scale=2.0, norm_mode="relative", norm_threshold=0.1)
CONFIGS = {
    "paper": PAPER,
    "gentle": GENTLE,
    "orthogonal-merged": GuidanceConfig(orthogonal_scale=0.5, norm_threshold=2.0, merge_heads=True),
    "pladis": GuidanceConfig(rule="pladis", guidance_scale=2.0),
    "sparsemax-half": GuidanceConfig(alpha=2.0, strength=0.5, guidance_scale=3.0),
    "alpha-1.25": GuidanceConfig(alpha=1.25, norm_threshold=1.0),
}


def assert_matches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    base: Tensor | None = None,
) -> None:
    result = guided_attention(q, k, v, config, mask=mask, scale=scale, base=base)
    expected = reference.guided_attention(q, k, v, config, mask=mask, scale=scale, base=base)
    sparse, dense = reference.sparse_dense_attention(q, k, v, alpha=config.alpha, mask=mask, scale=scale)
    error = extrapolation_error(sparse, dense, v, config.guidance_scale)
    if config.merge_heads:
        error = error.amax(1, keepdim=True)
    # fp32 logits carry an error relative to their size, and the weights inherit it.
    error = error * (1.0 + 0.02 * float(reference.attention_logits(q, k, scale=scale).abs().max()))
    # A read-out that cancels to nearly 0 has no direction in fp32. Such rows are left out, and are few.
    usable = (error < 0.05 * v.double().abs().max() * (1 + abs(config.guidance_scale))).expand(result.shape)
    assert usable.double().mean() > 0.9
    assert result.dtype == q.dtype
    assert torch.isfinite(result).all()
    assert_close(
        torch.where(usable, result, 0.0),
        torch.where(usable, expected, 0.0),
        error=error.clamp_max(1.0),
        dtype=q.dtype,
    )
