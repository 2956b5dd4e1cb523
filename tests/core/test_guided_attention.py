# SPDX-License-Identifier: GPL-3.0-or-later
"""guided_attention against the fp64 reference: shapes, dtypes, strides, masks, base, chunks, extremes."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import cases
import reference
from cases import LAYOUTS, MASKS, SHAPES, Shape, shape_id
from gag_core import GuidanceConfig, combine, eager, guided_attention, sparse_dense_attention
from guided import CONFIGS, GENTLE, PAPER, assert_matches
from properties import ALPHAS, PROPERTY, SEEDS, STDS
from properties import SHAPES as ANY_SHAPE
from tolerances import DTYPES, assert_close

SMALL = Shape(2, 3, 14, 77, 16)
FP32_ERROR = 2e-5  # relative to the output's norm: the project's goal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("name", ["paper", "gentle"])
def test_shapes_and_dtypes(name: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_matches(*cases.qkv(shape, dtype=dtype), CONFIGS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, with_base: bool, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    assert_matches(q, k, v, CONFIGS[name], base=base)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 1.75, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("keys", [77, 256, 512], ids="keys={}".format)
def test_many_ties_at_the_edge_of_the_support(keys: int, alpha: float) -> None:
    """The threshold is hardest to find for such rows, and its error changes many weights."""
    q, k, v = cases.with_logits(cases.ties_at_the_edge(keys, alpha), 16)
    config = GuidanceConfig(alpha=alpha, guidance_scale=2.0, norm_mode="relative", norm_threshold=0.1)
    result = guided_attention(q, k, v, config, scale=1.0)
    expected = reference.guided_attention(q, k, v, config, scale=1.0)
    assert (result.double() - expected).norm() <= FP32_ERROR * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    arrange = LAYOUTS[layout]
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype)
    assert_matches(arrange(q), arrange(k), arrange(v), GENTLE)
    assert_matches(arrange(q), arrange(k), arrange(v), GENTLE, base=arrange(base))
    assert_matches(q, k, v, GENTLE, base=arrange(base))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.01, 0.5, 1.0], ids="scale={}".format)
def test_scale(scale: float) -> None:
    assert_matches(*cases.qkv(SMALL), GENTLE, scale=scale)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
@pytest.mark.parametrize("name", ["paper", "orthogonal-merged", "sparsemax-half"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, name: str, with_base: bool) -> None:
    q, k, v = cases.qkv(SMALL)
    base = cases.random(*q.shape, seed=20) if with_base else None
    made = MASKS[mask](SMALL)
    # Merged heads mix the geometry of masked and unmasked heads of a token; the reference does the same.
    result = guided_attention(q, k, v, CONFIGS[name], mask=made, base=base)
    expected = reference.guided_attention(q, k, v, CONFIGS[name], mask=made, base=base)
    scale = 1 + CONFIGS[name].guidance_scale
    assert_close(result, expected, error=2e-4 * scale)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("mask", ["bool-some-rows-empty", "additive-inf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fully_masked_rows_are_the_hosts(dtype: torch.dtype, mask: str, alpha: float) -> None:
    """They are zero without a base, and exactly the base with one."""
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    made = MASKS[mask](SMALL)
    config = GuidanceConfig(alpha=alpha)
    base = cases.random(*q.shape, seed=20, dtype=dtype)
    with_base = guided_attention(q, k, v, config, mask=made, base=base)
    without = guided_attention(q, k, v, config, mask=made)
    assert (without[:, :, ::3] == 0).all() and (without[:, :, 1:3] != 0).any()
    assert torch.equal(with_base[:, :, ::3], base[:, :, ::3])
    assert torch.isfinite(with_base).all() and torch.isfinite(without).all()


def test_everything_masked() -> None:
    q, k, v = cases.qkv(SMALL)
    mask = torch.zeros(1, 1, 1, 77, dtype=torch.bool)
    base = cases.random(*q.shape, seed=20)
    assert torch.equal(guided_attention(q, k, v, PAPER, mask=mask), torch.zeros_like(q))
    assert torch.equal(guided_attention(q, k, v, PAPER, mask=mask, base=base), base)


# --- the two functions it joins -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_combine_of_the_two_read_outs(name: str) -> None:
    q, k, v = cases.qkv(SMALL)
    config = CONFIGS[name]
    sparse, dense = sparse_dense_attention(q, k, v, alpha=config.alpha)
    torch.testing.assert_close(guided_attention(q, k, v, config), combine(sparse, dense, config), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_base_only_shifts_the_result(name: str) -> None:
    """Guidance is added, and does not depend on the host's output."""
    q, k, v = cases.qkv(SMALL)
    base = cases.random(*q.shape, seed=20)
    _, dense = sparse_dense_attention(q, k, v)
    torch.testing.assert_close(
        guided_attention(q, k, v, CONFIGS[name], base=base) - base,
        guided_attention(q, k, v, CONFIGS[name]) - dense,
        atol=2e-4,
        rtol=1e-4,
    )


# --- off ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_off_is_base_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype)
    off = dataclasses.replace(CONFIGS[name], strength=0.0)
    assert torch.equal(guided_attention(q, k, v, off, base=base), base)
    assert torch.equal(guided_attention(q, k, v, off, base=base, mask=cases.bool_some_rows_empty(SMALL)), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_off_is_dense_attention(name: str, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    off = dataclasses.replace(CONFIGS[name], strength=0.0)
    _, dense = sparse_dense_attention(q, k, v)
    assert_close(guided_attention(q, k, v, off), dense.double(), error=1e-6)


# --- chunks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [Shape(2, 8, 4096, 77, 40), Shape(1, 20, 2500, 154, 16), Shape(1, 3, 4099, 231, 8), Shape(4, 20, 300, 700, 8)],
    ids=shape_id,
)
@pytest.mark.parametrize("masked", ["unmasked", "per-query", "per-key"])
def test_a_query_does_not_see_the_others(shape: Shape, masked: str) -> None:
    """Any slice of the queries alone gives that slice of the result: chunk boundaries leave no trace."""
    q, k, v = cases.qkv(shape)
    base = cases.random(*q.shape, seed=20)
    mask = None
    if masked == "per-query":
        mask = cases.random(1, 1, shape.queries, shape.keys, seed=21) > 0
    elif masked == "per-key":
        mask = cases.bool_per_key(shape)
    whole = guided_attention(q, k, v, GENTLE, mask=mask, base=base)
    for start, stop in ((0, 1), (0, 33), (shape.queries // 3, shape.queries // 3 + 64), (shape.queries - 17, None)):
        rows = slice(start, stop)
        part_mask = mask[:, :, rows] if masked == "per-query" and mask is not None else mask
        part = guided_attention(q[:, :, rows], k, v, GENTLE, mask=part_mask, base=base[:, :, rows])
        torch.testing.assert_close(whole[:, :, rows], part, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "shape, keys, whole_heads, chunks",
    [
        ((2, 4, 64, 32), 77, False, 1),  # all at once
        ((2, 8, 256, 160), 77, False, 2),  # one batch row at a time
        ((5, 8, 64, 40), 77, False, 2),  # three batch rows, then two
        ((2, 8, 4096, 40), 77, False, 8),  # queries in four parts
        ((1, 24, 1024, 128), 512, False, 24),  # three heads at a time, as copies of all keys and values are large
        ((1, 24, 1024, 128), 512, True, 32),
        ((1, 1, 0, 8), 5, False, 0),
    ],
    ids=str,
)
def test_few_chunks_of_about_one_size(
    shape: tuple[int, int, int, int], keys: int, whole_heads: bool, chunks: int
) -> None:
    """A small call is one chunk, a few queries at the end are not one more, and each query and head is in one chunk."""
    q, value_dim = torch.empty(shape), shape[3]
    per_query, per_head = max(2 * keys, keys + 2 * value_dim, 3 * value_dim), 2 * keys * value_dim
    seen, sizes = torch.zeros(shape[:3]), []
    for part, chunks_of_part in eager.chunks(q, per_query=per_query, per_head=per_head, whole_heads=whole_heads):
        for chunk in chunks_of_part:
            seen[chunk] += 1
            sizes.append(seen[chunk].numel())
            assert not whole_heads or seen[part].shape[1] == shape[1]
    assert (seen == 1).all() and len(sizes) == chunks
    assert not sizes or min(sizes) > 0.6 * max(sizes)


@pytest.mark.parametrize(
    "tokens, more", [(1, 0), (8, 0), (15, 0), (16, 0), (60, 0), (77, 3), (154, 6), (256, 0), (513, 15)]
)
def test_keys_are_padded_by_a_sixteenth_at_most(tokens: int, more: int) -> None:
    assert eager.padding(tokens) == more


def test_many_chunks_against_the_reference() -> None:
    shape = Shape(2, 4, 3001, 154, 8)
    q, k, v = cases.qkv(shape)
    mask = cases.random(2, 1, 3001, 154, seed=22) > 0.5
    base = cases.random(*q.shape, seed=20)
    result = guided_attention(q, k, v, GENTLE, mask=mask, base=base)
    expected = reference.guided_attention(q, k, v, GENTLE, mask=mask, base=base)
    assert_close(result, expected, error=2e-3)


@pytest.mark.parametrize("name", ["gentle", "orthogonal-merged", "sparsemax-half"])
@pytest.mark.parametrize("mask", ["bool-per-head", "bool-per-key", "additive"])
def test_split_heads_against_the_reference(mask: str, name: str) -> None:
    """With so many keys each head is a part by itself, unless heads are merged."""
    shape = Shape(2, 3, 20, 700, 64)
    q, k, v = cases.qkv(shape)
    parts = list(eager.chunks(q, per_query=2 * shape.keys, per_head=2 * shape.keys * shape.dim))
    assert len(parts) == shape.batch * shape.heads
    tensor = cases.MASKS[mask](shape)
    base = cases.random(*q.shape, seed=20)
    result = guided_attention(q, k, v, CONFIGS[name], mask=tensor, base=base)
    expected = reference.guided_attention(q, k, v, CONFIGS[name], mask=tensor, base=base)
    assert_close(result, expected, error=5e-5)


# --- inputs and extremes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leaves_its_inputs_alone(dtype: torch.dtype, name: str) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    base, mask = cases.random(*q.shape, seed=20, dtype=dtype), cases.additive_inf(SMALL)
    tensors = (q, k, v, base, mask)
    before = [x.clone() for x in tensors]
    out = guided_attention(q, k, v, CONFIGS[name], mask=mask, base=base)
    out.fill_(7.0)  # nor may the result share memory with them
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_works_in_inference_mode() -> None:
    q, k, v = cases.qkv(SMALL)
    with torch.inference_mode():
        inside = guided_attention(q.clone(), k.clone(), v.clone(), PAPER)
    assert torch.equal(inside, guided_attention(q, k, v, PAPER))


def test_works_on_tensors_that_want_gradients() -> None:
    q, k, v = cases.qkv(SMALL)
    out = guided_attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), PAPER)
    assert not out.requires_grad
    assert torch.equal(out, guided_attention(q.detach(), k.detach(), v.detach(), PAPER))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("std", [1e2, 1e4, 1e8], ids="std={}".format)
def test_huge_logits(std: float, name: str) -> None:
    q, k, v = cases.qkv(Shape(2, 3, 50, 77, 64), std=std)
    out = guided_attention(q, k, v, CONFIGS[name])
    assert torch.isfinite(out).all()
    # S and D lie among the values, so r is at most twice their norm and out a multiple of it (1 + lambda).
    reach = 1 + 2 * (1 + CONFIGS[name].guidance_scale)
    assert out.abs().max() <= reach * v.norm(dim=-1).max() * 3**0.5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
def test_fp16_saturates(name: str, with_base: bool) -> None:
    shape = Shape(1, 4, 40, 77, 8)
    q, k, _ = cases.qkv(shape, dtype=torch.float16)
    v = (cases.random(1, 4, 77, 8, seed=23).sign() * 65504).half()
    base = (cases.random(*q.shape, seed=24).sign() * 65504).half() if with_base else None
    config = dataclasses.replace(CONFIGS[name], norm_threshold=math.inf)
    out = guided_attention(q, k, v, config, base=base)
    expected = reference.guided_attention(q, k, v, config, base=base)
    assert (expected.abs() > 65504).any(), "this case is meant to leave fp16's range"
    assert torch.isfinite(out).all()
    beyond = expected.abs() > 70000
    assert torch.equal(out[beyond].double(), expected[beyond].clamp(-65504, 65504))


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-25, 1e-12, 1e12, 1e18, 1e25, 1e37], ids="size={}".format)
@pytest.mark.parametrize("name", CONFIGS)
def test_values_of_any_size_give_no_nan(name: str, size: float) -> None:
    q, k, v = cases.qkv(SMALL)
    out = guided_attention(q, k, v * torch.tensor(size), CONFIGS[name])
    assert torch.isfinite(out).all()
    assert out.abs().max() <= 500 * size


@PROPERTY
@hypothesis.given(
    shape=ANY_SHAPE,
    seed=SEEDS,
    std=STDS,
    alpha=ALPHAS,
    scale=st.floats(0, 12),
    zeta=st.sampled_from([0.0, 0.5, 1.0]),
    merge=st.booleans(),
    masked=st.sampled_from(["none", "bool-full", "additive-inf", "bool-per-head"]),
    with_base=st.booleans(),
)
def test_any_call_is_finite_and_near_the_reference(
    shape: Shape,
    seed: int,
    std: float,
    alpha: float,
    scale: float,
    zeta: float,
    merge: bool,
    masked: str,
    with_base: bool,
) -> None:
    q, k, v = cases.qkv(shape, seed=seed, std=std**0.5)
    config = GuidanceConfig(guidance_scale=scale, orthogonal_scale=zeta, alpha=alpha, merge_heads=merge)
    mask = None if masked == "none" else MASKS[masked](shape)
    base = cases.random(*q.shape, seed=20) if with_base else None
    result = guided_attention(q, k, v, config, mask=mask, base=base)
    expected = reference.guided_attention(q, k, v, config, mask=mask, base=base)
    sparse, dense = reference.sparse_dense_attention(q, k, v, alpha=alpha, mask=mask)
    axes = (1, 3) if merge else (3,)
    ratio = dense.norm(dim=axes, keepdim=True) / sparse.norm(dim=axes, keepdim=True).clamp_min(1e-30)
    logits = 1.0 + 0.02 * float(reference.attention_logits(q, k).abs().max())
    assert_close(result, expected, error=1e-5 * float(v.abs().max()) * (1 + scale) * (1 + ratio) * logits)
