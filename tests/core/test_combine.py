# SPDX-License-Identifier: GPL-3.0-or-later
"""combine: decomposition, cap, extrapolation, blend, against the fp64 reference."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import cases
import reference
from gag_core import GuidanceConfig, combine
from properties import PROPERTY, SEEDS
from tolerances import ARITHMETIC, DTYPES, assert_close

CONFIGS = {
    "paper": GuidanceConfig(),
    "gentle": GuidanceConfig(guidance_scale=2.0, norm_mode="relative", norm_threshold=0.1),
    "no-cap": GuidanceConfig(norm_threshold=math.inf),
    "relative-no-cap": GuidanceConfig(norm_threshold=math.inf, norm_mode="relative"),
    "tight-cap": GuidanceConfig(norm_threshold=0.5),
    "zero-cap": GuidanceConfig(norm_threshold=0.0),
    "orthogonal": GuidanceConfig(orthogonal_scale=0.5),
    "orthogonal-tight-relative": GuidanceConfig(orthogonal_scale=1.0, norm_mode="relative", norm_threshold=0.2),
    "negative": GuidanceConfig(guidance_scale=-1.5, orthogonal_scale=-0.5),
    "half-strength": GuidanceConfig(strength=0.5),
    "over-strength": GuidanceConfig(strength=1.5, norm_threshold=1.0),
    "off": GuidanceConfig(strength=0.0),
    "pladis": GuidanceConfig(rule="pladis", guidance_scale=2.0),
    "pladis-half": GuidanceConfig(rule="pladis", guidance_scale=2.0, strength=0.5),
    "pladis-capless": GuidanceConfig(rule="pladis", guidance_scale=3.0, norm_threshold=0.01, orthogonal_scale=0.3),
    "plain-sparse": GuidanceConfig(guidance_scale=0.0),
}
CONFIGS |= {f"merged-{name}": dataclasses.replace(config, merge_heads=True) for name, config in CONFIGS.items()}


def read_outs(
    *size: int, seed: int = 0, dtype: torch.dtype = torch.float32, distance: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Make a sparse read-out and a dense one near it."""
    sparse = cases.random(*size, seed=seed)
    return sparse.to(dtype), (sparse + cases.random(*size, seed=seed + 1, std=distance)).to(dtype)


def error_of(sparse: Tensor, dense: Tensor, config: GuidanceConfig) -> float:
    """Compute the allowed error. S and D are exact here, so only the fp32 roundings of the formula count."""
    reach = (1 + abs(config.guidance_scale)) * (1 + abs(config.orthogonal_scale)) * (1 + abs(config.strength))
    return 0.05 * ARITHMETIC * reach * float(torch.maximum(sparse.double().abs().max(), dense.double().abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    sparse, dense = read_outs(2, 5, 30, 40, dtype=dtype)
    out = combine(sparse, dense, config)
    assert out.dtype == dtype
    assert_close(out, reference.combine(sparse, dense, config), error=error_of(sparse, dense, config))


@pytest.mark.parametrize("size", [(1, 1, 1, 4), (4, 20, 3, 64), (1, 1, 300, 160), (3, 2, 1, 8), (2, 8, 5, 1)], ids=str)
@pytest.mark.parametrize("merge", [False, True], ids=["per-head", "merged"])
def test_shapes(size: tuple[int, int, int, int], merge: bool) -> None:
    sparse, dense = read_outs(*size)
    config = GuidanceConfig(merge_heads=merge, orthogonal_scale=0.3)
    assert_close(
        combine(sparse, dense, config),
        reference.combine(sparse, dense, config),
        error=4 * error_of(sparse, dense, config),
    )


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("merge", [False, True], ids=["per-head", "merged"])
def test_layouts(layout: str, merge: bool) -> None:
    sparse, dense = read_outs(2, 3, 11, 16)
    config = GuidanceConfig(merge_heads=merge, norm_threshold=2.0)
    expected = reference.combine(sparse, dense, config)
    arrange = cases.LAYOUTS[layout]
    for pair in ((arrange(sparse), arrange(dense)), (arrange(sparse), dense), (sparse, arrange(dense))):
        assert_close(combine(*pair, config), expected, error=error_of(sparse, dense, config))


@pytest.mark.parametrize("name", CONFIGS)
def test_leaves_its_inputs_alone(name: str) -> None:
    sparse, dense = read_outs(2, 3, 11, 16)
    before = sparse.clone(), dense.clone()
    combine(sparse, dense, CONFIGS[name])
    assert torch.equal(sparse, before[0]) and torch.equal(dense, before[1])


@pytest.mark.parametrize("merge", [False, True], ids=["per-head", "merged"])
def test_off_is_dense_exactly(merge: bool) -> None:
    for dtype in DTYPES:
        sparse, dense = read_outs(2, 3, 11, 16, dtype=dtype)
        assert torch.equal(combine(sparse, dense, GuidanceConfig(strength=0.0, merge_heads=merge)), dense)


# --- geometry -----------------------------------------------------------------------------------------------------


def guidance_of(out: Tensor, sparse: Tensor, config: GuidanceConfig) -> Tensor:
    """Recover g from ``out = S + lambda g``."""
    return (out.double() - sparse.double()) / config.guidance_scale


@PROPERTY
@hypothesis.given(
    seed=SEEDS,
    zeta=st.sampled_from([0.0, 0.5, 1.0]),
    eta=st.sampled_from([0.1, 1.0, 15.0]),
    mode=st.sampled_from(["absolute", "relative"]),
    merge=st.booleans(),
    distance=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_the_guidance_never_exceeds_its_cap(
    seed: int, zeta: float, eta: float, mode: str, merge: bool, distance: float
) -> None:
    """A longer guidance vector is shortened to the cap and keeps its direction."""
    sparse, dense = read_outs(2, 3, 10, 16, seed=seed, distance=distance)
    config = GuidanceConfig(orthogonal_scale=zeta, norm_threshold=eta, norm_mode=mode, merge_heads=merge)
    free = dataclasses.replace(config, norm_threshold=math.inf)
    capped, uncapped = (guidance_of(combine(sparse, dense, c), sparse, c) for c in (config, free))
    if merge:
        sparse, capped, uncapped = (x.transpose(1, 2).flatten(2) for x in (sparse, capped, uncapped))
    limit = reference.cap_limit(sparse.double().norm(dim=-1, keepdim=True), config)
    before, after = uncapped.norm(dim=-1, keepdim=True), capped.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(after, reference.cap(before, limit), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(capped * before, uncapped * after, rtol=1e-3, atol=1e-4 * float(before.max()))


def test_both_sides_of_the_cap_occur_above() -> None:
    sparse, dense = read_outs(2, 3, 10, 16, distance=1.0)
    g = guidance_of(combine(sparse, dense, GuidanceConfig(norm_threshold=math.inf)), sparse, GuidanceConfig())
    lengths = g.norm(dim=-1)
    assert (lengths < 1.0).any() and (lengths > 1.0).any()


def test_one_token_by_hand() -> None:
    """S = (2, 0), D = (1, -3): r = (1, 3), r_par = (1, 0), r_perp = (0, 3)."""
    sparse, dense = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[1.0, -3.0]]]])

    def out(**fields: float | str) -> list[float]:
        return [float(x) for x in combine(sparse, dense, GuidanceConfig(**fields))[0, 0, 0]]  # type: ignore[arg-type]

    assert out(guidance_scale=10.0) == pytest.approx([12.0, 0.0])
    assert out(guidance_scale=10.0, orthogonal_scale=0.5) == pytest.approx([12.0, 15.0])
    assert out(guidance_scale=10.0, norm_threshold=0.5) == pytest.approx([7.0, 0.0])
    assert out(guidance_scale=10.0, norm_threshold=0.25, norm_mode="relative") == pytest.approx([7.0, 0.0])
    assert out(guidance_scale=2.0, orthogonal_scale=4 / 3, norm_threshold=1.0) == pytest.approx(
        [2 + 2 / math.sqrt(17), 8 / math.sqrt(17)]
    )
    assert out(rule="pladis", guidance_scale=2.0) == pytest.approx([3.0, 3.0])
    assert out(guidance_scale=10.0, strength=0.5) == pytest.approx([6.5, -1.5])


def test_merged_heads_share_one_geometry() -> None:
    """Merged heads give the same as one head with all dimensions."""
    sparse, dense = read_outs(2, 5, 7, 8, distance=2.0)
    config = GuidanceConfig(orthogonal_scale=0.2, norm_threshold=3.0)
    one_head = [x.transpose(1, 2).reshape(2, 1, 7, 40) for x in (sparse, dense)]
    expected = combine(one_head[0], one_head[1], config)[:, 0].view(2, 7, 5, 8).transpose(1, 2)
    merged = combine(sparse, dense, dataclasses.replace(config, merge_heads=True))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-5)
    assert (merged - combine(sparse, dense, config)).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("merged-")])
def test_merging_one_head_changes_nothing(name: str) -> None:
    sparse, dense = read_outs(2, 1, 7, 8)
    merged = combine(sparse, dense, CONFIGS[f"merged-{name}"])
    torch.testing.assert_close(merged, combine(sparse, dense, CONFIGS[name]), atol=1e-5, rtol=1e-5)


# --- degenerate and extreme input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True], ids=["per-head", "merged"])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("zeta", [0.0, 1.0], ids="zeta={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_sparse_read_out(dtype: torch.dtype, zeta: float, mode: str, merge: bool) -> None:
    """A zero S has no direction, so all of the discrepancy counts as orthogonal."""
    _, dense = read_outs(2, 3, 5, 8, dtype=dtype)
    sparse = torch.zeros_like(dense)
    config = GuidanceConfig(orthogonal_scale=zeta, norm_mode=mode, norm_threshold=1.0, merge_heads=merge)
    expected = reference.combine(sparse, dense, config)
    assert_close(combine(sparse, dense, config), expected, error=error_of(sparse, dense, config))


@pytest.mark.parametrize("name", CONFIGS)
def test_all_zero(name: str) -> None:
    zero = torch.zeros(1, 2, 3, 4)
    assert torch.equal(combine(zero, zero, CONFIGS[name]), zero)


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_read_outs_are_a_fixed_point(name: str) -> None:
    sparse, _ = read_outs(2, 3, 5, 8)
    torch.testing.assert_close(combine(sparse, sparse, CONFIGS[name]), sparse)


@pytest.mark.parametrize("size", [1e-15, 1e-8, 1e8, 1e12, 1e18], ids="size={}".format)
@pytest.mark.parametrize(
    "name", ["paper", "gentle", "no-cap", "orthogonal", "orthogonal-tight-relative", "pladis", "merged-gentle"]
)
def test_small_and_large_values(name: str, size: float) -> None:
    """Results have full relative precision, though <S, S> comes close to the ends of the range of fp32."""
    sparse, dense = (size * x for x in read_outs(2, 3, 5, 8))
    config = CONFIGS[name]
    assert_close(
        combine(sparse, dense, config),
        reference.combine(sparse, dense, config),
        error=5 * error_of(sparse, dense, config),
    )


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-25, 1e20, 1e30, 1e37], ids="size={}".format)
@pytest.mark.parametrize("name", CONFIGS)
def test_squares_beyond_fp32_give_no_nan(name: str, size: float) -> None:
    """<S, S> under- or overflows here."""
    sparse, dense = (torch.tensor(size) * x for x in read_outs(2, 3, 5, 8))
    out = combine(sparse, dense, CONFIGS[name])
    assert torch.isfinite(out).all()
    assert out.abs().max() <= 100 * size


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_results_saturate_at_the_range_of_the_dtype(name: str, dtype: torch.dtype) -> None:
    """Finite inputs give finite results, up to the largest number of the dtype."""
    largest = torch.finfo(dtype).max
    sparse = torch.tensor([[[[1.0, 1.0, -1.0, 0.5]]]], dtype=dtype) * largest
    dense = torch.tensor([[[[0.1, 0.2, -0.3, 0.9]]]], dtype=dtype) * largest
    out = combine(sparse, dense, CONFIGS[name])
    assert torch.isfinite(out).all()
    if dtype == torch.float16:  # fp32 has room for what fp16 has not, so the saturated values are exact
        expected = reference.combine(sparse, dense, CONFIGS[name]).clamp(-largest, largest)
        assert_close(out, expected, error=error_of(sparse, dense, CONFIGS[name]))


@PROPERTY
@hypothesis.given(
    seed=SEEDS,
    scale=st.floats(0, 20),
    zeta=st.floats(-1, 2),
    eta=st.one_of(st.floats(0, 20), st.just(math.inf)),
    mode=st.sampled_from(["absolute", "relative"]),
    strength=st.floats(0, 2),
    merge=st.booleans(),
    rule=st.sampled_from(["gag", "pladis"]),
)
def test_any_config(
    seed: int, scale: float, zeta: float, eta: float, mode: str, strength: float, merge: bool, rule: str
) -> None:
    sparse, dense = read_outs(1, 3, 6, 16, seed=seed, distance=1.0)
    config = GuidanceConfig(
        rule=rule,
        guidance_scale=scale,
        norm_threshold=eta,
        norm_mode=mode,
        orthogonal_scale=zeta,
        strength=strength,
        merge_heads=merge,
    )
    expected = reference.combine(sparse, dense, config)
    assert_close(combine(sparse, dense, config), expected, error=4 * error_of(sparse, dense, config))
