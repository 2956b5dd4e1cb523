# SPDX-License-Identifier: GPL-3.0-or-later
"""entmax against two oracles, its optimality conditions and its properties."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import cases
import reference
from gag_core import entmax
from properties import ALPHAS, PROPERTY, SEEDS, STDS
from tolerances import DTYPES, HALF_DTYPES, ROUNDING, WEIGHTS, assert_close

EVERY_ALPHA = [1.0, 1.1, 1.25, 1.5, 1.75, 2.0]
INF = math.inf


def oracles(logits: Tensor, alpha: float) -> dict[str, Tensor]:
    """Compute the weights by every oracle that supports this alpha."""
    if alpha == 1.0:
        return {"softmax": torch.softmax(logits.double(), -1)}
    found = {"bisection": reference.entmax_by_bisection(logits, alpha)}
    if alpha in (1.5, 2.0):
        found["sort"] = reference.entmax_by_sort(logits, alpha)
    return found


def assert_matches_oracles(logits: Tensor, alpha: float) -> None:
    weights = entmax(logits, alpha)
    assert weights.dtype == logits.dtype
    for expected in oracles(logits, alpha).values():
        assert_close(weights, expected, error=WEIGHTS)


# --- against the oracles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", EVERY_ALPHA, ids="alpha={}".format)
@pytest.mark.parametrize("std", [0.01, 0.3, 3.0, 30.0], ids="std={}".format)
@pytest.mark.parametrize("keys", [1, 2, 3, 7, 77, 154, 231, 512, 1024, 4608], ids="keys={}".format)
def test_random_rows(keys: int, std: float, alpha: float) -> None:
    assert_matches_oracles(cases.random(2, 4, keys, seed=keys, std=std), alpha)


@pytest.mark.parametrize("alpha", EVERY_ALPHA, ids="alpha={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("std", [0.3, 5.0], ids="std={}".format)
def test_dtypes(dtype: torch.dtype, alpha: float, std: float) -> None:
    assert_matches_oracles(cases.random(20, 77, seed=1, std=std, dtype=dtype), alpha)


ROWS: dict[str, list[float]] = {
    "one entry": [3.0],
    "all equal": [2.5] * 77,
    "all equal and huge": [1e30] * 5,
    "two equal above the rest": [4.0, 4.0, *([0.0] * 50)],
    "ties at the edge of the support": [1.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0],
    "one far above": [1e4, *([0.0] * 76)],
    "one far below": [*([0.0] * 76), -1e4],
    "one a rounding above": [1.0000001, *([1.0] * 511)],
    "huge spread": [1e30, -1e30, 0.0, 1.0],
    "lowest finite as a mask": [0.5, -3.4028235e38, 0.1, -3.4028235e38],
    "a dominant entry and a long tail": [6.0, *([0.0] * 4607)],
    "slow geometric decay": [-0.01 * i for i in range(400)],
    "exactly on the threshold (alpha 2)": [1.0, 0.0],
    "exactly on the threshold (alpha 1.5)": [2.0, 0.0, 0.0],
    "offset": [1000.0, 1000.5, 999.0, 1001.0],
}


@pytest.mark.parametrize("alpha", EVERY_ALPHA, ids="alpha={}".format)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_crafted_rows(row: list[float], alpha: float) -> None:
    assert_matches_oracles(torch.tensor([row, row[::-1]]), alpha)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 1.75, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("keys", [16, 77, 96, 154, 256, 512, 1024, 4608], ids="keys={}".format)
def test_many_ties_at_the_edge_of_the_support(keys: int, alpha: float) -> None:
    """The search for the threshold is slowest for such rows."""
    logits = cases.ties_at_the_edge(keys, alpha)
    weights, expected = entmax(logits, alpha), reference.entmax(logits, alpha)
    # Many small errors add up in a read-out, so their sum counts. At alpha 1.5 torch's norm of many keys is rounded.
    error = 4e-6 + max(0, keys - 512) * 2.0**-26 if alpha == 1.5 else 4e-6
    assert (weights.double() - expected).abs().sum(-1).max() < error


@pytest.mark.parametrize("alpha", EVERY_ALPHA, ids="alpha={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_entries_weigh_nothing(dtype: torch.dtype, alpha: float) -> None:
    """``-inf`` entries get weight 0, and all others the weight that they get without the ``-inf`` entries."""
    logits = cases.random(9, 60, seed=5, std=2.0, dtype=dtype)
    masked = torch.full((9, 100), -INF, dtype=dtype)
    indices = torch.randperm(100, generator=torch.Generator().manual_seed(6))[:60]
    masked[:, indices] = logits
    weights = entmax(masked, alpha)
    assert_close(weights[:, indices], reference.entmax(logits, alpha), error=WEIGHTS)
    assert (weights[masked == -INF] == 0).all()


@pytest.mark.parametrize("alpha", [*EVERY_ALPHA, 1.3], ids="alpha={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_only_minus_infinity_gives_zeros(dtype: torch.dtype, alpha: float) -> None:
    logits = torch.full((3, 8), -INF, dtype=dtype)
    logits[1] = torch.arange(8)
    weights = entmax(logits, alpha)
    assert (weights[[0, 2]] == 0).all()
    assert_close(weights[1], reference.entmax(logits[1], alpha), error=WEIGHTS)


@pytest.mark.parametrize("alpha", EVERY_ALPHA, ids="alpha={}".format)
def test_one_finite_entry_takes_everything(alpha: float) -> None:
    logits = torch.full((77, 77), -INF)
    logits.diagonal().copy_(torch.linspace(-1e5, 1e5, 77))
    assert torch.equal(entmax(logits, alpha), torch.eye(77))


@pytest.mark.parametrize("alpha", [1.0001, 1.001, 1.01], ids="alpha={}".format)
def test_just_above_one_is_close_to_softmax(alpha: float) -> None:
    logits = cases.random(16, 77, seed=7, std=2.0)
    weights = entmax(logits, alpha)
    # (x - tau) ** (1 / (alpha - 1)) multiplies the fp32 rounding of x - tau by the exponent.
    assert_close(weights, reference.entmax_by_bisection(logits, alpha), error=2.0**-22 / (alpha - 1.0))
    assert (weights - torch.softmax(logits, -1)).abs().max() < 10 * (alpha - 1.0)
    assert_close(weights.sum(-1), torch.ones(16), error=1e-5)


# --- arguments ----------------------------------------------------------------------------------------------------


def test_defaults_are_alpha_one_and_a_half_on_the_last_axis() -> None:
    logits = cases.random(3, 4, 5, seed=8)
    assert torch.equal(entmax(logits), entmax(logits, alpha=1.5, dim=-1))


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4], ids="dim={}".format)
def test_other_dimensions(dim: int, alpha: float) -> None:
    logits = cases.random(3, 4, 5, 6, seed=9, std=2.0)
    weights = entmax(logits, alpha, dim=dim)
    assert_close(weights, reference.entmax(logits, alpha, dim), error=WEIGHTS)


@pytest.mark.parametrize("size", [(9,), (2, 9), (2, 3, 1, 2, 9)], ids=str)
def test_any_number_of_dimensions(size: tuple[int, ...]) -> None:
    logits = cases.random(*size, seed=10)
    assert_close(entmax(logits), reference.entmax(logits), error=WEIGHTS)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0], ids="alpha={}".format)
def test_layouts(layout: str, alpha: float) -> None:
    logits = cases.random(2, 3, 7, 16, seed=11)
    assert_close(entmax(cases.LAYOUTS[layout](logits), alpha), reference.entmax(logits, alpha), error=WEIGHTS)


@pytest.mark.parametrize("alpha", EVERY_ALPHA, ids="alpha={}".format)
def test_an_expanded_input(alpha: float) -> None:
    row = cases.random(1, 20, seed=12)
    assert_close(entmax(row.expand(6, 20), alpha), reference.entmax(row, alpha).expand(6, 20), error=WEIGHTS)


@pytest.mark.parametrize("alpha", EVERY_ALPHA, ids="alpha={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leaves_its_input_alone(dtype: torch.dtype, alpha: float) -> None:
    logits = cases.random(5, 33, seed=13, dtype=dtype)
    before = logits.clone()
    entmax(logits, alpha)
    entmax(logits, alpha, dim=0)
    assert torch.equal(logits, before)


def test_works_in_inference_mode() -> None:
    logits = cases.random(5, 33, seed=14)
    with torch.inference_mode():
        inside = entmax(logits.clone())
    assert torch.equal(inside, entmax(logits))


@pytest.mark.parametrize("alpha", [0.0, 0.99, 2.01, -1.0, math.nan, INF], ids="alpha={}".format)
def test_refuses_an_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError) as raised:
        entmax(torch.zeros(2, 3), alpha)
    message = str(raised.value)
    assert "alpha" in message and repr(alpha) in message and "1" in message and "2" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises((TypeError, ValueError), match=str(dtype)):
        entmax(torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("wrong", [[1.0, 2.0], 3.0, None], ids=repr)
def test_refuses_other_types(wrong: Any) -> None:
    with pytest.raises(TypeError, match="tensor"):
        entmax(wrong)


@pytest.mark.parametrize("dim", [3, -4, 17])
def test_refuses_a_dimension_that_does_not_exist(dim: int) -> None:
    with pytest.raises((ValueError, IndexError)) as raised:
        entmax(torch.zeros(2, 3, 4), dim=dim)
    assert str(dim) in str(raised.value) and "dim" in str(raised.value)


def test_refuses_an_empty_axis() -> None:
    with pytest.raises(ValueError, match="0"):
        entmax(torch.zeros(2, 0))


# --- properties ---------------------------------------------------------------------------------------------------


@PROPERTY
@hypothesis.given(
    alpha=st.one_of(st.floats(1.0, 2.0), st.sampled_from(EVERY_ALPHA)),
    row=st.lists(st.floats(-60, 60, width=32) | st.just(-INF), min_size=1, max_size=40),
)
def test_any_row_gives_the_weights_of_bisection(row: list[float], alpha: float) -> None:
    hypothesis.assume(alpha == 1.0 or alpha > 1.02)  # even closer to 1 see above
    logits = torch.tensor(row)
    error = WEIGHTS if alpha == 1.0 else WEIGHTS * max(1.0, 0.05 / (alpha - 1.0))  # rounding, times the exponent
    assert_close(entmax(logits, alpha), reference.entmax(logits, alpha), error=error)


@PROPERTY
@hypothesis.given(seed=SEEDS, std=STDS, alpha=ALPHAS, keys=st.integers(1, 200), dtype=st.sampled_from(DTYPES))
def test_weights_are_a_distribution(seed: int, std: float, alpha: float, keys: int, dtype: torch.dtype) -> None:
    weights = entmax(cases.random(5, keys, seed=seed, std=std, dtype=dtype), alpha)
    assert (weights >= 0).all() and (weights <= 1).all()
    # Each weight is rounded on its own. The roundings of a row add up to at most one rounding of the sum.
    assert ((weights.double().sum(-1) - 1).abs() <= ROUNDING[dtype] + WEIGHTS).all()


@PROPERTY
@hypothesis.given(seed=SEEDS, std=STDS, alpha=ALPHAS, keys=st.integers(2, 120))
def test_permuting_the_keys_permutes_the_weights(seed: int, std: float, alpha: float, keys: int) -> None:
    logits = cases.random(4, keys, seed=seed, std=std)
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(entmax(logits[:, order], alpha), entmax(logits, alpha)[:, order], atol=WEIGHTS, rtol=0)


@PROPERTY
@hypothesis.given(seed=SEEDS, alpha=ALPHAS, shift=st.sampled_from([-4096.0, -3.0, 0.5, 64.0, 1024.0]))
def test_a_shift_of_the_logits_changes_nothing(seed: int, alpha: float, shift: float) -> None:
    # Multiples of 1/256 so that the shift itself does not round.
    logits = (cases.random(4, 60, seed=seed, std=2.0) * 256).round() / 256
    torch.testing.assert_close(entmax(logits + shift, alpha), entmax(logits, alpha), atol=WEIGHTS, rtol=0)


@PROPERTY
@hypothesis.given(seed=SEEDS, std=STDS, alpha=ALPHAS, keys=st.integers(2, 300))
def test_optimality_conditions(seed: int, std: float, alpha: float, keys: int) -> None:
    """One tau holds for a whole row: x - p^(alpha - 1) equals tau on the support, and x is at most tau elsewhere.

    These conditions characterise the solution without any oracle. tau lies in the bracket of the method.
    """
    logits = cases.random(5, keys, seed=seed, std=std, dtype=torch.float64)
    weights = entmax(logits, alpha)
    x = (alpha - 1) * logits
    implied = x - weights ** (alpha - 1)
    sure = weights > 1e-4  # where the root does not blow up the error of a weight
    tau = torch.where(sure, implied, -INF).amax(-1, keepdim=True)
    top = x.amax(-1, keepdim=True)
    slack = 1e-4 * (1 + top.abs())
    assert (torch.where(sure, implied, tau) - tau).abs().max() < slack.max()
    assert (x <= tau + slack)[weights == 0].all()
    assert ((top - 1 - slack <= tau) & (tau <= top - keys ** (1 - alpha) + slack)).all()


@PROPERTY
@hypothesis.given(seed=SEEDS, std=st.sampled_from([1.0, 3.0, 10.0]), keys=st.integers(2, 200))
def test_the_support_shrinks_as_alpha_grows(seed: int, std: float, keys: int) -> None:
    logits = cases.random(6, keys, seed=seed, std=std)
    sizes = torch.stack([(entmax(logits, alpha) > 0).sum(-1) for alpha in (1.1, 1.25, 1.5, 1.75, 2.0)])
    assert (sizes.diff(dim=0) <= 0).all()
    assert (sizes >= 1).all()


def test_alphas_give_different_supports() -> None:
    """So the property above is not true just because all alphas give the same."""
    logits = cases.random(6, 200, seed=3, std=3.0)
    sizes = [float((entmax(logits, alpha) > 0).float().sum(-1).mean()) for alpha in (1.0, 1.25, 1.5, 2.0)]
    assert sizes[0] == 200 and sizes[0] > sizes[1] > sizes[2] > sizes[3]


@PROPERTY
@hypothesis.given(seed=SEEDS, std=STDS, alpha=ALPHAS, keys=st.integers(2, 200))
def test_order_of_the_weights_is_that_of_the_logits(seed: int, std: float, alpha: float, keys: int) -> None:
    logits = cases.random(4, keys, seed=seed, std=std).sort(-1).values
    assert (entmax(logits, alpha).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha={}".format)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, alpha: float) -> None:
    """The result equals the fp32 computation on the same numbers, rounded once."""
    logits = cases.random(50, 300, seed=15, std=3.0, dtype=dtype)
    assert torch.equal(entmax(logits, alpha), entmax(logits.float(), alpha).to(dtype))


@pytest.mark.parametrize("alpha", EVERY_ALPHA, ids="alpha={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype, alpha: float) -> None:
    """One row has the whole finite range of the dtype: differences overflow, weights do not."""
    largest = torch.finfo(dtype).max
    logits = torch.tensor([[largest, -largest, 0.0], [-largest] * 3, [largest, largest, -largest]], dtype=dtype)
    expected = torch.tensor([[1.0, 0.0, 0.0], [1 / 3] * 3, [0.5, 0.5, 0.0]])
    assert_close(entmax(logits, alpha), expected, error=WEIGHTS)
