# SPDX-License-Identifier: GPL-3.0-or-later
"""Rule "uniform" against the fp64 reference: shapes, dtypes, strides, masks, base, joint attention, extremes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import cases
import reference
from cases import LAYOUTS, MASKS, SHAPES, Shape, shape_id
from gag_core import GuidanceConfig, combine, guided_attention, guided_joint_attention, uniform
from properties import PROPERTY, SEEDS, STDS, VALUES, end_of
from properties import SHAPES as ANY_SHAPE
from tolerances import ARITHMETIC, DTYPES, HALF_DTYPES, ROUNDING, assert_close
from work import WorkCounter

CONFIG = GuidanceConfig(rule="uniform", guidance_scale=0.5)
SMALL = Shape(2, 3, 14, 77, 16)
JOINT = Shape(2, 3, 40, 40, 16)
TEXT = slice(11, 24)


def error_of(q: Tensor, k: Tensor, v: Tensor, config: GuidanceConfig) -> float:
    """Compute the error that torch's attention may have, in the read-outs of D and of the values that are moved."""
    largest = float(v.double().abs().max()) * (1.0 + 2.0 * abs(config.strength * config.guidance_scale))
    logits = float(reference.attention_logits(q, k).abs().max())
    # Half-precision attention rounds values and weights to the dtype; its logits are sums in fp32.
    rounding = 4.0 * ROUNDING[q.dtype] if q.dtype in HALF_DTYPES else 0.0
    return largest * (ARITHMETIC * (1.0 + 0.02 * logits) + rounding)


def assert_matches(q: Tensor, k: Tensor, v: Tensor, config: GuidanceConfig = CONFIG, **options: Any) -> None:
    out = guided_attention(q, k, v, config, **options)
    assert out.dtype == q.dtype
    assert_close(out, reference.guided_attention(q, k, v, config, **options), error=error_of(q, k, v, config))


@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes_and_dtypes(shape: Shape, dtype: torch.dtype, with_base: bool) -> None:
    q, k, v = cases.qkv(shape, dtype=dtype)
    assert_matches(q, k, v, base=cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None)


@pytest.mark.parametrize("scale", [-2.0, 0.0, 0.25, 1.0, 8.0])
def test_scales_and_strengths(scale: float) -> None:
    assert_matches(*cases.qkv(SMALL), replace(CONFIG, guidance_scale=scale))
    assert_matches(*cases.qkv(SMALL), replace(CONFIG, guidance_scale=1.0, strength=scale))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
def test_layouts(layout: str, with_base: bool) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in cases.qkv(SMALL))
    assert_matches(q, k, v, base=cases.random(*q.shape, seed=20) if with_base else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, with_base: bool, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    assert_matches(q, k, v, mask=cases.cast_mask(MASKS[mask](SMALL), dtype), base=base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_joint_attention(mask: str | None, with_base: bool, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(JOINT, dtype=dtype)
    given = None if mask is None else cases.cast_mask(MASKS[mask](JOINT), dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    out = guided_joint_attention(q, k, v, TEXT, CONFIG, mask=given, base=base)
    expected = reference.guided_joint_attention(q, k, v, TEXT, CONFIG, mask=given, base=base)
    assert_close(out, expected, error=2.0 * error_of(q, k, v, CONFIG))


@hypothesis.given(shape=ANY_SHAPE, seed=SEEDS, std=STDS, scale=st.sampled_from([-1.0, 0.1, 0.5, 3.0]))
@PROPERTY
def test_any_shape_and_spread(shape: Shape, seed: int, std: float, scale: float) -> None:
    assert_matches(*cases.qkv(shape, seed=seed, std=std), replace(CONFIG, guidance_scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("gain", [0.0, 0.5, -3.0, 1e30])
@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
def test_finite_numbers_stay_finite(kind: str, dtype: torch.dtype, gain: float, with_base: bool) -> None:
    """Queries, keys, values and base are as large as the dtype allows."""
    q, k, v = (VALUES[kind](x, end_of(dtype)) for x in cases.qkv(SMALL, dtype=dtype))
    base = VALUES[kind](cases.random(*q.shape, seed=20, dtype=dtype), end_of(dtype)) if with_base else None
    out = guided_attention(q, k, v, replace(CONFIG, guidance_scale=gain), base=base)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("kind", VALUES)
def test_strength_0_is_exactly_the_base(kind: str) -> None:
    """Also where torch's logits overflow and its attention is NaN."""
    q, k, v = (VALUES[kind](x, end_of(torch.float32)) for x in cases.qkv(SMALL))
    base = cases.random(*q.shape, seed=20)
    assert torch.equal(guided_attention(q, k, v, replace(CONFIG, strength=0.0), base=base), base)


def test_values_that_all_agree_are_left_alone() -> None:
    q, k, v = cases.qkv(SMALL)
    v = v[:, :, :1].expand_as(v)
    assert_close(
        guided_attention(q, k, v, replace(CONFIG, guidance_scale=100.0)), v[:, :, : q.shape[2]].double(), error=1e-3
    )


def test_infinite_temperature_changes_nothing() -> None:
    """Queries of zeros read the mean of the values, from which there is nothing to move away."""
    q, k, v = cases.qkv(SMALL)
    mean = v.double().mean(dim=2, keepdim=True).expand(q.shape)
    assert_close(guided_attention(torch.zeros_like(q), k, v, replace(CONFIG, guidance_scale=100.0)), mean, error=1e-3)


def test_a_key_that_may_not_be_read_has_no_part_in_the_mean() -> None:
    q, k, v = cases.qkv(SMALL)
    mask = torch.ones(1, 1, 1, SMALL.keys, dtype=torch.bool)
    mask[..., 40:] = False
    shorter = guided_attention(q, k[:, :, :40], v[:, :, :40], CONFIG)
    assert torch.allclose(guided_attention(q, k, v, CONFIG, mask=mask), shorter, atol=1e-5)


def test_the_mean_of_a_large_number_of_large_values_does_not_overflow() -> None:
    v = torch.full((1, 1, 1000, 4), torch.finfo(torch.float32).max)
    assert torch.allclose(uniform.uniform_read_out(v, None), v[:, :, :1], rtol=1e-5)


def test_the_work_is_that_of_plain_attention() -> None:
    """One product of queries and keys and one of weights and values, as in torch's own attention."""
    q, k, v = cases.qkv(Shape(1, 2, 256, 77, 64))
    with WorkCounter() as plain:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with WorkCounter() as guided:
        guided_attention(q, k, v, CONFIG)
    assert guided.attention == plain.attention > 0
    assert guided.products <= 0.01 * plain.attention


@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
def test_one_graph_compiles_the_rule(with_base: bool) -> None:
    """Another strength needs no other graph than a number that has changed once."""
    torch.compiler.reset()
    q, k, v = cases.qkv(SMALL)
    base = cases.random(*q.shape, seed=20) if with_base else None
    compiled = torch.compile(guided_attention, backend="eager", fullgraph=True)
    for strength in (1.0, 0.25, 0.0625):
        config = replace(CONFIG, strength=strength)
        expected = guided_attention(q, k, v, config, base=base)
        assert torch.equal(compiled(q, k, v, config, base=base), expected)


def test_combine_refuses_the_rule() -> None:
    _, _, v = cases.qkv(SMALL)
    with pytest.raises(ValueError, match=r"^rule must be 'gag' or 'pladis' where .* got 'uniform'\.$"):
        combine(v, v, CONFIG)
