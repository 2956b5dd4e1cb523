# SPDX-License-Identifier: GPL-3.0-or-later
"""The path for cards, on CPU tensors, against the fp64 reference.

Tests run as on two devices: CUDA, which has all operations of the path, and MPS, which lacks some. A CPU has no product
of half-precision matrices with a result in fp32. It is computed from fp32 copies here, which differs in nothing but the
order of additions.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

import cases
import reference
from cases import LAYOUTS, MASKS, SHAPES, Shape, shape_id
from gag_core import GuidanceConfig, card, eager, guided_attention, guided_joint_attention, numerics
from gag_core.attention import use_implementation
from guided import CONFIGS, GENTLE, PAPER, assert_matches
from properties import ANY_CONFIGS, Call, calls, examples
from tolerances import DTYPES, HALF_DTYPES, WEIGHTS, assert_close

SMALL = Shape(2, 3, 14, 77, 16)
LONG = Shape(2, 2, 9, 500, 16)
entmax: Any = sys.modules["gag_core.entmax"]  # gag_core.entmax is the function


def multiply_wide(a: Tensor, b: Tensor, factor: float, out: Tensor) -> None:
    """Do what ``numerics.multiply_wide`` does, on a CPU."""
    torch.baddbmm(out, a.float(), b.float(), beta=0.0, alpha=factor, out=out)


def as_cuda(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(numerics, "_multiplies_wide", lambda device, dtype: True)
    patch.setattr(numerics, "multiply_wide", multiply_wide)


def as_mps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(card, "sums_in_one_pass", lambda keys, device: False)
    patch.setattr(card, "FREE_OUTPUTS", ())
    patch.setattr(entmax, "FREE_OUTPUTS", ())


@pytest.fixture(autouse=True, params=[as_cuda, as_mps], ids=["as-cuda", "as-mps"])
def _on_a_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    request.param(monkeypatch)
    monkeypatch.setattr(eager, "_is_card", lambda device: True)


# --- guided attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("name", ["paper", "gentle"])
def test_shapes_and_dtypes(name: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_matches(*cases.qkv(shape, dtype=dtype), CONFIGS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, with_base: bool, dtype: torch.dtype) -> None:
    for shape in (SMALL, LONG):
        q, k, v = cases.qkv(shape, dtype=dtype)
        base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
        assert_matches(q, k, v, CONFIGS[name], base=base)


@pytest.mark.parametrize("alpha", [1.05, 1.1, 1.3, 1.5, 1.75, 1.9, 2.0], ids="alpha={}".format)
def test_alphas(alpha: float) -> None:
    for std in (0.3, 1.0, 3.0):
        assert_matches(*cases.qkv(SMALL, std=std), GuidanceConfig(alpha=alpha, guidance_scale=2.0))


@pytest.mark.parametrize("keys", [77, 256, 512], ids="keys={}".format)
def test_many_ties_at_the_edge_of_the_support(keys: int) -> None:
    q, k, v = cases.with_logits(cases.ties_at_the_edge(keys, 1.5), 16)
    result = guided_attention(q, k, v, GENTLE, scale=1.0)
    expected = reference.guided_attention(q, k, v, GENTLE, scale=1.0)
    assert (result.double() - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    arrange = LAYOUTS[layout]
    q, k, v = (arrange(x) for x in cases.qkv(SMALL, dtype=dtype))
    assert_matches(q, k, v, GENTLE)
    assert_matches(q, k, v, GENTLE, base=arrange(cases.random(*q.shape, seed=20, dtype=dtype)))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.01, 0.5, 1.0, 3.0], ids="scale={}".format)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scale(dtype: torch.dtype, scale: float) -> None:
    assert_matches(*cases.qkv(SMALL, dtype=dtype), GENTLE, scale=scale)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
@pytest.mark.parametrize("name", ["paper", "orthogonal-merged", "sparsemax-half"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, name: str, with_base: bool) -> None:
    for shape in (SMALL, LONG):
        q, k, v = cases.qkv(shape, dtype=torch.float16)
        base = cases.random(*q.shape, seed=20, dtype=torch.float16) if with_base else None
        made = MASKS[mask](shape)
        result = guided_attention(q, k, v, CONFIGS[name], mask=made, base=base)
        expected = reference.guided_attention(q, k, v, CONFIGS[name], mask=made, base=base)
        assert_close(result, expected, error=2e-4 * (1 + CONFIGS[name].guidance_scale))


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("mask", ["bool-some-rows-empty", "additive-inf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fully_masked_rows_are_the_hosts(dtype: torch.dtype, mask: str, alpha: float) -> None:
    for shape in (SMALL, LONG):
        q, k, v = cases.qkv(shape, dtype=dtype)
        made, config = MASKS[mask](shape), GuidanceConfig(alpha=alpha)
        base = cases.random(*q.shape, seed=20, dtype=dtype)
        with_base = guided_attention(q, k, v, config, mask=made, base=base)
        without = guided_attention(q, k, v, config, mask=made)
        assert (without[:, :, ::3] == 0).all() and (without[:, :, 1:3] != 0).any()
        assert torch.equal(with_base[:, :, ::3], base[:, :, ::3])


def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in (Shape(2, 4, 301, 77, 8), Shape(1, 3, 90, 700, 64)):
        q, k, v = cases.qkv(shape, dtype=torch.float16)
        mask = MASKS["bool-per-head"](shape)
        whole = guided_attention(q, k, v, GENTLE, mask=mask)
        with monkeypatch.context() as patch:
            patch.setattr(eager, "_CPU_CHUNK", 1 << 15)
            patch.setattr(eager, "_LEAST_CPU_CHUNK", 0)
            parts_of_q = eager.chunks(q, per_query=2 * shape.keys, per_head=shape.keys * shape.dim)
            assert sum(len(chunks) for _, chunks in parts_of_q) > 2
            parts = guided_attention(q, k, v, GENTLE, mask=mask)
        torch.testing.assert_close(parts, whole, rtol=2e-3, atol=1e-4)


def test_leaves_its_inputs_alone() -> None:
    for name, dtype in zip(CONFIGS, (*DTYPES, *DTYPES), strict=False):
        q, k, v = cases.qkv(SMALL, dtype=dtype)
        tensors = (q, k, v, cases.random(*q.shape, seed=20, dtype=dtype), cases.additive_inf(SMALL))
        before = [x.clone() for x in tensors]
        out = guided_attention(q, k, v, CONFIGS[name], base=tensors[3], mask=tensors[4])
        out.fill_(7.0)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("std", [1e2, 1e4, 1e8], ids="std={}".format)
def test_huge_logits(std: float, name: str) -> None:
    for dtype in DTYPES:
        q, k, v = cases.qkv(Shape(2, 3, 50, 77, 40), std=min(std, 1e4 if dtype == torch.float16 else std), dtype=dtype)
        out = guided_attention(q, k, v, CONFIGS[name])
        assert torch.isfinite(out).all()
        reach = 1 + 2 * (1 + CONFIGS[name].guidance_scale)
        assert out.abs().max() <= reach * v.double().norm(dim=-1).max() * 3**0.5


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
    beyond = expected.abs() > 70000
    assert beyond.any() and torch.isfinite(out).all()
    assert torch.equal(out[beyond].double(), expected[beyond].clamp(-65504, 65504))


@examples(400)
@hypothesis.given(call=calls(), config=ANY_CONFIGS)
def test_finite_numbers_give_finite_numbers(call: Call, config: GuidanceConfig) -> None:
    before = [tensor.clone() for tensor in call.tensors]
    out = guided_attention(call.q, call.k, call.v, config, base=call.base, mask=call.mask, scale=call.scale)
    assert torch.isfinite(out).all()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(call.tensors, before, strict=True))


# --- joint attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_joint_attention(name: str, dtype: torch.dtype, with_base: bool, masked: bool) -> None:
    shape, text = Shape(1, 2, 50, 50, 16), slice(7, 30)
    q, k, v = cases.qkv(shape, dtype=dtype, std=1.0)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    mask = MASKS["bool-some-rows-empty"](shape) if masked else None
    result = guided_joint_attention(q, k, v, text, CONFIGS[name], base=base, mask=mask)
    expected = reference.guided_joint_attention(q, k, v, text, CONFIGS[name], base=base, mask=mask)
    rounding = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 0.0)
    assert_close(result, expected, error=2e-4 * (1 + CONFIGS[name].guidance_scale) + (0.0 if with_base else rounding))


@examples(200)
@hypothesis.given(call=calls(joint=True), config=ANY_CONFIGS)
def test_finite_numbers_give_finite_numbers_in_joint_attention(call: Call, config: GuidanceConfig) -> None:
    text = slice(0, max(1, call.shape.keys // 2))
    out = guided_joint_attention(call.q, call.k, call.v, text, config, base=call.base, mask=call.mask, scale=call.scale)
    assert torch.isfinite(out).all()


# --- extreme queries and scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keys", [77, 400])
def test_a_query_that_is_not_finite_spoils_its_own_row_alone(keys: int, bad: float) -> None:
    q, k, v = cases.qkv(Shape(2, 2, 5, keys, 16), dtype=torch.bfloat16)
    clean = guided_attention(q, k, v, GENTLE)
    q[0, 1, 3, 2] = bad
    result = guided_attention(q, k, v, GENTLE)
    result[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(result, clean)


@pytest.mark.parametrize("sizes", [(1e15, 1e15), (1e30, 1e-4), (1e-15, 1e-15), (1e-4, 1e-30)], ids="sizes={}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_may_make_up_for_the_size_of_queries_and_keys(dtype: torch.dtype, sizes: tuple[float, float]) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    q, k = q * sizes[0], k * sizes[1]
    scale = 0.25 / sizes[0] / sizes[1]
    assert_matches(q, k, v, GENTLE, scale=scale)
    assert_matches(q, k, v, GENTLE, scale=-scale, mask=cases.additive_bias(SMALL))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-300, 1e300], ids="scale={}".format)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_any_scale_gives_finite_numbers(dtype: torch.dtype, scale: float) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    for mask in (None, MASKS["bool-some-rows-empty"](SMALL)):
        result = guided_attention(q, k, v, GENTLE, scale=scale, mask=mask)
        assert torch.isfinite(result).all()
        if abs(scale) < 1e-100:  # all weights are the same
            expected = reference.guided_attention(q, k, v, GENTLE, scale=0.0, mask=mask)
            assert_close(result, expected, error=1e-4)


# --- parts of the path ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "bool-some-rows-empty", "additive-inf"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_logsumexp(dtype: torch.dtype, mask: str | None) -> None:
    q, k, _ = cases.qkv(SMALL, dtype=dtype)
    tensor = None if mask is None else MASKS[mask](SMALL)
    result = eager.logsumexp_of_logits(q, k, tensor, 0.25, on_card=True)
    plain = eager.logsumexp_of_logits(q, k, tensor, 0.25, on_card=False)
    torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-5)


def clusters(keys: int, spread: float) -> Tensor:
    """Make logits ``[rows, keys]``: a few keys on top, and clusters of keys about as far below as the threshold."""
    logits = []
    for seed in range(60):
        top, count = 1 + seed % 5, 1 + seed % 3
        centres = 2.0 / math.sqrt(top) * (1.0 + cases.random(count, seed=seed, std=0.2))
        row = -centres[torch.arange(keys) % count] + cases.random(keys, seed=seed + 100, std=spread)
        row[:top] = 0.0
        logits.append(row)
    return torch.stack(logits)


def levels(keys: int, rows: int = 600) -> Tensor:
    """Make logits ``[rows, keys]`` of a few levels, near each other or not, each of which any number of keys has."""
    random = torch.Generator().manual_seed(keys)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random)

    depths = 2.1 * uniform(rows, 5)
    near = depths[:, :1] + (depths - depths[:, :1]) * 10.0 ** (-4.0 * uniform(rows, 1))
    depths = torch.where(uniform(rows, 1) < 0.5, depths, near) * 10.0 ** (-2.0 * uniform(rows, 1)).clamp(max=0.3)
    shares = keys ** uniform(rows, 5)
    level = torch.multinomial(shares, keys, replacement=True, generator=random)
    logits = -depths.gather(1, level)
    logits[:, 0] = 0.0
    return logits


@pytest.mark.parametrize("spare", [0, 1, 4], ids=["newton", "sums-1", "sums-4"])
@pytest.mark.parametrize("keys", [1, 2, 16, 77, 256, 384, 512, 764, 1024])
def test_square_weights(keys: int, spare: int) -> None:
    """Also for rows in which the search is slow: equal keys, and clusters of nearly equal keys, near the threshold."""
    rows = [cases.random(20, keys, seed=keys, std=std) for std in (0.01, 0.1, 0.3, 1.0, 3.0, 30.0)]
    if keys > 8:
        rows += [levels(keys), cases.ties_at_the_edge(keys, 1.5)]
        rows += [clusters(keys, spread) for spread in (0.001, 0.01, 0.1)]
    for logits in rows:
        weights = square_weights(logits, spare)
        expected = reference.entmax(logits, 1.5)
        # The threshold is rounded, and a CPU adds up the numbers of a row one by one in the multi-margin loss.
        assert_close(weights, expected, error=WEIGHTS + (keys * 2.0**-26 if spare else 0.0))
        assert (weights.double() - expected).abs().sum(-1).max() < 2e-5 + keys * 2.0**-26
    exact = square_weights(rows[-1].double(), spare)
    assert (exact - reference.entmax(rows[-1], 1.5)).abs().sum(-1).max() < 3e-6


@pytest.mark.parametrize("spare", [0, 1, 4], ids=["newton", "sums-1", "sums-4"])
@pytest.mark.parametrize("keys", [2, 77, 512])
def test_masked_keys_weigh_exactly_nothing(keys: int, spare: int) -> None:
    """Rounding may put the threshold below -2, where it would be if one key had all the weight."""
    for std in (1.0, 10.0, 100.0):
        logits = cases.random(300, keys, seed=keys, std=std)
        logits[:, 1::2] = -math.inf
        weights = square_weights(logits, spare)
        assert (weights[:, 1::2] == 0.0).all()
        assert_close(weights.sum(-1), torch.ones(300), error=1e-6)


def square_weights(logits: Tensor, spare: int) -> Tensor:
    """Compute 1.5-entmax by ``entmax.square_weights``."""
    maximum = logits.amax(-1, keepdim=True)
    given = torch.cat((logits, torch.full_like(logits[:, :1], math.nan).expand(-1, spare)), dim=-1)
    weights = entmax.square_weights(given, maximum, spare)
    after = torch.cat((logits, torch.full_like(logits[:, :1], -math.inf).expand(-1, spare)), dim=-1)
    assert torch.equal(given, after if spare else logits - maximum)
    return (weights / weights.sum(-1, keepdim=True))[:, : logits.shape[1]]


def test_a_maximum_beyond_the_range_of_logits() -> None:
    """The product of scale and logits may overflow; a key on top takes everything then."""
    q = torch.full((1, 1, 2, 4), 3e38, dtype=torch.bfloat16)
    q[..., 1, :] *= -1.0
    k = (3e38 * torch.linspace(-1.0, 1.0, 9)).to(torch.bfloat16).view(1, 1, 9, 1).expand(1, 1, 9, 4)
    v = torch.arange(9.0, dtype=torch.bfloat16).view(1, 1, 9, 1).expand(1, 1, 9, 4)
    out = guided_attention(q, k, v, GuidanceConfig(), scale=1e30)
    assert torch.equal(out[0, 0, 0], v[0, 0, 8].expand(4)) and torch.equal(out[0, 0, 1], v[0, 0, 0].expand(4))


# --- the choice of the path -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, on_card", [("cpu", False), ("cuda", True), ("mps", True), ("meta", True)])
def test_the_device_chooses(device: str, on_card: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert eager._is_card(torch.device(device)) == on_card


def test_a_caller_may_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(card, "guided_chunk", lambda *args: called.append(args))
    q, k, v = cases.qkv(SMALL)
    for on_card in (False, True):
        with use_implementation(partial(eager.guide, on_card=on_card)):
            guided_attention(q, k, v, PAPER)
        assert bool(called) == on_card


def test_forward_mode_differentiation_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chosen = []

    def attend(queries: Tensor) -> Tensor:
        chosen.append(eager._is_card(torch.device("cuda")))
        return queries * 2.0

    x = torch.ones(3)
    jvp: Any = torch.func.jvp
    jvp(attend, (x,), (x,))
    assert chosen == [False]


@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32], ids=str)
def test_a_cpu_has_no_wide_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not numerics.has_wide_products(torch.zeros(1, dtype=dtype))


def test_sums_in_fp16_rule_wide_products_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's option "fp16_accumulation" sets this switch of torch, which would sum products of fp16 in fp16."""
    monkeypatch.setattr(numerics, "_multiplies_wide", lambda device, dtype: True)
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "allow_fp16_accumulation"):
        pytest.skip("this torch lacks the switch")
    before = matmul.allow_fp16_accumulation
    try:
        matmul.allow_fp16_accumulation = True
        found = [numerics.has_wide_products(torch.zeros(1, dtype=dtype)) for dtype in HALF_DTYPES]
    finally:
        matmul.allow_fp16_accumulation = before
    assert found == [False, True]
