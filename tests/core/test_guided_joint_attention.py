# SPDX-License-Identifier: GPL-3.0-or-later
"""guided_joint_attention: only image queries on text keys are guided, at constant text mass."""

from __future__ import annotations

import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import cases
import reference
from cases import LAYOUTS, MASKS, Shape
from gag_core import GuidanceConfig, guided_attention, guided_joint_attention
from gag_core.eager import chunks, logsumexp_of_logits
from properties import PROPERTY, SEEDS
from tolerances import DTYPES, ROUNDING, assert_close
from work import WorkCounter

PAPER = GuidanceConfig()
GENTLE = GuidanceConfig(guidance_scale=2.0, norm_mode="relative", norm_threshold=0.1)
CONFIGS = {
    "paper": PAPER,
    "gentle": GENTLE,
    "orthogonal-merged": GuidanceConfig(orthogonal_scale=0.5, norm_threshold=2.0, merge_heads=True),
    "pladis": GuidanceConfig(rule="pladis", guidance_scale=2.0),
    "sparsemax-half": GuidanceConfig(alpha=2.0, strength=0.5, guidance_scale=3.0),
}
TOKENS = 40
SHAPE = Shape(2, 3, TOKENS, TOKENS, 16)
TEXTS = {
    "first": slice(0, 13),
    "first-open": slice(None, 13),
    "last": slice(TOKENS - 13, TOKENS),
    "last-open": slice(TOKENS - 13, None),
    "middle": slice(11, 24),
    "one-token": slice(5, 6),
    "all-but-one": slice(1, TOKENS),
    "all": slice(0, TOKENS),
}


def is_text(text: slice, tokens: int = TOKENS) -> Tensor:
    flags = torch.zeros(tokens, dtype=torch.bool)
    flags[text] = True
    return flags


def error_of(q: Tensor, v: Tensor, config: GuidanceConfig, with_base: bool) -> float:
    error = 5e-5 * float(v.double().abs().max()) * (1 + config.guidance_scale)
    if not with_base and q.dtype in (torch.float16, torch.bfloat16):
        # torch's own attention rounds its weights to the dtype, and that is the host's output.
        error += 2 * ROUNDING[q.dtype] * float(v.double().abs().max())
    return error


def assert_matches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: slice | list[slice],
    config: GuidanceConfig,
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    out = guided_joint_attention(q, k, v, text, config, base=base, mask=mask, scale=scale)
    expected = reference.guided_joint_attention(q, k, v, text, config, base=base, mask=mask, scale=scale)
    assert out.dtype == q.dtype
    assert_close(out, expected, error=error_of(q, v, config, base is not None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_anywhere(text: str, with_base: bool, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(SHAPE, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    assert_matches(q, k, v, TEXTS[text], GENTLE, base=base)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("text", ["first", "middle"])
def test_configs(text: str, name: str, with_base: bool) -> None:
    q, k, v = cases.qkv(SHAPE)
    base = cases.random(*q.shape, seed=20) if with_base else None
    assert_matches(q, k, v, TEXTS[text], CONFIGS[name], base=base)


@pytest.mark.parametrize(
    "shape, text",
    [
        (Shape(1, 1, 2, 2, 4), slice(0, 1)),
        (Shape(4, 1, 7, 7, 160), slice(5, 7)),
        (Shape(1, 24, 150, 150, 128), slice(0, 77)),
        (Shape(1, 2, 700, 700, 64), slice(0, 512)),
        (Shape(1, 20, 300, 300, 8), slice(223, 300)),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
def test_shapes(shape: Shape, text: slice, with_base: bool) -> None:
    q, k, v = cases.qkv(shape)
    base = cases.random(*q.shape, seed=20) if with_base else None
    assert_matches(q, k, v, text, GENTLE, base=base)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, with_base: bool, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(SHAPE, dtype=dtype)
    arrange = LAYOUTS[layout]
    base = arrange(cases.random(*q.shape, seed=20, dtype=dtype)) if with_base else None
    assert_matches(arrange(q), arrange(k), arrange(v), TEXTS["first"], GENTLE, base=base)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0], ids="scale={}".format)
def test_scale(scale: float, with_base: bool) -> None:
    q, k, v = cases.qkv(SHAPE)
    base = cases.random(*q.shape, seed=20) if with_base else None
    assert_matches(q, k, v, TEXTS["first"], GENTLE, base=base, scale=scale)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["first", "last", "middle"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, text: str, dtype: torch.dtype, with_base: bool) -> None:
    q, k, v = cases.qkv(SHAPE, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    assert_matches(q, k, v, TEXTS[text], GENTLE, base=base, mask=cases.cast_mask(MASKS[mask](SHAPE), dtype))


# --- several text slices, and fewer queries than keys -------------------------------------------------------------

SEVERAL: dict[str, list[slice]] = {
    "two": [slice(0, 9), slice(20, 31)],
    "three, up to the end": [slice(2, 3), slice(11, 24), slice(30, None)],
    "neighbours": [slice(None, 5), slice(5, 13)],
    "all": [slice(0, 30), slice(30, TOKENS)],
    "every other": [slice(n, n + 1) for n in range(0, TOKENS, 2)],
}
# The last 17 tokens of the sequence ask alone, as the picture's tokens do after a prefix of text.
FEWER = Shape(2, 3, 17, TOKENS, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("shape", [SHAPE, FEWER], ids=["equal", "fewer"])
@pytest.mark.parametrize("text", SEVERAL)
def test_several_text_slices(text: str, shape: Shape, with_base: bool, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(shape, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    assert_matches(q, k, v, SEVERAL[text], GENTLE, base=base)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["two", "three, up to the end"])
@pytest.mark.parametrize("shape", [SHAPE, FEWER], ids=["equal", "fewer"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_several_text_slices(mask: str, shape: Shape, text: str, dtype: torch.dtype, with_base: bool) -> None:
    q, k, v = cases.qkv(shape, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    assert_matches(q, k, v, SEVERAL[text], GENTLE, base=base, mask=cases.cast_mask(MASKS[mask](shape), dtype))


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [SHAPE, FEWER], ids=["equal", "fewer"])
def test_configs_with_several_text_slices(shape: Shape, name: str, with_base: bool) -> None:
    q, k, v = cases.qkv(shape)
    base = cases.random(*q.shape, seed=20) if with_base else None
    assert_matches(q, k, v, SEVERAL["two"], CONFIGS[name], base=base, scale=0.3)


@pytest.mark.parametrize(
    "shape, text",
    [
        (Shape(1, 1, 1, 2, 4), slice(0, 1)),
        (Shape(4, 1, 5, 7, 160), slice(1, 7)),
        (Shape(1, 20, 36, 121, 64), slice(36, 113)),
        (Shape(1, 2, 300, 900, 64), slice(0, 600)),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
def test_fewer_queries_than_keys(shape: Shape, text: slice, with_base: bool) -> None:
    q, k, v = cases.qkv(shape)
    base = cases.random(*q.shape, seed=20) if with_base else None
    assert_matches(q, k, v, text, GENTLE, base=base)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
def test_fewer_queries_are_all_image_queries(with_base: bool) -> None:
    """They get what they get in the whole sequence, even where their indices are those of text keys."""
    q, k, v = cases.qkv(SHAPE)
    base = cases.random(*q.shape, seed=20) if with_base else None
    part = slice(TOKENS - FEWER.queries, TOKENS)
    for text in (TEXTS["first"], SEVERAL["neighbours"]):
        whole = guided_joint_attention(q, k, v, text, PAPER, base=base)[:, :, part]
        alone = guided_joint_attention(
            q[:, :, part], k, v, text, PAPER, base=None if base is None else base[:, :, part]
        )
        torch.testing.assert_close(alone, whole, atol=1e-4, rtol=1e-4)
        assert (alone != (q[:, :, part] if base is None else base[:, :, part])).any(dim=(1, 3)).all()


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_slice_in_a_list_or_cut_in_two_is_that_slice(name: str, with_base: bool) -> None:
    q, k, v = cases.qkv(SHAPE)
    base = cases.random(*q.shape, seed=20) if with_base else None
    mask = MASKS["additive-inf"](SHAPE)

    def computed(text: slice | list[slice] | tuple[slice, ...]) -> Tensor:
        return guided_joint_attention(q, k, v, text, CONFIGS[name], base=base, mask=mask)

    one = computed(slice(4, 20))
    assert torch.equal(computed([slice(4, 20)]), one)
    torch.testing.assert_close(computed((slice(4, 11), slice(11, 20))), one, atol=1e-5, rtol=1e-5)


def test_text_between_slices_counts_as_image() -> None:
    """Its queries are guided, and its keys have no part in S and D."""
    q, k, v = cases.qkv(SHAPE)
    base = cases.random(*q.shape, seed=20)
    text = SEVERAL["two"]
    out = guided_joint_attention(q, k, v, text, GENTLE, base=base)
    changed = (out != base).any(dim=3).all(dim=(0, 1))
    assert torch.equal(changed, ~(is_text(text[0]) | is_text(text[1])))
    other = v.clone()
    other[:, :, 9:20] = 100.0
    assert torch.equal(guided_joint_attention(q, k, other, text, GENTLE, base=base), out)


def test_no_query() -> None:
    q, k, v = cases.qkv(FEWER)
    for base in (None, q[:, :, :0]):
        assert guided_joint_attention(q[:, :, :0], k, v, slice(0, 4), PAPER, base=base).shape == (2, 3, 0, 16)


# --- what must not change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_text_rows_are_the_hosts_bit_for_bit(name: str, text: str, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(SHAPE, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype)
    out = guided_joint_attention(q, k, v, TEXTS[text], CONFIGS[name], base=base)
    rows = is_text(TEXTS[text])
    assert torch.equal(out[:, :, rows], base[:, :, rows])
    if not rows.all() and rows.sum() > 1:
        assert (out[:, :, ~rows] != base[:, :, ~rows]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_off_is_base_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(SHAPE, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype)
    off = dataclasses.replace(CONFIGS[name], strength=0.0)
    assert torch.equal(guided_joint_attention(q, k, v, TEXTS["first"], off, base=base), base)


@pytest.mark.parametrize("text", ["first", "middle"])
def test_off_or_alpha_one_is_joint_attention(text: str) -> None:
    q, k, v = cases.qkv(SHAPE)
    joint = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for config in (GuidanceConfig(strength=0.0), GuidanceConfig(alpha=1.0)):
        torch.testing.assert_close(guided_joint_attention(q, k, v, TEXTS[text], config), joint, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_guidance_does_not_depend_on_the_image_values(name: str) -> None:
    """Other image values leave the text mass and the text read-outs, so also the guidance that is added."""
    q, k, v = cases.qkv(SHAPE)
    base = cases.random(*q.shape, seed=20)
    other = v.clone()
    other[:, :, ~is_text(TEXTS["first"])] = 100 * cases.random(2, 3, TOKENS - 13, 16, seed=25)
    out, changed = (
        guided_joint_attention(q, k, values, TEXTS["first"], CONFIGS[name], base=base) for values in (v, other)
    )
    assert torch.equal(out, changed)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
def test_leaves_its_inputs_alone(with_base: bool) -> None:
    q, k, v = cases.qkv(SHAPE)
    mask = cases.additive_inf(SHAPE)
    base = cases.random(*q.shape, seed=20)
    tensors = (q, k, v, mask, base)
    before = [x.clone() for x in tensors]
    out = guided_joint_attention(q, k, v, TEXTS["middle"], PAPER, base=base if with_base else None, mask=mask)
    out.fill_(7.0)  # nor may the result share memory with them
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_works_in_inference_mode() -> None:
    q, k, v = cases.qkv(SHAPE)
    with torch.inference_mode():
        inside = guided_joint_attention(q.clone(), k.clone(), v.clone(), TEXTS["first"], PAPER)
    assert torch.equal(inside, guided_joint_attention(q, k, v, TEXTS["first"], PAPER))


# --- the text mass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("masked", ["unmasked", "bool-full", "additive"])
@pytest.mark.parametrize("text", ["first", "last", "middle", "all-but-one"])
def test_the_mass_is_the_joint_softmax_on_text(text: str, masked: str, with_base: bool) -> None:
    """m is recovered from the result as the length of its step along GAG(S_T, D_T) - D_T."""
    q, k, v = cases.qkv(SHAPE)
    part = TEXTS[text]
    rows = ~is_text(part)
    mask = None if masked == "unmasked" else MASKS[masked](SHAPE)
    text_mask = None if mask is None else mask.expand(2, 3, TOKENS, TOKENS)[:, :, :, part]
    joint = reference.guided_joint_attention(q, k, v, part, GuidanceConfig(strength=0.0), mask=mask)
    base = joint.float() if with_base else None
    out = guided_joint_attention(q, k, v, part, PAPER, base=base, mask=mask).double()
    sparse, dense = reference.sparse_dense_attention(q, k[:, :, part], v[:, :, part], mask=text_mask)
    step = reference.extrapolate(sparse, dense, PAPER) - dense
    mass = ((out - joint) * step).sum(-1, keepdim=True) / (step * step).sum(-1, keepdim=True)
    expected = reference.text_mass(q, k, part, mask=mask)
    moved = rows[:, None] & (step.norm(dim=-1, keepdim=True) > 1e-2)
    assert moved.sum() > 2
    assert_close(mass[moved], expected[moved], error=2e-3)
    assert expected[moved].max() - expected[moved].min() > 0.05


def test_a_text_mass_of_one_is_guided_attention_over_the_text() -> None:
    """Image keys are masked for image queries, so that they read only text."""
    q, k, v = cases.qkv(SHAPE)
    text = TEXTS["first"]
    rows = ~is_text(text)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[rows] = is_text(text)
    base = cases.random(*q.shape, seed=20)
    for name, config in CONFIGS.items():
        alone = guided_attention(q[:, :, rows], k[:, :, text], v[:, :, text], config, base=base[:, :, rows])
        joint = guided_joint_attention(q, k, v, text, config, base=base, mask=mask)
        torch.testing.assert_close(joint[:, :, rows], alone, atol=1e-4, rtol=1e-4, msg=name)
        own = guided_joint_attention(q, k, v, text, config, mask=mask)
        alone = guided_attention(q[:, :, rows], k[:, :, text], v[:, :, text], config)
        torch.testing.assert_close(own[:, :, rows], alone, atol=1e-4, rtol=1e-4, msg=name)


def test_a_text_mass_of_nearly_one_is_guided_attention_over_the_text() -> None:
    """Without a mask, the logits of image keys are so low here that their weight vanishes."""
    q, k, v = cases.qkv(SHAPE)
    text = TEXTS["last"]
    rows = ~is_text(text)
    q[..., 0], k[..., 0] = 30.0, 0.0
    k[:, :, rows, 0] = -30.0
    alone = guided_attention(q[:, :, rows], k[:, :, text], v[:, :, text], PAPER)
    joint = guided_joint_attention(q, k, v, text, PAPER)
    torch.testing.assert_close(joint[:, :, rows], alone, atol=1e-3, rtol=1e-3)


def test_a_text_mass_of_zero_leaves_the_host_alone() -> None:
    q, k, v = cases.qkv(SHAPE)
    text = TEXTS["first"]
    q[..., 0], k[..., 0] = 300.0, 0.0
    k[:, :, text, 0] = -300.0
    base = cases.random(*q.shape, seed=20)
    assert torch.equal(guided_joint_attention(q, k, v, text, PAPER, base=base), base)


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_rows_that_may_read_no_text(additive: bool, alpha: float, with_base: bool) -> None:
    """Some image queries see no text key, some no key at all."""
    q, k, v = cases.qkv(SHAPE)
    text = TEXTS["first"]
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[20:25, text] = False
    mask[30:33] = False
    mask[2] = False
    made = torch.zeros(TOKENS, TOKENS).masked_fill(~mask, -torch.inf) if additive else mask
    config = GuidanceConfig(alpha=alpha)
    base = cases.random(*q.shape, seed=20) if with_base else None
    out = guided_joint_attention(q, k, v, text, config, base=base, mask=made)
    expected = reference.guided_joint_attention(q, k, v, text, config, base=base, mask=made)
    assert_close(out, expected, error=1e-3)
    if base is not None:
        assert torch.equal(out[:, :, 20:25], base[:, :, 20:25]) and torch.equal(out[:, :, 30:33], base[:, :, 30:33])
    else:
        assert (out[:, :, 30:33] == 0).all() and (out[:, :, 2] == 0).all()


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("std", [1e2, 1e3, 1e4], ids="std={}".format)
def test_huge_logits(std: float, dtype: torch.dtype, with_base: bool) -> None:
    """exp(lse_T - lse_all) of logits of 1e9 is a difference of roundings: the mass must stay within 0 and 1."""
    shape = Shape(1, 4, 200, 200, 40)  # a default scale that rounds: where it is applied then matters
    q, k, v = cases.qkv(shape, std=std, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    out = guided_joint_attention(q, k, v, slice(0, 77), PAPER, base=base)
    assert torch.isfinite(out).all()
    assert out.abs().max() <= 30 * v.double().norm(dim=-1).max()


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("offset", [1e6, 1e7, 3e7], ids="offset={}".format)
def test_the_mass_never_exceeds_one(offset: float, with_base: bool) -> None:
    """Logits are far from 0 but near each other: the roundings of lse_T - lse_all must not count as mass."""
    shape = Shape(1, 4, 120, 120, 40)
    q, k, v = cases.qkv(shape)
    q[..., 0] = k[..., 0] = (offset * 40**0.5) ** 0.5
    text, rows = slice(0, 110), slice(110, 120)
    base = cases.random(*q.shape, seed=20) if with_base else None
    out = guided_joint_attention(q, k, v, text, PAPER, base=base)[:, :, rows]
    start = base if base is not None else guided_joint_attention(q, k, v, text, GuidanceConfig(strength=0.0))
    text_only = q[:, :, rows], k[:, :, text], v[:, :, text]
    step = guided_attention(*text_only, PAPER) - guided_attention(*text_only, GuidanceConfig(strength=0.0))
    mass = ((out - start[:, :, rows]) * step).sum(-1) / (step * step).sum(-1)
    assert step.norm(dim=-1).min() > 1e-3
    assert (mass <= 1.001).all(), f"a mass of {mass.max():.3g}"


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
def test_fp16_saturates(with_base: bool) -> None:
    q, k, _ = cases.qkv(SHAPE, dtype=torch.float16)
    v = (cases.random(2, 3, TOKENS, 16, seed=23).sign() * 65504).half()
    base = (cases.random(*q.shape, seed=24).sign() * 65504).half() if with_base else None
    config = GuidanceConfig(norm_threshold=float("inf"))
    expected = reference.guided_joint_attention(q, k, v, TEXTS["all-but-one"], config, base=base)
    assert (expected.abs() > 65504).any(), "this case is meant to leave fp16's range"
    assert torch.isfinite(guided_joint_attention(q, k, v, TEXTS["all-but-one"], config, base=base)).all()


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
def test_many_chunks(with_base: bool) -> None:
    """Long enough for several chunks on both sides of the text, with a mask per query."""
    shape = Shape(1, 4, 1500, 1500, 8)
    q, k, v = cases.qkv(shape)
    base = cases.random(*q.shape, seed=20) if with_base else None
    mask = cases.random(1, 1, 1500, 1500, seed=26) > -0.5
    assert_matches(q, k, v, slice(640, 1000), GENTLE, base=base)
    assert_matches(q, k, v, slice(640, 1000), GENTLE, base=base, mask=mask)


# --- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", ["unmasked", "bool", "additive"])
def test_joint_attention_is_not_computed_twice(masked: str, dtype: torch.dtype, with_base: bool) -> None:
    """All products together are at most one joint attention and three text-sized products.

    Three: the text logits and two read-outs. With the host's output given, the text mass needs no values, so that
    half an attention is enough.
    """
    tokens, text, heads, dim = 600, 60, 2, 16
    q, k, v = cases.qkv(Shape(1, heads, tokens, tokens, dim), dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if with_base else None
    mask = None
    if masked == "bool":
        mask = cases.random(1, 1, tokens, tokens, seed=27) > -1
    elif masked == "additive":
        mask = cases.random(1, 1, tokens, tokens, seed=27, dtype=dtype)
    with torch.no_grad(), WorkCounter() as work:
        guided_joint_attention(q, k, v, slice(0, text), GENTLE, base=base, mask=mask)
    image = tokens - text
    text_part = 3 * heads * image * text * dim
    joint = (heads * image * tokens * dim) if with_base else (2 * heads * tokens * tokens * dim)
    assert work.total <= joint + text_part, f"{work.total / (joint + text_part):.2f} times what is needed"
    assert work.attention_calls <= 1


def test_nothing_is_computed_when_off() -> None:
    q, k, v = cases.qkv(SHAPE)
    base = cases.random(*q.shape, seed=20)
    with torch.no_grad(), WorkCounter() as work:
        guided_joint_attention(q, k, v, TEXTS["first"], GuidanceConfig(strength=0.0), base=base)
    assert work.total == 0


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
def test_fewer_queries_than_keys_cost_no_more_than_they_need(with_base: bool) -> None:
    """The same with two text slices whose keys are joined: one joint attention and three text-sized products."""
    queries, tokens, heads, dim = 200, 600, 2, 16
    text = [slice(0, 40), slice(90, 110)]
    q, k, v = cases.qkv(Shape(1, heads, queries, tokens, dim))
    base = cases.random(*q.shape, seed=20) if with_base else None
    with torch.no_grad(), WorkCounter() as work:
        guided_joint_attention(q, k, v, text, GENTLE, base=base)
    needed = heads * queries * dim * ((1 if with_base else 2) * tokens + 3 * 60)
    assert work.total <= needed, f"{work.total / needed:.2f} times what is needed"
    assert work.attention_calls <= 1


@PROPERTY
@hypothesis.given(
    queries=st.integers(1, 20),
    sizes=st.lists(st.integers(0, 6), min_size=2, max_size=7),
    seed=SEEDS,
    name=st.sampled_from(sorted(CONFIGS)),
    with_base=st.booleans(),
    masked=st.sampled_from(["none", "bool-full", "additive-inf", "bool-per-key"]),
)
def test_any_call_with_several_slices(
    queries: int, sizes: list[int], seed: int, name: str, with_base: bool, masked: str
) -> None:
    """The sizes are those of image and text, in turn."""
    edges = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    text = [slice(a, b) for a, b in zip(edges[1::2], edges[2::2], strict=False) if a < b]
    hypothesis.assume(text)
    shape = Shape(2, 2, min(queries, edges[-1]), edges[-1], 8)
    q, k, v = cases.qkv(shape, seed=seed)
    base = cases.random(*q.shape, seed=20) if with_base else None
    mask = None if masked == "none" else MASKS[masked](shape)
    out = guided_joint_attention(q, k, v, text, CONFIGS[name], base=base, mask=mask)
    expected = reference.guided_joint_attention(q, k, v, text, CONFIGS[name], base=base, mask=mask)
    assert_close(out, expected, error=5e-3)


@PROPERTY
@hypothesis.given(
    tokens=st.integers(2, 30),
    start=st.integers(0, 29),
    length=st.integers(1, 30),
    seed=SEEDS,
    name=st.sampled_from(sorted(CONFIGS)),
    with_base=st.booleans(),
    masked=st.sampled_from(["none", "bool-full", "additive-inf", "bool-per-key"]),
)
def test_any_call(tokens: int, start: int, length: int, seed: int, name: str, with_base: bool, masked: str) -> None:
    hypothesis.assume(start + length <= tokens)
    shape = Shape(2, 2, tokens, tokens, 8)
    q, k, v = cases.qkv(shape, seed=seed)
    base = cases.random(*q.shape, seed=20) if with_base else None
    mask = None if masked == "none" else MASKS[masked](shape)
    text = slice(start, start + length)
    out = guided_joint_attention(q, k, v, text, CONFIGS[name], base=base, mask=mask)
    expected = reference.guided_joint_attention(q, k, v, text, CONFIGS[name], base=base, mask=mask)
    assert_close(out, expected, error=5e-3)


@pytest.mark.parametrize("mask", [None, "bool-per-head", "additive-inf"])
def test_the_logsumexp_of_split_heads(mask: str | None) -> None:
    """With so many keys each head of a batch row is a part by itself."""
    shape = Shape(2, 3, 20, 700, 128)
    q, k, _ = cases.qkv(shape)
    assert len(list(chunks(q, per_query=2 * shape.keys, per_head=shape.keys * shape.dim))) == shape.batch * shape.heads
    tensor = None if mask is None else MASKS[mask](shape)
    logits = reference.attention_logits(q, k, tensor)
    result = logsumexp_of_logits(q, k, tensor, shape.dim**-0.5)
    torch.testing.assert_close(result.double(), logits.logsumexp(dim=-1), atol=2e-5, rtol=1e-6)
