# SPDX-License-Identifier: GPL-3.0-or-later
"""Identities that follow from the mathematics alone (arXiv 2603.02531 v2 and derivations from it)."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import cases
import reference
from cases import Shape
from gag_core import GuidanceConfig, entmax, guided_attention, sparse_dense_attention
from properties import ALPHAS, PROPERTY, SEEDS, SHAPES

LAMBDAS = st.sampled_from([0.0, 0.5, 2.0, 10.0])
ETAS = st.sampled_from([0.1, 1.0, 15.0, math.inf])
ZETAS = st.sampled_from([-0.5, 0.0, 0.5, 1.0])
MODES = st.sampled_from(["absolute", "relative"])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Compare up to ``tolerance`` of the largest number."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1e-30, float(expected.abs().max())))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@PROPERTY
@hypothesis.given(
    shape=SHAPES,
    seed=SEEDS,
    scale=LAMBDAS,
    eta=ETAS,
    zeta=ZETAS,
    mode=MODES,
    merge=st.booleans(),
    rule=st.sampled_from(["gag", "pladis"]),
)
def test_alpha_one_is_the_identity(
    shape: Shape, seed: int, scale: float, eta: float, zeta: float, mode: str, merge: bool, rule: str
) -> None:
    """alpha = 1 gives S = D, and nothing is guided whatever the other settings."""
    q, k, v = cases.qkv(shape, seed=seed)
    config = GuidanceConfig(
        rule=rule,
        alpha=1.0,
        guidance_scale=scale,
        norm_threshold=eta,
        orthogonal_scale=zeta,
        norm_mode=mode,
        merge_heads=merge,
    )
    close(guided_attention(q, k, v, config), softmax_attention(q, k, v), 1e-5)


@PROPERTY
@hypothesis.given(shape=SHAPES, seed=SEEDS, scale=LAMBDAS, alpha=ALPHAS, mode=MODES, merge=st.booleans())
def test_all_of_the_discrepancy_uncapped_is_pladis(
    shape: Shape, seed: int, scale: float, alpha: float, mode: str, merge: bool
) -> None:
    """zeta = 1, eta = inf: D + (1 + lambda) (S - D)."""
    q, k, v = cases.qkv(shape, seed=seed)
    gag = GuidanceConfig(
        guidance_scale=scale,
        orthogonal_scale=1.0,
        norm_threshold=math.inf,
        alpha=alpha,
        norm_mode=mode,
        merge_heads=merge,
    )
    pladis = GuidanceConfig(rule="pladis", guidance_scale=1.0 + scale, alpha=alpha)
    close(guided_attention(q, k, v, gag), guided_attention(q, k, v, pladis))
    sparse, dense = sparse_dense_attention(q, k, v, alpha=alpha)
    close(guided_attention(q, k, v, pladis), dense + (1.0 + scale) * (sparse - dense))


@PROPERTY
@hypothesis.given(shape=SHAPES, seed=SEEDS, alpha=ALPHAS, eta=ETAS, zeta=ZETAS, merge=st.booleans())
def test_lambda_zero_is_plain_sparse_attention(
    shape: Shape, seed: int, alpha: float, eta: float, zeta: float, merge: bool
) -> None:
    q, k, v = cases.qkv(shape, seed=seed)
    config = GuidanceConfig(
        guidance_scale=0.0, alpha=alpha, norm_threshold=eta, orthogonal_scale=zeta, merge_heads=merge
    )
    close(guided_attention(q, k, v, config), sparse_dense_attention(q, k, v, alpha=alpha)[0], 1e-5)


def test_plain_sparse_attention_is_not_vanilla() -> None:
    q, k, v = cases.qkv(Shape(1, 2, 20, 77, 16))
    sparse = guided_attention(q, k, v, GuidanceConfig(guidance_scale=0.0))
    assert (sparse - softmax_attention(q, k, v)).abs().max() > 0.05


@PROPERTY
@hypothesis.given(
    shape=SHAPES, seed=SEEDS, scale=LAMBDAS, eta=ETAS, mode=MODES, merge=st.booleans(), strength=st.floats(0, 1)
)
def test_without_the_orthogonal_part_guidance_is_a_gain(
    shape: Shape, seed: int, scale: float, eta: float, mode: str, merge: bool, strength: float
) -> None:
    """out = S (1 + lambda c cap(x) / x), x = |c| ||S||, c = 1 - <D, S> / ||S||^2, per head or over all heads."""
    q, k, v = cases.qkv(shape, seed=seed)
    sparse, dense = (x.double() for x in sparse_dense_attention(q.double(), k.double(), v.double()))
    axes = (1, 3) if merge else (3,)
    square = (sparse * sparse).sum(axes, keepdim=True)
    c = 1 - (dense * sparse).sum(axes, keepdim=True) / square
    limit = eta * square.sqrt() if mode == "relative" else torch.full_like(square, eta)
    length = c.abs() * square.sqrt()
    shrink = reference.cap(length, limit) / length.clamp_min(1e-300)
    gained = sparse * (1 + scale * c * shrink)
    config = GuidanceConfig(
        guidance_scale=scale, norm_threshold=eta, norm_mode=mode, merge_heads=merge, strength=strength
    )
    out = guided_attention(q.double(), k.double(), v.double(), config)
    close(out, dense + strength * (gained - dense), 1e-3)


# The bracket of the threshold tau is tested in test_entmax.test_optimality_conditions.


@PROPERTY
@hypothesis.given(seed=SEEDS, alpha=ALPHAS, std=st.sampled_from([0.3, 1.0, 3.0]), keys=st.integers(2, 80))
def test_sparse_weights_favour_large_logits(seed: int, alpha: float, std: float, keys: int) -> None:
    """q / p grows in z on the support, so that <q - p, f(z)> >= 0 for every increasing f."""
    z = cases.random(8, keys, seed=seed, std=std, dtype=torch.float64).sort(-1).values
    q, p = entmax(z, alpha), torch.softmax(z, -1)
    ratio = q / p
    on_support = (q[:, :-1] > 1e-6) & (q[:, 1:] > 1e-6)
    assert (ratio.diff(dim=-1)[on_support] >= -1e-4 * ratio.max()).all()
    for f in (z, torch.tanh(z), z**3, torch.exp(z), (z > z.median()).double()):
        gain = ((q - p) * f).sum(-1)
        assert (gain >= -1e-5 * f.abs().max()).all()


@PROPERTY
@hypothesis.given(shape=SHAPES, seed=SEEDS, alpha=ALPHAS, beta=st.sampled_from([0.05, 0.25, 1.0]))
def test_sparse_retrieval_moves_towards_the_query(shape: Shape, seed: int, alpha: float, beta: float) -> None:
    """With K = V = X and z = beta X xi: <T_sparse(xi) - T_dense(xi), xi> >= 0, always."""
    xi, x, _ = cases.qkv(shape, seed=seed)
    sparse, dense = sparse_dense_attention(xi, x, x, alpha=alpha, scale=beta)
    along = ((sparse - dense) * xi).sum(-1)
    reach = (xi.norm(dim=-1) * x.norm(dim=-1).max()).clamp_min(1e-12)
    assert (along >= -1e-5 * reach).all()


def test_sparse_retrieval_moves_far_towards_most_queries_if_keys_are_values() -> None:
    xi, x, v = cases.qkv(Shape(1, 2, 200, 77, 16))
    sparse, dense = sparse_dense_attention(xi, x, x)
    assert (((sparse - dense) * xi).sum(-1) > 0.01).double().mean() > 0.9
    # The property needs K = V. With other values the discrepancy may point either way along xi.
    sparse, dense = sparse_dense_attention(xi, x, v)
    assert (((sparse - dense) * xi).sum(-1) < -0.01).any()


# --- symmetries ---------------------------------------------------------------------------------------------------


@PROPERTY
@hypothesis.given(
    shape=SHAPES,
    seed=SEEDS,
    factor=st.sampled_from([1e-4, 0.125, 3.0, 1e4]),
    eta=st.sampled_from([0.05, 0.3, math.inf]),
    zeta=ZETAS,
    merge=st.booleans(),
    strength=st.sampled_from([0.5, 1.0]),
)
def test_a_relative_cap_scales_with_the_values(
    shape: Shape, seed: int, factor: float, eta: float, zeta: float, merge: bool, strength: float
) -> None:
    q, k, v = cases.qkv(shape, seed=seed)
    config = GuidanceConfig(
        norm_mode="relative", norm_threshold=eta, orthogonal_scale=zeta, merge_heads=merge, strength=strength
    )
    close(guided_attention(q, k, factor * v, config), factor * guided_attention(q, k, v, config), 1e-3)


def test_an_absolute_cap_does_not_scale_with_the_values() -> None:
    q, k, v = cases.qkv(Shape(1, 2, 20, 77, 16))
    config = GuidanceConfig(norm_threshold=0.5)
    assert (guided_attention(q, k, 8 * v, config) - 8 * guided_attention(q, k, v, config)).abs().max() > 1.0


@PROPERTY
@hypothesis.given(seed=SEEDS, zeta=ZETAS, eta=ETAS, scale=LAMBDAS)
def test_rotating_the_values_rotates_the_result(seed: int, zeta: float, eta: float, scale: float) -> None:
    """Only norms and inner products enter: no axis of the values is special."""
    q, k, v = cases.qkv(Shape(1, 2, 10, 30, 16), seed=seed)
    rotation = torch.linalg.qr(cases.random(16, 16, seed=seed + 9, dtype=torch.float64)).Q.float()
    config = GuidanceConfig(guidance_scale=scale, orthogonal_scale=zeta, norm_threshold=eta)
    close(guided_attention(q, k, v @ rotation, config), guided_attention(q, k, v, config) @ rotation, 1e-3)


@PROPERTY
@hypothesis.given(shape=SHAPES, seed=SEEDS, merge=st.booleans())
def test_heads_and_batch_rows_do_not_mix(shape: Shape, seed: int, merge: bool) -> None:
    """Permuting heads permutes the result, merged or not; a batch row alone gives its row of the result."""
    q, k, v = cases.qkv(shape, seed=seed)
    config = GuidanceConfig(merge_heads=merge, norm_threshold=1.0)
    whole = guided_attention(q, k, v, config)
    order = torch.randperm(shape.heads, generator=torch.Generator().manual_seed(seed))
    close(guided_attention(q[:, order], k[:, order], v[:, order], config), whole[:, order])
    close(guided_attention(q[:1], k[:1], v[:1], config), whole[:1])


def test_per_head_and_merged_differ() -> None:
    q, k, v = cases.qkv(Shape(1, 4, 20, 77, 16))
    per_head, merged = (guided_attention(q, k, v, GuidanceConfig(merge_heads=merge)) for merge in (False, True))
    assert (per_head - merged).abs().max() > 0.1


@pytest.mark.parametrize("zeta", [0.0, 1.0], ids="zeta={}".format)
def test_per_head_and_merged_are_one_with_one_head(zeta: float) -> None:
    q, k, v = cases.qkv(Shape(2, 1, 20, 77, 16))
    per_head, merged = (
        guided_attention(q, k, v, GuidanceConfig(merge_heads=merge, orthogonal_scale=zeta, norm_threshold=1.0))
        for merge in (False, True)
    )
    close(per_head, merged, 1e-5)


@PROPERTY
@hypothesis.given(shape=SHAPES, seed=SEEDS, strength=st.floats(-1, 2), zeta=ZETAS)
def test_strength_blends_linearly(shape: Shape, seed: int, strength: float, zeta: float) -> None:
    q, k, v = cases.qkv(shape, seed=seed)
    full, blended, off = (
        guided_attention(q, k, v, GuidanceConfig(orthogonal_scale=zeta, strength=s)) for s in (1.0, strength, 0.0)
    )
    close(blended, off + strength * (full - off))


@PROPERTY
@hypothesis.given(shape=SHAPES, seed=SEEDS, alpha=ALPHAS)
def test_one_key_leaves_nothing_to_guide(shape: Shape, seed: int, alpha: float) -> None:
    q, k, v = cases.qkv(shape._replace(keys=1), seed=seed)
    close(guided_attention(q, k, v, GuidanceConfig(alpha=alpha)), v.expand_as(q), 1e-5)


@PROPERTY
@hypothesis.given(shape=SHAPES, seed=SEEDS, scale=LAMBDAS)
def test_the_uniform_rule_is_the_limit_of_extrapolations_from_higher_temperatures(
    shape: Shape, seed: int, scale: float
) -> None:
    """D + lambda (D - R(1 / T, 1)) for a large temperature T."""
    q, k, v = cases.qkv(shape, seed=seed)
    dense, vague = softmax_attention(q, k, v), softmax_attention(q * 1e-6, k, v)
    uniform = GuidanceConfig(rule="uniform", guidance_scale=scale)
    close(guided_attention(q, k, v, uniform), dense + scale * (dense - vague), 1e-3)


@PROPERTY
@hypothesis.given(shape=SHAPES, seed=SEEDS, scale=LAMBDAS)
def test_the_uniform_rule_is_a_step_between_the_images_of_the_query_and_of_zeros(
    shape: Shape, seed: int, scale: float
) -> None:
    """T(a) + lambda (T(a) - T(b)), with a the query and b zeros."""
    q, k, v = cases.qkv(shape, seed=seed)
    images = [softmax_attention(state, k, v) for state in (q, torch.zeros_like(q))]
    uniform = GuidanceConfig(rule="uniform", guidance_scale=scale)
    close(guided_attention(q, k, v, uniform), images[0] + scale * (images[0] - images[1]), 1e-3)


@PROPERTY
@hypothesis.given(shape=SHAPES, seed=SEEDS, scale=st.sampled_from([0.5, 2.0, 10.0]), alpha=ALPHAS)
def test_a_gain_that_the_cap_holds_back_is_the_same_for_all(
    shape: Shape, seed: int, scale: float, alpha: float
) -> None:
    """With zeta = 0 and a relative cap near 0: c = +- lambda eta, or 0 where S and D agree."""
    q, k, v = cases.qkv(shape, seed=seed)
    eta = 1e-4
    config = GuidanceConfig(guidance_scale=scale, norm_threshold=eta, norm_mode="relative", alpha=alpha)
    sparse, dense = sparse_dense_attention(q.double(), k.double(), v.double(), alpha=alpha)
    guided = guided_attention(q.double(), k.double(), v.double(), config)
    along = ((sparse - dense) * sparse).sum(-1, keepdim=True) / sparse.square().sum(-1, keepdim=True)
    expected = scale * along.clamp(-eta, eta)
    gain = ((guided - sparse) * sparse).sum(-1, keepdim=True) / sparse.square().sum(-1, keepdim=True)
    assert torch.allclose(gain, expected, atol=1e-5 * scale)
    assert (gain.abs() <= scale * eta * 1.1 + 1e-5 * scale).all()
