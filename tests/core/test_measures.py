# SPDX-License-Identifier: GPL-3.0-or-later
"""The measures of a probe against plain an fp64 reference, and finite results for all finite inputs."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import cases
import measures_reference
import reference
from gag_core import GuidanceConfig, combine, guided_attention, sparse_dense_attention
from gag_core.eager import chunks
from gag_core.measures import MEASURES, measure, sample_queries, word_shares
from properties import ALPHAS, SEEDS, Call, calls, examples

NAMES = list(MEASURES)
CONFIGS = {
    "paper": GuidanceConfig(norm_threshold=1.5),
    "gentle": GuidanceConfig(guidance_scale=2.0, norm_threshold=0.1, norm_mode="relative"),
    "orthogonal": GuidanceConfig(orthogonal_scale=0.5, norm_threshold=0.8),
    "merged heads": GuidanceConfig(merge_heads=True, norm_mode="relative", norm_threshold=0.2, strength=0.5),
    "pladis": GuidanceConfig(rule="pladis", alpha=2.0, guidance_scale=2.0),
    "no cap": GuidanceConfig(norm_threshold=math.inf, alpha=1.25),
    "uniform": GuidanceConfig(rule="uniform", guidance_scale=0.5, strength=0.8),
    "uniform, merged heads": GuidanceConfig(rule="uniform", guidance_scale=-2.0, merge_heads=True),
}
SHAPES = [cases.Shape(2, 3, 7, 5, 8), cases.Shape(1, 2, 5, 1, 4), cases.Shape(1, 4, 9, 77, 16)]
# Averages of fp32 numbers. A token at the border of the cap or of the support may fall on the other side.
CLOSE = 2e-4


def check(actual: Tensor, expected: dict[str, list[float]], close: float = CLOSE) -> None:
    assert torch.isfinite(actual).all()
    for index, name in enumerate(NAMES):
        wanted = torch.tensor(expected[name], dtype=torch.float64)
        off = (actual[:, index].double() - wanted).abs()
        assert (off <= close * (1.0 + wanted.abs())).all(), (
            f"{name}: {actual[:, index].tolist()}, not {wanted.tolist()}"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=cases.shape_id)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_reference(config: GuidanceConfig, shape: cases.Shape) -> None:
    q, k, v = cases.qkv(shape, seed=3)
    check(measure(q, k, v, config), measures_reference.measures(q, k, v, config))


@pytest.mark.parametrize("name", ["gentle", "uniform"])
@pytest.mark.parametrize("mask", cases.MASKS)
def test_equals_the_reference_with_masks(mask: str, name: str) -> None:
    shape = cases.Shape(2, 3, 7, 5, 8)
    q, k, v = cases.qkv(shape, seed=4)
    given = cases.MASKS[mask](shape)
    given = given[(None,) * (4 - given.ndim)]
    config = CONFIGS[name]
    check(measure(q, k, v, config, mask=given), measures_reference.measures(q, k, v, config, mask=given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_equals_the_reference_in_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in cases.qkv(SHAPES[0], seed=5))
    out = measure(q, k, v, CONFIGS["gentle"])
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(out, measures_reference.measures(q, k, v, CONFIGS["gentle"]))


@pytest.mark.parametrize("name", ["gentle", "uniform"])
def test_scale_and_mass_of_a_joint_attention(name: str) -> None:
    q, k, v = cases.qkv(cases.Shape(2, 3, 7, 12, 8), seed=6)
    text = slice(0, 5)
    lse = reference.attention_logits(q, k, None, 0.7).logsumexp(-1).float()
    out = measure(q, k[:, :, text], v[:, :, text], CONFIGS[name], scale=0.7, joint_lse=lse)
    mass = reference.text_mass(q, k, text, scale=0.7)
    expected = measures_reference.measures(q, k[:, :, text], v[:, :, text], CONFIGS[name], scale=0.7, mass=mass)
    check(out, expected)
    assert 0.0 < float(out[0, NAMES.index("mass")]) < 1.0


@pytest.mark.parametrize("settings", [{}, {"merge_heads": True}, {"anderson_depth": 3}, {"orthogonal_scale": 0.5}])
def test_gain_and_cap_of_rule_anderson_are_those_of_its_result(settings: dict[str, object]) -> None:
    q, k, v = cases.qkv(SHAPES[0], seed=7)
    config = GuidanceConfig(rule="anderson", guidance_scale=3.0, norm_threshold=0.02, norm_mode="relative", **settings)  # type: ignore[arg-type]
    out = dict(zip(NAMES, measure(q, k, v, config)[0].tolist(), strict=True))
    as_gag = dict(zip(NAMES, measure(q, k, v, dataclasses.replace(config, rule="gag"))[0].tolist(), strict=True))
    assert {name for name in NAMES if out[name] != as_gag[name]} <= {"gain", "capped"}
    dense = sparse_dense_attention(q, k, v)[1]
    change = guided_attention(q, k, v, config) - dense
    axes = (0, 1, 2) if config.merge_heads else (1, 2)
    square = [(x[0].double() ** 2).sum(axes) for x in (change, dense)]
    assert out["gain"] == pytest.approx(float((square[0] / square[1]).sqrt().mean()), rel=1e-4)
    assert 0.0 < out["capped"] <= 1.0
    wide = dataclasses.replace(config, norm_threshold=1e6)
    assert measure(q, k, v, wide)[0, NAMES.index("capped")] == 0.0


@examples(60)
@hypothesis.given(seed=SEEDS, alpha=ALPHAS, std=st.sampled_from([0.3, 1.0, 3.0]))
def test_identities(seed: int, alpha: float, std: float) -> None:
    q, k, v = cases.qkv(cases.Shape(1, 2, 6, 9, 8), seed=seed, std=std)
    out = dict(zip(NAMES, measure(q, k, v, GuidanceConfig(alpha=alpha))[0].tolist(), strict=True))
    assert 0.0 <= out["parallel"] <= 1.0 + 1e-6
    assert 1.0 <= out["support"] <= 9.0
    # The entropy of each query is at most the log of its support, and the mean of logs at most the log of the mean.
    assert out["entropy_sparse"] <= math.log(out["support"]) + 1e-5
    # Sparse weights are more peaked than dense ones.
    assert out["entropy_sparse"] <= out["entropy_dense"] + 1e-4
    assert out["entropy_dense"] <= math.log(9.0) + 1e-5
    assert out["mass"] == 1.0
    pladis = measure(q, k, v, GuidanceConfig(rule="pladis", guidance_scale=2.0, alpha=alpha))[0]
    assert float(pladis[NAMES.index("gain")]) == pytest.approx(2.0 * out["discrepancy"], rel=1e-4, abs=1e-6)


def test_alpha_1_has_no_discrepancy() -> None:
    q, k, v = cases.qkv(SHAPES[0], seed=8)
    out = dict(zip(NAMES, measure(q, k, v, GuidanceConfig(alpha=1.0))[0].tolist(), strict=True))
    assert all(out[name] == 0.0 for name in ("discrepancy", "gain", "parallel", "negative", "capped"))
    assert out["entropy_sparse"] == out["entropy_dense"]


def test_contraction_does_not_depend_on_changes_that_attention_does_not_see() -> None:
    q, k, v = cases.qkv(SHAPES[2], seed=9)
    index = NAMES.index("contraction")

    def contraction(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> float:
        return float(measure(q, k, v, CONFIGS["gentle"], scale=scale)[0, index])

    plain = contraction(q, k, v)
    turn = torch.linalg.qr(cases.random(16, 16, seed=10))[0]
    assert contraction(8 * q, k / 8, v) == pytest.approx(plain, rel=1e-4)
    assert contraction(8 * q, k, v, scale=0.25 / 8) == pytest.approx(plain, rel=1e-4)
    assert contraction(q, k + cases.random(1, 4, 1, 16, seed=11), v) == pytest.approx(plain, rel=1e-3)
    assert contraction(q @ turn, k @ turn, v) == pytest.approx(plain, rel=1e-4)
    assert contraction(q, 3 * k, v) != pytest.approx(plain, rel=1e-2)


@examples(300)
@hypothesis.given(call=calls(), config=st.sampled_from(list(CONFIGS.values())), joint=st.booleans())
def test_measures_are_finite(call: Call, config: GuidanceConfig, joint: bool) -> None:
    mask = None if call.mask is None else call.mask[(None,) * (4 - call.mask.ndim)]
    lse = None
    if joint:
        work = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        lse = torch.zeros(call.q.shape[:3], dtype=work)
    out = measure(call.q, call.k, call.v, config, mask=mask, scale=call.scale, joint_lse=lse)
    assert out.shape == (call.q.shape[0], len(NAMES))
    assert torch.isfinite(out).all()
    for name in ("parallel", "negative", "capped", "mass"):
        assert (out[:, NAMES.index(name)] <= 1.0 + 1e-5).all()
    assert (out >= -1e-5).all()


@pytest.mark.parametrize(("tokens", "most"), [(0, 8), (1, 8), (8, 8), (9, 8), (64, 64), (4096, 128), (32760, 128)])
def test_a_sample_is_of_different_tokens_in_order(tokens: int, most: int) -> None:
    picked = sample_queries(tokens, most)
    assert len(picked) == min(tokens, most)
    assert (picked.diff() > 0).all()
    assert set(picked.tolist()) <= set(range(tokens))


@pytest.mark.parametrize("width", [16, 24, 32, 40, 52, 64, 80, 96, 128, 168])
@pytest.mark.parametrize("height", [48, 64, 96])
def test_a_sample_falls_into_all_parts_of_a_picture(width: int, height: int) -> None:
    """Each quarter of the columns and rows gets its share within a half, and no field of a 4 x 4 grid is empty."""
    picked = sample_queries(width * height, 128)
    for quarter in (picked % width * 4 // width, picked // width * 4 // height):
        shares = torch.bincount(quarter, minlength=4) / len(picked)
        assert (shares - 0.25).abs().max() < 0.125, shares
    fields = torch.bincount(picked % width * 4 // width + 4 * (picked // width * 4 // height), minlength=16)
    assert (fields > 0).all(), fields


def test_word_shares_equal_the_reference() -> None:
    shape = cases.Shape(2, 3, 11, 7, 8)
    q, k, _ = cases.qkv(shape, seed=12)
    words = [(1,), (2, 3), (5, 6, 0)]
    columns = torch.zeros(7, 3)
    for index, word in enumerate(words):
        columns[list(word), index] = 1.0
    for mask in (None, cases.bool_some_rows_empty(shape)):
        out = word_shares(q, k, columns, mask=mask)
        torch.testing.assert_close(out.double(), measures_reference.word_shares(q, k, words, mask), atol=2e-6, rtol=0)


def test_word_shares_in_chunks_equal_the_reference() -> None:
    shape = cases.Shape(3, 4, 700, 77, 16)
    q, k, _ = cases.qkv(shape, seed=12)
    assert len(list(chunks(q, per_query=2 * 77, per_head=77 * 16, whole_heads=True))) == shape.batch
    mask, words = cases.bool_per_key(shape), [(1,), (2, 3), (76, 0)]
    columns = torch.zeros(77, 3)
    for index, word in enumerate(words):
        columns[list(word), index] = 1.0
    out = word_shares(q, k, columns, mask=mask)
    torch.testing.assert_close(out.double(), measures_reference.word_shares(q, k, words, mask), atol=2e-6, rtol=0)


def test_word_shares_of_all_tokens_are_one() -> None:
    q, k, _ = cases.qkv(cases.Shape(1, 2, 300, 77, 16), seed=13)
    torch.testing.assert_close(word_shares(q, k, torch.ones(77, 1)), torch.ones(1, 1, 300))


def test_the_gain_is_that_of_combine() -> None:
    q, k, v = cases.qkv(SHAPES[0], seed=14)
    config = CONFIGS["paper"]
    sparse, dense = sparse_dense_attention(q, k, v)
    change = combine(sparse, dense, config) - dense
    square = [(x.double() ** 2).sum((2, 3)) for x in (change, dense)]
    expected = (square[0] / square[1]).sqrt().mean(1)
    torch.testing.assert_close(measure(q, k, v, config)[:, NAMES.index("gain")].double(), expected, rtol=1e-4, atol=0)


def test_another_type_of_config_is_refused() -> None:
    q, k, v = cases.qkv(SHAPES[1])
    with pytest.raises(TypeError, match=r"config must be a GuidanceConfig, got dict\."):
        measure(q, k, v, {})  # type: ignore[arg-type]
