# SPDX-License-Identifier: GPL-3.0-or-later
"""The baselines of measurements agree with the reference of the tests."""

from __future__ import annotations

import pytest
import torch

import cases
import reference
from gag_core import GuidanceConfig
from gag_core.baselines import SHAPES, exact, random_inputs, sort_based_entmax15
from tolerances import assert_close

TEXT = 24
CONFIGS = {
    "paper": GuidanceConfig(),
    "gentle": GuidanceConfig(guidance_scale=2.0, norm_threshold=0.1, norm_mode="relative"),
    "alpha 2": GuidanceConfig(alpha=2.0, strength=0.5),
    "alpha 1.3": GuidanceConfig(alpha=1.3, norm_threshold=0.2),
    "orthogonal": GuidanceConfig(orthogonal_scale=0.5, norm_threshold=2.0),
    "pladis": GuidanceConfig(rule="pladis", guidance_scale=3.0, strength=0.7),
    "merged heads": GuidanceConfig(merge_heads=True, norm_threshold=0.5),
    "anderson": GuidanceConfig(rule="anderson"),
}


@pytest.mark.parametrize("text", [0, TEXT])
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_guidance_is_that_of_the_reference(name: str, text: int) -> None:
    config = CONFIGS[name]
    q, k, v = cases.qkv(cases.Shape(2, 3, 40, 40, 16), dtype=torch.float64)
    if text:
        expected = reference.guided_joint_attention(q, k, v, slice(0, text), config)
    else:
        expected = reference.guided_attention(q, k, v, config)
    plain = torch.matmul(reference.softmax(reference.attention_logits(q, k)), v)
    rows = slice(None, None, 3)
    found = exact(q, k, v, config, text=text, rows=rows)
    # What gag_core computes in fp64 finds its threshold by a fixed number of steps.
    error = 1e-6 if config.merge_heads or config.rule == "anderson" else 1e-9
    assert_close(found.guided, expected[:, :, rows], error=error)
    assert_close(found.plain, plain[:, :, rows], error=1e-9)


@pytest.mark.parametrize("text", [0, TEXT])
def test_a_mask_leaves_keys_out(text: int) -> None:
    q, k, v = cases.qkv(cases.Shape(2, 3, 40, 40, 16), dtype=torch.float64)
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., 12:] = False
    config = CONFIGS["gentle"]
    if text:
        expected = reference.guided_joint_attention(q, k, v, slice(0, text), config, mask=mask)
    else:
        expected = reference.guided_attention(q, k, v, config, mask=mask)
    assert_close(exact(q, k, v, config, text=text, mask=mask).guided, expected, error=1e-9)


def test_sorting_finds_the_weights_of_the_reference() -> None:
    logits = cases.random(5, 77, seed=1, std=3.0)
    assert_close(sort_based_entmax15(logits), reference.entmax(logits), error=1e-5)


def test_inputs_are_the_same_everywhere_and_lie_as_in_models() -> None:
    shape = SHAPES["sdxl-1024"][1]
    q, k, v = random_inputs(shape, torch.float16, torch.device("cpu"))
    assert q.shape == (shape.batch, shape.heads, shape.queries, shape.dim) and k.shape == v.shape
    assert q.transpose(1, 2).is_contiguous() and q.dtype == torch.float16
    again = random_inputs(shape, torch.float32, torch.device("cpu"))
    assert torch.equal(again[0].half(), q)
    logits = torch.matmul(again[0], again[1].transpose(-1, -2)) * shape.dim**-0.5
    assert 1.8 < float(logits.std()) < 2.2
