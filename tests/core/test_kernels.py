# SPDX-License-Identifier: GPL-3.0-or-later
"""The Triton kernels in Triton's interpreter, against the fp64 reference, and the choice of the implementation.

The interpreter runs the code of the kernels on the CPU, program by program. It shows neither speed nor errors of a
card's compiler: see test_kernel_builds.py. With GAG_TEST_DEVICE=cuda these tests run on the card instead. The last test
does that where there is a card.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import cases
import kernel_calls
import reference
from cases import LAYOUTS, MASKS, Shape, shape_id
from gag_core import GuidanceConfig, eager, guided_attention, guided_joint_attention
from gag_core.attention import use_implementation
from gag_core.triton import choice, launch
from kernel_calls import CONFIGS, DEVICE, DTYPES, LONG, SHAPES, SMALL
from properties import SEEDS, examples

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux"),
    # The interpreter computes in NumPy, which warns about infinities that the kernels handle.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Tests of the interpreter itself, and the test that starts the run on a card, are skipped on a card.
interpreted_only = pytest.mark.skipif(DEVICE.type != "cpu", reason="only for the interpreter")


def by_kernel(q: Tensor, k: Tensor, v: Tensor, config: GuidanceConfig, **options: Any) -> Tensor:
    return kernel_calls.by_kernel("fused", q, k, v, config, **options)


def launched(out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: GuidanceConfig, **options: Any) -> Tensor:
    return kernel_calls.launched("fused", out, q, k, v, config, **options)


def assert_matches(q: Tensor, k: Tensor, v: Tensor, config: GuidanceConfig, **options: Any) -> None:
    kernel_calls.assert_matches("fused", q, k, v, config, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes_and_dtypes(shape: Shape, dtype: torch.dtype) -> None:
    assert_matches(*cases.qkv(shape, dtype=dtype, std=1.0), CONFIGS["gentle"])


@pytest.mark.parametrize("shape, with_base", [(SMALL, False), (SMALL, True), (LONG, True)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, with_base: bool, shape: Shape) -> None:
    q, k, v = cases.qkv(shape)
    base = cases.random(*q.shape, seed=20) if with_base else None
    assert_matches(q, k, v, CONFIGS[name], base=base)


@pytest.mark.parametrize("alpha", [1.05, 1.25, 1.5, 1.75, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("keys", [77, 128, 700], ids="keys={}".format)
def test_many_ties_at_the_edge_of_the_support(keys: int, alpha: float) -> None:
    """The search for the threshold takes most steps for such rows."""
    q, k, v = cases.with_logits(cases.ties_at_the_edge(keys, alpha), 16)
    assert_matches(q, k, v, dataclasses.replace(CONFIGS["gentle"], alpha=alpha), scale=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    change = LAYOUTS[layout]
    q, k, v = cases.qkv(SMALL)
    assert_matches(change(q), change(k), change(v), CONFIGS["paper"])
    out = launched(change(torch.zeros_like(q)), q, k, v, CONFIGS["paper"], scale=0.2)
    assert torch.equal(out, by_kernel(q, k, v, CONFIGS["paper"], scale=0.2))


@interpreted_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_as_a_card_does_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Custom reductions are used on cards. The interpreter calls them for each number, so only this test uses them."""
    from triton.language import constexpr

    from gag_core.triton import formulas, kernels

    tensors = cases.qkv(Shape(1, 1, 3, 20, 16), dtype=dtype, std=1.0)
    expected = by_kernel(*tensors, CONFIGS["gentle"])
    called = set()
    for function in (formulas._add_pairs, kernels._keep):

        def recorded(*args: object, original: Any = function.fn) -> Any:
            called.add(original.__name__)
            return original(*args)

        monkeypatch.setattr(function, "fn", recorded)
    for module in (formulas, kernels):
        monkeypatch.setattr(module, "FEW_EXCHANGES", constexpr(True))
    torch.testing.assert_close(by_kernel(*tensors, CONFIGS["gentle"]), expected, rtol=1e-5, atol=1e-5)
    assert called == {"_add_pairs"}  # an axis of one number, as of _keep, needs no function to be called


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SMALL, LONG], ids=["on-chip", "long"])
def test_any_scale(shape: Shape, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(shape, dtype=dtype)
    mask = MASKS["bool-per-key"](shape)
    for scale in (-0.3, 0.0, 1e-300, 1e300):
        out = by_kernel(q, k, v, CONFIGS["gentle"], mask=mask, scale=scale)
        if abs(scale) < 1.0:
            expected = reference.guided_attention(q, k, v, CONFIGS["gentle"], mask=mask, scale=scale)
            limit = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 6e-2}[dtype]
            assert (out.double() - expected).norm() <= limit * expected.norm()
        else:
            assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    assert_matches(*cases.qkv(SMALL), CONFIGS["gentle"], mask=MASKS[name](SMALL))


@pytest.mark.parametrize("name", ["bool-some-rows-empty", "additive-inf", "additive-lowest"])
def test_masks_of_long_text(name: str) -> None:
    assert_matches(*cases.qkv(LONG), CONFIGS["gentle"], mask=MASKS[name](LONG))


def test_values_of_another_width() -> None:
    q, k, _ = cases.qkv(SMALL)
    v = cases.random(SMALL.batch, SMALL.heads, SMALL.keys, 20, seed=9)
    assert_matches(q, k, v, CONFIGS["paper"])


@pytest.mark.parametrize("shape", [SMALL, LONG], ids=["on-chip", "long"])
@pytest.mark.parametrize("std", [0.01, 6.0, 30.0])
def test_flat_and_peaked_logits(std: float, shape: Shape) -> None:
    assert_matches(*cases.qkv(shape, std=std), CONFIGS["gentle"])


def test_blocks_of_long_text_that_are_skipped() -> None:
    """All keys above the threshold are in one block; the other blocks lie far below it."""
    q, k, v = cases.qkv(LONG)
    k[:, :, :256] *= 0.01
    k[:, :, 300:] *= 0.01
    assert_matches(q * 6, k, v, CONFIGS["paper"])


@pytest.mark.parametrize("shape", [SMALL, LONG], ids=["on-chip", "long"])
def test_the_text_part_of_a_joint_attention(shape: Shape) -> None:
    q, k, v = cases.qkv(shape)
    joint_lse = reference.attention_logits(q, k).logsumexp(-1) + cases.random(*q.shape[:3], seed=5).abs()
    # The mass of the first query exceeds 1 by rounding; the second query reads nothing in the whole sequence.
    joint_lse[..., 0] -= 5.0
    mask = torch.ones(1, 1, shape.queries, 1, dtype=torch.bool)
    mask[:, :, 1] = False
    joint_lse[..., 1] = -math.inf
    base = cases.random(*q.shape, seed=6)
    result = by_kernel(q, k, v, CONFIGS["gentle"], base=base, mask=mask, joint_lse=joint_lse.float())
    expected = torch.empty_like(result)
    eager.guide(
        expected,
        *(q, k, v, CONFIGS["gentle"]),
        base=base,
        mask=mask,
        scale=q.shape[3] ** -0.5,
        joint_lse=joint_lse.float(),
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(result[:, :, 1], base[:, :, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["paper", "orthogonal", "pladis"])
def test_extreme_values_stay_finite(name: str, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(Shape(1, 1, 6, 40, 16), dtype=dtype)
    config = dataclasses.replace(CONFIGS[name], guidance_scale=1e30, norm_threshold=math.inf)
    v[..., ::2, :] *= torch.finfo(dtype).max / v.abs().max()
    v[..., 1::2, :] *= torch.finfo(dtype).tiny
    assert torch.isfinite(by_kernel(q * 8, k * 8, v / 64, config)).all()
    assert torch.isfinite(by_kernel(q, k, torch.zeros_like(v), config)).all()


@pytest.mark.parametrize("keys", [40, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_and_sums_beyond_the_range_stay_finite(dtype: torch.dtype, keys: int) -> None:
    end = torch.finfo(dtype).max
    q, k, v = (x.sign() * end for x in cases.qkv(Shape(1, 1, 4, keys, 16), dtype=dtype))
    v[..., 0] = end
    mask = torch.full((1, 1, 1, keys), torch.finfo(torch.float32).max)
    assert torch.isfinite(by_kernel(q, k, v, CONFIGS["paper"])).all()
    assert torch.isfinite(by_kernel(q, k, v, CONFIGS["paper"], mask=mask)).all()
    result = by_kernel(q * 0, k, v, CONFIGS["paper"])
    torch.testing.assert_close(result[..., 0], torch.full_like(result[..., 0], end))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_spoils_its_own_row_alone(bad: float) -> None:
    q, k, v = cases.qkv(SMALL)
    clean = by_kernel(q, k, v, CONFIGS["gentle"])
    q[0, 1, 3, 2] = bad
    result = by_kernel(q, k, v, CONFIGS["gentle"])
    assert torch.isnan(result[0, 1, 3]).all() or bad == math.inf
    result[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(result, clean)


@examples(25)
@hypothesis.given(
    SEEDS,
    st.integers(1, 20),
    st.integers(1, 130),
    st.sampled_from([16, 24, 40, 72]),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(CONFIGS)),
    st.booleans(),
)
def test_any_call(seed: int, queries: int, keys: int, dim: int, dtype: torch.dtype, name: str, masked: bool) -> None:
    shape = Shape(1, 2, queries, keys, dim)
    q, k, v = cases.qkv(shape, seed=seed, dtype=dtype, std=1.0)
    mask = cases.cast_mask(cases.additive_bias(shape), dtype) if masked else None
    result = by_kernel(q, k, v, CONFIGS[name], mask=mask)
    expected = torch.empty_like(result)
    eager.guide(expected, q, k, v, CONFIGS[name], base=None, mask=mask, scale=dim**-0.5, joint_lse=None)
    limit = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 6e-2}[dtype]
    assert (result - expected).double().norm() <= limit * expected.double().norm()


# --- choice of the implementation ----------------------------------------------------------------------------------


def guide_as_on_a_card(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: GuidanceConfig, **options: Tensor | float | None
) -> None:
    """Pick the implementation for CPU tensors as ``default_guide`` does for tensors on a card."""
    guide = launch.guide if choice.supports("fused", q.dtype, q.shape[3], v.shape[3], config) else eager.guide
    guide(out, q, k, v, config, **options)  # type: ignore[arg-type]


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the kernels for CPU tensors as on a card."""
    # In a run on a card (GAG_TEST_DEVICE) the interpreter is off, and only the interpreter takes CPU tensors.
    if DEVICE.type != "cpu":
        pytest.skip("the interpreter is off")
    monkeypatch.setattr(launch, "_failed", set())
    monkeypatch.setattr(launch, "_warned", set())
    with use_implementation(guide_as_on_a_card):
        yield


def not_eager(*args: object, **kwargs: object) -> None:
    raise AssertionError("the eager path ran")


@pytest.mark.usefixtures("on_the_cpu")
def test_the_public_functions_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = cases.qkv(SMALL)
    j = cases.qkv(Shape(1, 2, 40, 40, 32))
    expected = reference.guided_attention(q, k, v, CONFIGS["gentle"])
    expected_joint = reference.guided_joint_attention(*j, slice(0, 13), CONFIGS["gentle"])
    monkeypatch.setattr(eager, "guide", not_eager)
    torch.testing.assert_close(guided_attention(q, k, v, CONFIGS["gentle"]).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        guided_joint_attention(*j, slice(0, 13), CONFIGS["gentle"]).double(), expected_joint, rtol=1e-4, atol=1e-4
    )


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("config", [GuidanceConfig(alpha=1.04), GuidanceConfig(merge_heads=True)], ids=str)
def test_unsupported_settings_are_computed_without_the_kernels(
    config: GuidanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = cases.qkv(SMALL)
    monkeypatch.setattr(launch, "_launch", not_eager)
    torch.testing.assert_close(
        guided_attention(q, k, v, config).double(),
        reference.guided_attention(q, k, v, config),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.usefixtures("on_the_cpu")
def test_a_kernel_that_fails_is_logged_once_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def broken(*args: object) -> None:
        calls.append(args)
        raise RuntimeError("ptxas died of\nold age")

    q, k, v = cases.qkv(SMALL)
    monkeypatch.setattr(launch, "_launch", broken)
    with caplog.at_level(logging.WARNING):
        results = [guided_attention(q, k, v, CONFIGS["paper"]) for _ in range(3)]
        other = cases.qkv(Shape(1, 1, 4, 9, 16))
        guided_attention(*other, CONFIGS["paper"])
    with use_implementation(eager.guide):
        expected = guided_attention(q, k, v, CONFIGS["paper"])
    assert all(torch.equal(result, expected) for result in results)
    assert len(calls) == 2, "tried again after it failed, or not tried for other sizes"
    [record] = caplog.records
    assert "ptxas died of old age" in record.getMessage() and "cpu" in record.getMessage()


@pytest.mark.usefixtures("on_the_cpu")
def test_running_out_of_memory_does_not_count_as_a_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("full")

    q, k, v = cases.qkv(SMALL)
    monkeypatch.setattr(launch, "_launch", full)
    with pytest.raises(torch.OutOfMemoryError):
        guided_attention(q, k, v, CONFIGS["paper"])
    assert not launch._failed


@pytest.mark.usefixtures("on_the_cpu")
def test_a_compiled_graph_does_not_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model is one graph, and a kernel one operator in it, which handles a failure of the kernel."""
    torch.compiler.reset()
    q, k, v = cases.qkv(SMALL)
    joint = cases.qkv(Shape(1, 2, 40, 40, 32))
    mask = MASKS["bool-per-key"](SMALL)

    def model() -> tuple[Tensor, Tensor]:
        cross = guided_attention(q, k, v, CONFIGS["no-cap"], mask=mask)
        return cross, guided_joint_attention(*joint, slice(0, 13), CONFIGS["gentle"]) * 2

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected_pair = model()
    with monkeypatch.context() as patch:
        patch.setattr(eager, "guide", not_eager)
        for ours, expected in zip(compiled(), expected_pair, strict=True):
            assert torch.equal(ours, expected)
            assert ours.stride() == expected.stride()
    monkeypatch.setattr(launch, "_launch", lambda *args: 1 / 0)
    for ours, expected in zip(compiled(), model(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "length, largest, widths",
    [
        (1, 64, [16]),
        (40, 128, [32, 16]),
        (77, 64, [64, 16]),
        (96, 128, [64, 32]),
        (154, 64, [64, 64, 32]),
        (160, 128, [128, 32]),
        (60, 64, [64]),
        (512, 64, [64] * 8),
    ],
)
def test_tiles(length: int, largest: int, widths: list[int]) -> None:
    found = launch.tiles(length, largest)
    assert [width for _, width in found] == widths
    assert [first for first, _ in found] == [sum(widths[:i]) for i in range(len(widths))]


@pytest.mark.parametrize("block_n", [32, 64])
def test_only_the_last_tile_reaches_beyond_the_keys(block_n: int) -> None:
    programs = set()
    for keys in range(1, 513):
        length = launch.rounded(keys, block_n)
        found = launch.tiles(length, block_n)
        assert sum(width for _, width in found) == length >= keys > found[-1][0]
        programs.add(length) if keys <= 256 else None
    assert len(programs) <= 8 if block_n == 64 else 11


# Skipped where there is no such card. The interpreter runs the same tests there.
@interpreted_only
@pytest.mark.skipif(
    not torch.cuda.is_available() or choice.cannot_run("fused", torch.device("cuda")) is not None,
    reason="no card that the kernels run on",
)
def test_the_same_tests_on_the_card_of_this_machine() -> None:
    environment = {**os.environ, "GAG_TEST_DEVICE": "cuda"}
    environment.pop("TRITON_INTERPRET")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
