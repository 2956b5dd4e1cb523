# SPDX-License-Identifier: GPL-3.0-or-later
"""sparse_dense_attention against the fp64 reference."""

from __future__ import annotations

import hypothesis
import pytest
import torch

import cases
import reference
from cases import LAYOUTS, MASKS, SHAPES, Shape, shape_id
from gag_core import sparse_dense_attention
from properties import ALPHAS, PROPERTY, SEEDS, STDS
from properties import SHAPES as ANY_SHAPE
from tolerances import ARITHMETIC, DTYPES, assert_close

MASKED = Shape(2, 3, 14, 77, 16)


def assert_matches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    alpha: float = 1.5,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> None:
    result = sparse_dense_attention(q, k, v, alpha=alpha, mask=mask, scale=scale)
    expected = reference.sparse_dense_attention(q, k, v, alpha=alpha, mask=mask, scale=scale)
    logits = reference.attention_logits(q, k, scale=scale).abs().max()
    # fp32 logits carry an error relative to their size, and the weights inherit it.
    error = ARITHMETIC * float(v.double().abs().max()) * (1.0 + 0.02 * float(logits))
    for actual, wanted in zip(result, expected, strict=True):
        assert actual.dtype == q.dtype
        assert_close(actual, wanted, error=error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes_and_dtypes(shape: Shape, dtype: torch.dtype) -> None:
    assert_matches(*cases.qkv(shape, dtype=dtype))


@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.25, 1.5, 1.75, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("std", [0.1, 1.0, 4.0], ids="std={}".format)
def test_alphas(alpha: float, std: float) -> None:
    assert_matches(*cases.qkv(MASKED, std=std), alpha=alpha)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in cases.qkv(Shape(2, 3, 11, 77, 16), dtype=dtype))
    assert_matches(q, k, v)


def test_layouts_may_differ_between_q_k_and_v() -> None:
    q, k, v = cases.qkv(Shape(2, 3, 11, 77, 16))
    assert_matches(cases.as_merged_heads(q), cases.as_every_other(k), cases.as_channels_first(v))


def test_keys_expanded_over_the_batch() -> None:
    """One prompt for the whole batch, with stride 0."""
    q, k, v = cases.qkv(Shape(3, 2, 11, 77, 16))
    assert_matches(q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("scale", [-0.5, -0.0, 0.0, 0.01, 0.125, 1.0, 2.0], ids="scale={}".format)
def test_scale(scale: float) -> None:
    q, k, v = cases.qkv(MASKED)
    assert_matches(q, k, v, scale=scale)
    assert_matches(q, k, v, scale=scale, mask=cases.additive_bias(MASKED))


@pytest.mark.parametrize("sizes", [(1e15, 1e15), (1e30, 1e-4), (1e-15, 1e-15), (1e-4, 1e-30)], ids="sizes={}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_may_make_up_for_the_size_of_queries_and_keys(dtype: torch.dtype, sizes: tuple[float, float]) -> None:
    """Neither queries nor keys nor the scale alone decide if logits are large or small."""
    q, k, v = cases.qkv(MASKED, dtype=dtype)
    q, k = q * sizes[0], k * sizes[1]
    scale = 0.25 / sizes[0] / sizes[1]
    assert_matches(q, k, v, scale=scale)
    assert_matches(q, k, v, scale=-scale, mask=cases.additive_bias(MASKED))


def test_default_scale_is_one_over_the_root_of_the_dimension() -> None:
    q, k, v = cases.qkv(MASKED)
    for given, default in zip(
        sparse_dense_attention(q, k, v, scale=16**-0.5), sparse_dense_attention(q, k, v), strict=True
    ):
        torch.testing.assert_close(given, default)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, dtype: torch.dtype) -> None:
    assert_matches(*cases.qkv(MASKED, dtype=dtype), mask=cases.cast_mask(MASKS[mask](MASKED), dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_fp32_mask_beside_half_precision(dtype: torch.dtype) -> None:
    assert_matches(*cases.qkv(MASKED, dtype=dtype), mask=cases.additive_bias(MASKED))


def test_an_expanded_mask() -> None:
    mask = cases.bool_per_key(MASKED).expand(2, 3, 14, 77)
    assert_matches(*cases.qkv(MASKED), mask=mask)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("mask", ["bool-some-rows-empty", "additive-inf"])
def test_fully_masked_rows_are_zero(mask: str, alpha: float) -> None:
    q, k, v = cases.qkv(MASKED)
    sparse, dense = sparse_dense_attention(q, k, v, alpha=alpha, mask=MASKS[mask](MASKED))
    for out in (sparse, dense):
        assert (out[:, :, ::3] == 0).all() and (out[:, :, 1] != 0).any()


def test_masked_keys_are_as_if_absent() -> None:
    q, k, v = cases.qkv(MASKED)
    keep = torch.arange(77) < 50
    # The contents of a masked key or value must not leak, not even through 0 * inf.
    for masked, cut in zip(
        sparse_dense_attention(q, k, v, mask=keep), sparse_dense_attention(q, k[:, :, :50], v[:, :, :50]), strict=True
    ):
        torch.testing.assert_close(masked, cut)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("std", [100.0, 1e4, 1e8], ids="std={}".format)
def test_huge_logits(std: float, alpha: float) -> None:
    """Read-outs stay finite and inside the range of the values they average."""
    q, k, v = cases.qkv(Shape(2, 3, 50, 77, 64), std=std)
    for out in sparse_dense_attention(q, k, v, alpha=alpha):
        assert torch.isfinite(out).all()
        assert (out <= v.amax(2, keepdim=True) * (1 + 1e-5) + 1e-5).all()
        assert (out >= v.amin(2, keepdim=True) * (1 + 1e-5) - 1e-5).all()


def test_huge_logits_pick_the_winner() -> None:
    q = torch.full((1, 1, 3, 4), 1e4)
    k = torch.linspace(-1e4, 1e4, 9).view(1, 1, 9, 1).expand(1, 1, 9, 4)
    v = torch.arange(9.0).view(1, 1, 9, 1)
    for out in sparse_dense_attention(q, k, v.expand(1, 1, 9, 4)):
        assert torch.equal(out, torch.full_like(out, 8.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_may_exceed_the_dtype(dtype: torch.dtype) -> None:
    """q k^T of ordinary fp16 inputs is past 65504 long before the scale: it must be computed in fp32."""
    q, k, v = cases.qkv(Shape(1, 2, 20, 77, 64), dtype=dtype, std=100.0)
    assert reference.attention_logits(q, k, scale=1.0).abs().max() > 65504
    assert_matches(q, k, v, scale=1e-4)
    assert_matches(q, k, v, scale=1.0)


def test_leaves_its_inputs_alone() -> None:
    q, k, v = cases.qkv(MASKED)
    mask = cases.additive_inf(MASKED)
    before = [x.clone() for x in (q, k, v, mask)]
    sparse_dense_attention(q, k, v, mask=mask)
    sparse_dense_attention(q, k, v, mask=mask, scale=1.0)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, mask), before, strict=True))


@PROPERTY
@hypothesis.given(shape=ANY_SHAPE, seed=SEEDS, std=STDS, alpha=ALPHAS)
def test_any_shape(shape: Shape, seed: int, std: float, alpha: float) -> None:
    assert_matches(*cases.qkv(shape, seed=seed, std=std**0.5), alpha=alpha)


@PROPERTY
@hypothesis.given(shape=ANY_SHAPE, seed=SEEDS, alpha=ALPHAS)
def test_order_of_the_keys_does_not_matter(shape: Shape, seed: int, alpha: float) -> None:
    q, k, v = cases.qkv(shape, seed=seed)
    order = torch.randperm(shape.keys, generator=torch.Generator().manual_seed(seed))
    for permuted, plain in zip(
        sparse_dense_attention(q, k[:, :, order], v[:, :, order], alpha=alpha),
        sparse_dense_attention(q, k, v, alpha=alpha),
        strict=True,
    ):
        torch.testing.assert_close(permuted, plain, atol=2e-5, rtol=1e-5)
