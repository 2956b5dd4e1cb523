# SPDX-License-Identifier: GPL-3.0-or-later
"""The oracles themselves: they agree with each other and with results by hand."""

from __future__ import annotations

import math

import pytest
import torch

import cases
import reference


@pytest.mark.parametrize("keys", [1, 2, 3, 77, 700, 4608])
@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("std", [0.01, 1.0, 30.0])
def test_sort_and_bisection_agree(keys: int, alpha: float, std: float) -> None:
    logits = cases.random(6, keys, seed=keys, std=std, dtype=torch.float64)
    torch.testing.assert_close(
        reference.entmax_by_sort(logits, alpha), reference.entmax_by_bisection(logits, alpha), atol=1e-13, rtol=0
    )


def test_sparsemax_by_hand() -> None:
    weights = reference.entmax_by_sort(torch.tensor([0.5, 0.1, -1.0]), 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64), atol=1e-8, rtol=0)


def test_entmax_by_hand() -> None:
    """Two entries, x = (1/2, 0): (1/2 - tau)^2 + tau^2 = 1 has the root tau = (1 - sqrt 7) / 4."""
    tau = (1.0 - math.sqrt(7.0)) / 4.0
    expected = torch.tensor([(0.5 - tau) ** 2, tau**2], dtype=torch.float64)
    for weights in (
        reference.entmax_by_sort(torch.tensor([1.0, 0.0]), 1.5),
        reference.entmax_by_bisection(torch.tensor([1.0, 0.0]), 1.5),
    ):
        torch.testing.assert_close(weights, expected, atol=1e-14, rtol=0)


def test_dense_attention_is_torchs_own() -> None:
    q, k, v = cases.qkv(cases.Shape(2, 3, 7, 11, 8), dtype=torch.float64)
    mask = cases.additive_bias(cases.Shape(2, 3, 7, 11, 8)).double()
    _, dense = reference.sparse_dense_attention(q, k, v, mask=mask, scale=0.7)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)
    torch.testing.assert_close(dense, expected, atol=1e-12, rtol=0)


def test_joint_mass_splits_the_joint_output() -> None:
    """O_joint = m D_T + (1 - m) D_rest."""
    q, k, v = cases.qkv(cases.Shape(1, 2, 9, 9, 8), dtype=torch.float64)
    mass = reference.text_mass(q, k, slice(0, 4))
    _, joint = reference.sparse_dense_attention(q, k, v)
    _, text = reference.sparse_dense_attention(q, k[:, :, :4], v[:, :, :4])
    _, rest = reference.sparse_dense_attention(q, k[:, :, 4:], v[:, :, 4:])
    torch.testing.assert_close(mass * text + (1 - mass) * rest, joint, atol=1e-12, rtol=0)
