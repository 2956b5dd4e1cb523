# SPDX-License-Identifier: GPL-3.0-or-later
"""The shape of the cap is one function in gag_core: with another function there and in the reference, all agree."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import measures_reference
import reference
from cases import Shape
from gag_core import GuidanceConfig, combine, geometry, guided_attention, guided_joint_attention
from gag_core.measures import MEASURES, measure
from tolerances import assert_close

SHAPE = Shape(2, 3, 14, 20, 16)
CONFIGS = {
    "absolute": GuidanceConfig(norm_threshold=1.0),
    "relative": GuidanceConfig(norm_threshold=0.3, norm_mode="relative"),
    "orthogonal": GuidanceConfig(norm_threshold=1.0, orthogonal_scale=0.5),
    "orthogonal-large": GuidanceConfig(norm_threshold=0.5, orthogonal_scale=-2.5, norm_mode="relative"),
    "merged": GuidanceConfig(norm_threshold=1.0, merge_heads=True),
    "merged-orthogonal": GuidanceConfig(norm_threshold=0.5, merge_heads=True, orthogonal_scale=1.0),
    "no-cap": GuidanceConfig(norm_threshold=float("inf"), orthogonal_scale=0.5),
    "pladis": GuidanceConfig(rule="pladis", guidance_scale=2.0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def soft_cap(length: Tensor, limit: Tensor) -> Tensor:
    """Cap a length smoothly: the result approaches the limit for long vectors, and keeps the sign of the length."""
    return length / torch.sqrt(1.0 + (length / limit) ** 2)


@pytest.fixture
def soft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the cap in gag_core and in the reference by the soft one."""
    monkeypatch.setattr(geometry, "cap", soft_cap)
    monkeypatch.setattr(reference, "cap", soft_cap)


def results(config: GuidanceConfig) -> list[Tensor]:
    q, k, v = cases.qkv(SHAPE)
    joint = cases.qkv(Shape(1, 2, 30, 30, 16))
    return [
        guided_attention(q, k, v, config),
        guided_joint_attention(*joint, slice(0, 13), config),
        combine(v, v.roll(1, 2), config),
    ]


@pytest.mark.usefixtures("soft")
@every_config
def test_a_soft_cap_is_that_of_the_reference(config: GuidanceConfig) -> None:
    q, k, v = cases.qkv(SHAPE)
    joint = cases.qkv(Shape(1, 2, 30, 30, 16))
    expected = [
        reference.guided_attention(q, k, v, config),
        reference.guided_joint_attention(*joint, slice(0, 13), config),
        reference.combine(v, v.roll(1, 2), config),
    ]
    for found, wanted in zip(results(config), expected, strict=True):
        assert_close(found, wanted, error=1e-3)


@pytest.mark.usefixtures("soft")
@pytest.mark.parametrize("depth", [1, 2])
def test_a_soft_cap_of_rule_anderson(depth: int) -> None:
    q, k, v = cases.qkv(SHAPE, dtype=torch.float64)
    config = GuidanceConfig(rule="anderson", guidance_scale=4.0, norm_threshold=0.5, anderson_depth=depth)
    assert_close(guided_attention(q, k, v, config), reference.guided_attention(q, k, v, config), error=1e-6)


@pytest.mark.usefixtures("soft")
@every_config
def test_a_soft_cap_is_measured_as_such(config: GuidanceConfig) -> None:
    q, k, v = cases.qkv(SHAPE)
    found, expected = measure(q, k, v, config), measures_reference.measures(q, k, v, config)
    for index, name in enumerate(MEASURES):
        torch.testing.assert_close(
            found[:, index].double(), torch.tensor(expected[name]).double(), atol=2e-4, rtol=2e-4
        )
    has_cap = config.rule == "gag" and config.norm_threshold < float("inf")
    capped = found[:, list(MEASURES).index("capped")]
    assert (capped == (1.0 if has_cap else 0.0)).all(), "a soft cap shortens every vector"


def test_a_soft_cap_changes_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would also pass if nothing used the cap."""
    for name, config in CONFIGS.items():
        hard = results(config)
        with monkeypatch.context() as patch:
            patch.setattr(geometry, "cap", soft_cap)
            other = results(config)
        for a, b in zip(hard, other, strict=True):
            assert torch.equal(a, b) == (name in ("no-cap", "pladis")), name


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux")
@pytest.mark.parametrize("name", ["absolute", "relative", "orthogonal", "orthogonal-large"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_soft_cap_in_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have the same function once more; replaced in it and in the reference, both agree."""
    import triton.language as tl

    from gag_core.triton import formulas, launch

    if not formulas.INTERPRETED:
        pytest.skip("the interpreter is off")

    def soft_tile(length: Any, limit: Any) -> Any:
        ratio = length / limit
        return length / tl.sqrt(1.0 + ratio * ratio)

    monkeypatch.setattr(reference, "cap", soft_cap)
    monkeypatch.setattr(formulas, "cap", soft_tile)
    q, k, v = cases.qkv(Shape(1, 2, 5, 20, 16))
    out = torch.empty_like(q)
    config = dataclasses.replace(CONFIGS[name], guidance_scale=2.0)
    launch._launch(out, q, k, v, config, base=None, mask=None, scale=0.25, joint_lse=None)
    assert_close(out, reference.guided_attention(q, k, v, config), error=1e-3)
