# SPDX-License-Identifier: GPL-3.0-or-later
"""Hopfield energies, retrieval and Jacobians against their definitions, and properties that they must have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import cases
import hopfield
import reference
from gag_core import measures
from properties import ALPHAS, PROPERTY, SEEDS

EVERY_ALPHA = [1.0, 1.1, 1.25, 1.5, 1.75, 2.0]
ANY_ALPHA = st.just(1.0) | ALPHAS
BETAS = st.sampled_from([0.01, 0.125, 0.5, 2.0, 8.0])
DTYPES = (torch.float32, torch.float64)
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}

alphas = pytest.mark.parametrize("alpha", EVERY_ALPHA, ids="alpha={}".format)


def memory(
    seed: int, *, batch: tuple[int, ...] = (2,), states: int = 5, patterns: int = 9, dim: int = 6
) -> tuple[Tensor, Tensor]:
    """Make states ``[*batch, states, dim]`` and patterns ``[*batch, patterns, dim]``, fp64."""
    x = cases.random(*batch, patterns, dim, seed=seed + 1, dtype=torch.float64)
    return cases.random(*batch, states, dim, seed=seed, std=1.5, dtype=torch.float64), x


def weights_of(seed: int, alpha: float, *size: int, std: float = 1.5) -> Tensor:
    return reference.entmax(cases.random(*size, seed=seed, std=std, dtype=torch.float64), alpha)


def jacobian_by_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """Compute the Jacobian ``[..., n_out, n_in]`` of a function of the last axis, by central differences."""
    columns = []
    for i in range(at.shape[-1]):
        shift = torch.zeros(at.shape[-1], dtype=at.dtype)
        shift[i] = step
        columns.append((function(at + shift) - function(at - shift)) / (2 * step))
    return torch.stack(columns, dim=-1)


# --- retrieval and energy -----------------------------------------------------------------------------------------


@alphas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retrieval_is_attention_of_patterns_that_are_keys_and_values(dtype: torch.dtype, alpha: float) -> None:
    xi, x, _ = cases.qkv(cases.Shape(2, 3, 7, 11, 8), dtype=dtype)
    found = hopfield.retrieve(xi, x, beta=0.3, alpha=alpha)
    sparse, dense = reference.sparse_dense_attention(xi, x, x, alpha=max(alpha, 1.1), scale=0.3)
    expected = dense if alpha == 1.0 else sparse
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", [0.05, 1.0, 5.0])
def test_the_dense_energy_is_that_of_modern_hopfield_networks(beta: float) -> None:
    xi, x = memory(1)
    expected = -torch.logsumexp(beta * xi @ x.transpose(-1, -2), -1) / beta + (xi * xi).sum(-1) / 2
    torch.testing.assert_close(hopfield.energy(xi, x, beta=beta, alpha=1.0), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 1.0, 5.0])
def test_the_sparse_energy_is_that_of_sparse_hopfield_networks(beta: float) -> None:
    """The conjugate of sparsemax has a closed form: half of 1 plus the sum of z^2 - tau^2 over the support."""
    xi, x = memory(2)
    z = beta * xi @ x.transpose(-1, -2)
    p = reference.entmax(z, 2.0)
    support = p > 0
    tau = ((z * support).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    conjugate = (torch.where(support, z**2 - tau**2, 0.0)).sum(-1) / 2 + 0.5
    expected = -conjugate / beta + (xi * xi).sum(-1) / 2
    torch.testing.assert_close(hopfield.energy(xi, x, beta=beta, alpha=2.0), expected, atol=1e-9, rtol=0)


@PROPERTY
@hypothesis.given(seed=SEEDS, alpha=ANY_ALPHA, beta=BETAS)
def test_no_other_weights_give_a_lower_energy(seed: int, alpha: float, beta: float) -> None:
    """The conjugate is a maximum over the simplex: any other weights give an energy at least as high."""
    xi, x = memory(seed)
    z = beta * xi @ x.transpose(-1, -2)
    energy = hopfield.energy(xi, x, beta=beta, alpha=alpha)
    for other in (1.0, 1.3, 2.0):
        for factor in (0.2, 1.0, 4.0):
            p = reference.entmax(factor * z, other)
            power = -torch.special.xlogy(p, p) if alpha == 1.0 else (p - p**alpha) / (alpha * (alpha - 1))
            with_p = -((p * z).sum(-1) + power.sum(-1)) / beta + (xi * xi).sum(-1) / 2
            assert (with_p >= energy - 1e-7 * (1 + energy.abs())).all()


@PROPERTY
@hypothesis.given(seed=SEEDS, alpha=ANY_ALPHA, beta=BETAS, patterns=st.integers(1, 30), dtype=st.sampled_from(DTYPES))
def test_retrieval_never_raises_the_energy(
    seed: int, alpha: float, beta: float, patterns: int, dtype: torch.dtype
) -> None:
    """It falls by half the squared step at least, in every step of an iteration."""
    state, x = (tensor.to(dtype) for tensor in memory(seed, patterns=patterns))
    before = hopfield.energy(state, x, beta=beta, alpha=alpha)
    for _ in range(4):
        image = hopfield.retrieve(state, x, beta=beta, alpha=alpha)
        after = hopfield.energy(image, x, beta=beta, alpha=alpha)
        fall = (image - state).square().sum(-1) / 2
        # An energy is a difference of numbers of these sizes.
        size = state.square().sum(-1) + x.square().sum(-1).amax(-1, keepdim=True) + math.log(patterns) / beta + 1 / beta
        assert (after <= before - fall + ROUNDING[dtype] * size).all()
        state, before = image, after


@alphas
def test_the_energy_falls_by_more_than_rounding(alpha: float) -> None:
    xi, x = memory(3)
    image = hopfield.retrieve(xi, x, beta=1.0, alpha=alpha)
    fall = hopfield.energy(xi, x, beta=1.0, alpha=alpha) - hopfield.energy(image, x, beta=1.0, alpha=alpha)
    assert (fall > 0.1).all()


@alphas
@pytest.mark.parametrize("beta", [0.2, 1.5])
def test_the_gradient_of_the_energy_is_the_step_back(alpha: float, beta: float) -> None:
    xi, x = memory(4)
    gradient = jacobian_by_differences(
        lambda state: hopfield.energy(state, x, beta=beta, alpha=alpha).unsqueeze(-1), xi, 1e-5
    )
    expected = xi - hopfield.retrieve(xi, x, beta=beta, alpha=alpha)
    torch.testing.assert_close(gradient.squeeze(-2), expected, atol=1e-6, rtol=0)


def test_a_pattern_far_from_the_others_is_retrieved_exactly_only_by_sparse_retrieval() -> None:
    x = 4.0 * torch.eye(6, dtype=torch.float64)
    noisy = x + cases.random(6, 6, seed=5, std=0.1, dtype=torch.float64)
    torch.testing.assert_close(hopfield.retrieve(noisy, x, beta=1.0, alpha=1.5), x, atol=1e-12, rtol=0)
    error = (hopfield.retrieve(noisy, x, beta=1.0, alpha=1.0) - x).norm(dim=-1)
    assert (error > 1e-8).all() and (error < 1e-3).all()


# --- entropies, support, separation -------------------------------------------------------------------------------


def test_entropies_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]])
    assert measures.entropy(rows).tolist() == pytest.approx([0.0, math.log(2), math.log(4), 0.0])
    assert hopfield.effective_support(rows).tolist() == pytest.approx([1.0, 2.0, 4.0, 1.0])
    assert measures.support_size(rows).tolist() == [1.0, 2.0, 4.0, 0.0]
    assert hopfield.tsallis_entropy(rows, 1.0).tolist() == pytest.approx([0.0, math.log(2), math.log(4), 0.0])
    # At alpha 2 it is the Gini index, half of 1 - sum p^2.
    assert hopfield.tsallis_entropy(rows[:3], 2.0).tolist() == pytest.approx([0.0, 0.25, 0.375])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_entropy_of_tsallis_tends_to_that_of_shannon(dtype: torch.dtype) -> None:
    p = weights_of(6, 1.0, 20, 30).to(dtype)
    shannon = measures.entropy(p)
    for difference in (1e-3, 1e-6, 1e-9, 1e-12):
        near = hopfield.tsallis_entropy(p, 1.0 + difference)
        torch.testing.assert_close(near, shannon, atol=20 * difference + ROUNDING[dtype], rtol=0)


@PROPERTY
@hypothesis.given(seed=SEEDS, alpha=ALPHAS, n=st.integers(1, 40))
def test_the_entropy_of_tsallis_is_its_definition(seed: int, alpha: float, n: int) -> None:
    p = weights_of(seed, 1.5, 6, n)
    expected = (p - p**alpha).sum(-1) / (alpha * (alpha - 1))
    torch.testing.assert_close(hopfield.tsallis_entropy(p, alpha), expected, atol=1e-12, rtol=1e-10)


@PROPERTY
@hypothesis.given(seed=SEEDS, alpha=ANY_ALPHA, n=st.integers(1, 40))
def test_the_effective_support_lies_within_the_support(seed: int, alpha: float, n: int) -> None:
    p = weights_of(seed, alpha, 6, n)
    effective, size = hopfield.effective_support(p), measures.support_size(p)
    assert (effective >= 1.0 - 1e-12).all() and (effective <= size * (1 + 1e-12)).all() and (size <= n).all()


def test_sparser_weights_have_a_smaller_support() -> None:
    z = cases.random(50, 77, seed=7, std=1.5, dtype=torch.float64)
    sizes = [hopfield.effective_support(reference.entmax(z, alpha)).mean() for alpha in EVERY_ALPHA]
    assert all(larger > smaller for larger, smaller in itertools.pairwise(sizes))


def test_separation_by_hand() -> None:
    inf = math.inf
    rows = torch.tensor([[3.0, 1.0, -2.0], [1.0, 4.0, 4.0], [2.0, -inf, -inf], [-inf, -inf, -inf]])
    assert hopfield.separation(rows).tolist() == [2.0, 0.0, inf, 0.0]
    assert hopfield.separation(torch.tensor([[5.0], [-inf]])).tolist() == [inf, 0.0]


@PROPERTY
@hypothesis.given(seed=SEEDS, alpha=ALPHAS, n=st.integers(2, 20), std=st.sampled_from([0.5, 3.0, 10.0]))
def test_weights_are_one_hot_from_a_gap_of_one_over_alpha_minus_one(
    seed: int, alpha: float, n: int, std: float
) -> None:
    z = cases.random(40, n, seed=seed, std=std, dtype=torch.float64)
    gap = hopfield.separation(z)
    alone = measures.support_size(reference.entmax(z, alpha)) == 1
    margin = 1.0 / (alpha - 1.0)
    clear = (gap - margin).abs() > 1e-6
    assert torch.equal(alone[clear], (gap >= margin)[clear])


# --- Jacobians and contraction ------------------------------------------------------------------------------------


@alphas
def test_the_jacobian_of_the_weights(alpha: float) -> None:
    z = cases.random(4, 7, seed=8, std=0.7, dtype=torch.float64)
    p = reference.entmax(z, alpha)
    found = hopfield.weights_jacobian(p, alpha)
    expected = jacobian_by_differences(lambda logits: reference.entmax(logits, alpha), z)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found.diagonal(dim1=-2, dim2=-1) > 1e-3).any()


@PROPERTY
@hypothesis.given(seed=SEEDS, alpha=ANY_ALPHA, n=st.integers(1, 30), std=st.sampled_from([0.1, 1.0, 5.0]))
def test_the_jacobian_of_weights_is_that_of_a_gradient_map(seed: int, alpha: float, n: int, std: float) -> None:
    """Symmetric, positive semidefinite, blind to a common offset, of norm at most 1/2 (softmax) or 1."""
    j = hopfield.weights_jacobian(weights_of(seed, alpha, 5, n, std=std), alpha)
    torch.testing.assert_close(j, j.transpose(-1, -2))
    assert j.sum(-1).abs().max() < 1e-12
    eigenvalues = torch.linalg.eigvalsh(j)
    assert eigenvalues.min() > -1e-12
    assert eigenvalues.max() <= (0.5 if alpha == 1.0 else 1.0) + 1e-12


def test_the_norms_are_reached() -> None:
    """1/2 for softmax of two keys, 1 for sparsemax, nearly 1 for 1.5-entmax with one large weight and many small."""
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert torch.linalg.matrix_norm(hopfield.weights_jacobian(halves, 1.0), 2).item() == pytest.approx(0.5)
    assert torch.linalg.matrix_norm(hopfield.weights_jacobian(halves, 2.0), 2).item() == pytest.approx(1.0)
    many = torch.full((2001,), 0.02 / 2000, dtype=torch.float64)
    many[0] = 0.98
    assert torch.linalg.matrix_norm(hopfield.weights_jacobian(many, 1.5), 2).item() > 0.8


def test_the_jacobian_of_entmax_15_by_hand() -> None:
    """p = (0.64, 0.36): s = (0.8, 0.6), s s^T / sum(s) = (0.64, 0.48; 0.48, 0.36) / 1.4."""
    found = hopfield.weights_jacobian(torch.tensor([0.64, 0.36, 0.0], dtype=torch.float64), 1.5)
    a = 0.48 / 1.4
    expected = torch.tensor([[a, -a, 0.0], [-a, a, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=0)


@alphas
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_the_jacobian_of_retrieval(alpha: float, beta: float) -> None:
    xi, x = memory(9)

    def image(states: Tensor) -> Tensor:
        return reference.entmax(beta * states @ x.transpose(-1, -2), alpha) @ x

    found = hopfield.retrieval_jacobian(xi, x, beta=beta, alpha=alpha)
    torch.testing.assert_close(found, jacobian_by_differences(image, xi), atol=1e-5, rtol=0)
    j = hopfield.weights_jacobian(reference.entmax(beta * xi @ x.transpose(-1, -2), alpha), alpha)
    written_out = beta * x.transpose(-1, -2).unsqueeze(-3) @ j @ x.unsqueeze(-3)
    torch.testing.assert_close(found, written_out, atol=1e-9, rtol=0)
    assert found.abs().max() > 0.01


@PROPERTY
@hypothesis.given(seed=SEEDS, alpha=ANY_ALPHA, beta=BETAS, near=st.sampled_from([1e-3, 0.1, 3.0]))
def test_the_bound_on_the_contraction_holds(seed: int, alpha: float, beta: float, near: float) -> None:
    a, x = memory(seed, states=12)
    b = a + near * memory(seed + 7, states=12)[0]
    measured = measures.contraction(
        a, b, hopfield.retrieve(a, x, beta=beta, alpha=alpha), hopfield.retrieve(b, x, beta=beta, alpha=alpha)
    )
    bound = hopfield.contraction_bound(x, beta=beta, alpha=alpha)
    assert bound.shape == (2,) and measured.shape == (2, 12)
    assert (measured <= bound.unsqueeze(-1) * (1 + 1e-6) + 1e-6).all()
    local = torch.linalg.matrix_norm(hopfield.retrieval_jacobian(a, x, beta=beta, alpha=alpha), 2)
    assert (local <= bound.unsqueeze(-1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("alpha", [1.0, 1.5], ids="alpha={}".format)
def test_contraction_below_and_above_a_bound_of_one(alpha: float) -> None:
    """With a bound below 1 all starts end in one fixed point. Above 1 retrieval may contract or spread; both occur."""
    xi, x = memory(10, states=200)
    size = torch.linalg.matrix_norm(x, 2).square().max().item()
    gentle = 0.9 * (2.0 if alpha == 1.0 else 1.0) / size
    assert hopfield.contraction_bound(x, beta=gentle, alpha=alpha).max() < 1.0
    state = xi
    for _ in range(300):
        state = hopfield.retrieve(state, x, beta=gentle, alpha=alpha)
    torch.testing.assert_close(state, state[..., :1, :].expand_as(state), atol=1e-9, rtol=0)
    a, b = xi[..., :100, :], xi[..., 100:, :]
    images = [hopfield.retrieve(states, x, beta=1.0, alpha=alpha) for states in (a, b)]
    ratios = measures.contraction(a, b, *images)
    assert hopfield.contraction_bound(x, beta=1.0, alpha=alpha).min() > 1.0
    assert (ratios < 1.0).any() and (ratios > 1.0).any()


def test_one_state_twice_contracts_to_nothing() -> None:
    a = torch.ones(3, 4)
    assert measures.contraction(a, a, a, a + 1).tolist() == [0.0, 0.0, 0.0]


# --- how they may be called ---------------------------------------------------------------------------------------


@alphas
def test_leading_dimensions_broadcast(alpha: float) -> None:
    """States have a batch and heads, patterns only heads: the result is that with repeated patterns."""
    xi, _ = memory(11, batch=(2, 3))
    _, x = memory(12, batch=(3,))
    for function in (hopfield.retrieve, hopfield.energy, hopfield.retrieval_jacobian):
        found = function(xi, x, beta=0.5, alpha=alpha)
        repeated = function(xi, x.expand(2, 3, 9, 6), beta=0.5, alpha=alpha)
        torch.testing.assert_close(found, repeated)
        torch.testing.assert_close(found[1, 2], function(xi[1, 2], x[2], beta=0.5, alpha=alpha))


@alphas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_back_from_the_device(dtype: torch.dtype, alpha: float) -> None:
    """Only the shapes of these tensors are known: reading a value would fail."""
    with FakeTensorMode():
        xi, x, p = (torch.empty(size, dtype=dtype) for size in ((2, 5, 6), (2, 9, 6), (2, 5, 9)))
        out = [
            hopfield.retrieve(xi, x, beta=0.5, alpha=alpha),
            hopfield.energy(xi, x, beta=0.5, alpha=alpha),
            hopfield.retrieval_jacobian(xi, x, beta=0.5, alpha=alpha),
            hopfield.weights_jacobian(p, alpha),
            hopfield.tsallis_entropy(p, alpha),
            hopfield.effective_support(p),
            measures.support_size(p),
            hopfield.separation(p),
            measures.contraction(xi, xi, xi, xi),
        ]
    assert all(tensor.dtype == dtype for tensor in out)


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "beta 0": ({"beta": 0.0}, ["beta", "above 0", "0.0"]),
    "beta nan": ({"beta": math.nan}, ["beta", "nan"]),
    "beta a text": ({"beta": "1"}, ["beta", "'1'"]),
    "alpha": ({"alpha": 2.5}, ["alpha", "2.5", "1 to 2"]),
    "dimensions": ({"states": torch.ones(3, 4)}, ["(3, 4)", "(5, 6)"]),
    "no patterns": ({"patterns": torch.ones(0, 6)}, ["(0, 6)", "pattern"]),
    "half precision": ({"states": torch.ones(3, 6).half()}, ["states", "float16", "fp32"]),
    "a vector": ({"patterns": torch.ones(6)}, ["patterns", "(6,)"]),
    "no tensor": ({"states": [1.0]}, ["states", "list"]),
}


@pytest.mark.parametrize("function", [hopfield.retrieve, hopfield.energy, hopfield.retrieval_jacobian])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_are_refused_in_a_sentence(case: str, function: Callable[..., Tensor]) -> None:
    changes, words = WRONG[case]
    good: dict[str, Any] = {"states": torch.ones(3, 6), "patterns": torch.ones(5, 6), "beta": 1.0}
    function(**good)
    with pytest.raises((ValueError, TypeError)) as raised:
        function(**good | changes)
    message = str(raised.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_every_function_cites_its_source() -> None:
    theory = [
        value
        for name, value in vars(hopfield).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == hopfield.__name__
    ]
    assert len(theory) == 8
    for function in (*theory, measures.contraction, measures.entropy, measures.support_size):
        assert "Source: arXiv" in (function.__doc__ or ""), function.__name__
