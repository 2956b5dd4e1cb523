# SPDX-License-Identifier: GPL-3.0-or-later
"""Calls of the Triton kernels that tests of both paths share: shapes, settings, allowed errors.

The kernels run in Triton's interpreter on the CPU, or on the device that GAG_TEST_DEVICE names.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

import reference
from cases import Shape
from gag_core import GuidanceConfig
from gag_core.triton import launch, row
from tolerances import SMALLEST_STEP

DEVICE = torch.device(os.environ.get("GAG_TEST_DEVICE", "cpu"))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Keys: one, one, two and three prompts, and long texts, which take several passes. Each needs other tiles.
SHAPES = [
    Shape(1, 1, 3, 1, 32),
    Shape(2, 2, 20, 77, 40),
    Shape(1, 2, 70, 77, 64),
    Shape(1, 1, 18, 154, 80),
    Shape(1, 1, 17, 231, 96),
    Shape(1, 1, 9, 77, 160),
    Shape(1, 1, 5, 512, 128),
    Shape(1, 1, 20, 700, 48),
    Shape(1, 1, 4, 33, 256),
]
SMALL = Shape(2, 2, 14, 77, 32)
LONG = Shape(1, 1, 14, 530, 32)
CONFIGS = {
    "paper": GuidanceConfig(),
    "gentle": GuidanceConfig(guidance_scale=2.0, norm_mode="relative", norm_threshold=0.1),
    "orthogonal": GuidanceConfig(orthogonal_scale=0.5, norm_threshold=2.0),
    "no-cap": GuidanceConfig(norm_threshold=math.inf, norm_mode="relative", guidance_scale=-1.0),
    "pladis": GuidanceConfig(rule="pladis", guidance_scale=2.0),
    "sparsemax-half": GuidanceConfig(alpha=2.0, strength=0.5, guidance_scale=3.0),
    "alpha-1.25": GuidanceConfig(alpha=1.25, norm_threshold=1.0),
    "alpha-1.9": GuidanceConfig(alpha=1.9, guidance_scale=2.0, norm_mode="relative", norm_threshold=0.1),
}
# Goals of the kernels: fp32 close to fp64 relative to the output's norm, half precision close to torch's attention.
FP32_ERROR = 2e-5
# The interpreter truncates bf16 where cards round.
HALF_ERROR = {torch.float16: 4.0, torch.bfloat16: 8.0 if DEVICE.type == "cpu" else 4.0}


def by_kernel(path: str, q: Tensor, k: Tensor, v: Tensor, config: GuidanceConfig, **options: Any) -> Tensor:
    """Compute guided attention by the kernels of a path."""
    out = torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=q.dtype)
    return launched(path, out, q, k, v, config, **options)


def launched(
    path: str,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    joint_lse: Tensor | None = None,
) -> Tensor:
    """Let the kernels of a path write to ``out``, and return the result."""
    mask = mask if mask is None else mask[(None,) * (4 - mask.ndim)]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, q, k, v = (tensor.to(DEVICE) for tensor in (out, q, k, v))
    base, mask, joint_lse = (one if one is None else one.to(DEVICE) for one in (base, mask, joint_lse))
    run = launch._launch if path == "fused" else row.launch
    run(out, q, k, v, config, base, mask, scale, joint_lse)
    return out.cpu()


def assert_matches(
    path: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Hold a result to the fp64 reference, in half precision relative to the error of torch's own attention."""
    result = by_kernel(path, q, k, v, config, base=base, mask=mask, scale=scale)
    expected = reference.guided_attention(q, k, v, config, base=base, mask=mask, scale=scale)
    assert torch.isfinite(result).all()
    size = expected.norm()
    error = (result.double() - expected).norm()
    if q.dtype == torch.float32:
        assert error <= FP32_ERROR * size
        return
    wide = [tensor.double() for tensor in (q, k, v)]
    additive = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    own = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=additive, scale=scale)
    exact = reference.sparse_dense_attention(*wide, alpha=1.0, mask=mask, scale=scale)[1]
    readable = torch.isfinite(own).all(dim=-1, keepdim=True)
    own_error = torch.where(readable, own.double() - exact, 0.0).norm() / exact.norm()
    assert error <= (HALF_ERROR[q.dtype] * own_error + SMALLEST_STEP[q.dtype]) * size
