# SPDX-License-Identifier: GPL-3.0-or-later
"""Allowed errors of a result against the fp64 reference, per dtype, in one place.

``gag_core`` computes in fp32 and rounds once, to the dtype of its inputs. So the error of a result is at most that one
rounding, relative to the result, plus an fp32 error relative to the inputs. A computation that rounds logits or weights
to half precision on the way exceeds these bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative size of one rounding to nearest, slightly widened because the value before rounding has an error too.
ROUNDING = {
    torch.float64: 2.0**-24 * 1.02,  # the maths may be fp32 here too
    torch.float32: 2.0**-24 * 1.02,
    torch.float16: 2.0**-11 * 1.02,
    torch.bfloat16: 2.0**-8 * 1.02,
}
# fp16 has no numbers finer than this near zero.
SMALLEST_STEP = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}

WEIGHTS = 3e-6  # fp32 error of an attention weight, absolute; weights are at most 1
ARITHMETIC = 1e-5  # fp32 error of a read-out, relative to the largest value and the extrapolation

HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF_DTYPES, torch.float64)


def assert_close(
    actual: Tensor, expected: Tensor, *, error: float | Tensor = ARITHMETIC, dtype: torch.dtype | None = None
) -> None:
    """Assert that ``actual`` equals the fp64 ``expected`` up to one rounding to its dtype plus ``error`` (absolute).

    ``dtype`` is the dtype of the rounding, if it is not that of ``actual``.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{int((~torch.isfinite(actual)).sum())} entries are not finite"
    dtype = dtype or actual.dtype
    difference = (actual.double() - expected.double()).abs()
    allowed = ROUNDING[dtype] * expected.double().abs() + SMALLEST_STEP[dtype] + error
    excess = difference - allowed
    if excess.numel() and excess.max() > 0:
        at = torch.unravel_index(excess.argmax(), excess.shape)
        raise AssertionError(
            f"{int((excess > 0).sum())} of {excess.numel()} entries are off; the worst at "
            f"{tuple(int(index) for index in at)}: {actual[at].item()!r} instead of {expected[at].item()!r}, "
            f"off by {difference[at].item():.3g} where {allowed[at].item():.3g} is allowed"
        )


def extrapolation_error(sparse: Tensor, dense: Tensor, v: Tensor, guidance_scale: float) -> Tensor:
    """Compute the fp32 error that an extrapolated read-out may have, per token ``[B, H, N, 1]``.

    Errors of S and D are relative to the values that they average. lambda multiplies them, and so does ||D|| / ||S||,
    because the direction of a short S has a large error.
    """
    ratio = dense.norm(dim=-1, keepdim=True) / sparse.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return ARITHMETIC * v.double().abs().max() * (1.0 + abs(guidance_scale)) * (1.0 + ratio)
