# SPDX-License-Identifier: GPL-3.0-or-later
"""Forward-mode differentiation passes through guidance: some samplers differentiate the model along a direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gag_core import GuidanceConfig, guided_attention, guided_joint_attention

CONFIGS = {
    "gag": GuidanceConfig(guidance_scale=2.0, norm_threshold=0.3, norm_mode="relative"),
    "orthogonal": GuidanceConfig(guidance_scale=2.0, norm_threshold=0.3, orthogonal_scale=0.5),
    "pladis": GuidanceConfig(rule="pladis", guidance_scale=1.5),
    "uniform": GuidanceConfig(rule="uniform", guidance_scale=0.5),
    "sparsemax": GuidanceConfig(alpha=2.0, guidance_scale=2.0),
    "alpha 1.3": GuidanceConfig(alpha=1.3, guidance_scale=2.0),
    "alpha 1.03": GuidanceConfig(alpha=1.03, guidance_scale=2.0),
    "anderson": GuidanceConfig(rule="anderson", anderson_depth=2, guidance_scale=2.0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("joint", [False, True], ids=["cross", "joint"])
def test_the_value_is_the_same_and_the_derivative_is_that_of_finite_differences(
    joint: bool, config: GuidanceConfig
) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v, direction = (torch.randn(1, 2, 12, 8, generator=generator, dtype=torch.float64) for _ in range(4))

    def attend(queries: Tensor) -> Tensor:
        if joint:
            return guided_joint_attention(queries, k, v, slice(0, 5), config)
        return guided_attention(queries, k, v, config)

    jvp: Any = torch.func.jvp  # it returns a third value only where one is asked for
    value, slope = jvp(attend, (q,), (direction,))
    torch.testing.assert_close(value, attend(q), rtol=1e-10, atol=1e-12)
    step = 1e-6
    expected = (attend(q + step * direction) - attend(q - step * direction)) / (2.0 * step)
    # At a kink, of the cap or of a weight that becomes 0, the two sides differ; few entries lie that close to one.
    close = torch.isclose(slope, expected, rtol=1e-3, atol=1e-4)
    assert float(close.double().mean()) > 0.95
