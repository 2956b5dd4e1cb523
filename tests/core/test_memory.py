# SPDX-License-Identifier: GPL-3.0-or-later
"""Bounded memory, measured by the storages that are alive: deterministic, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import cases
from benchmarks.speed.memory import MIB, StorageTracker, profiled_peak, tracked_peak
from cases import Shape
from gag_core import GuidanceConfig, eager, entmax, guided_attention, guided_joint_attention, sparse_dense_attention

PAPER = GuidanceConfig()


# --- the tracker itself -------------------------------------------------------------------------------------------


def test_the_tracker_counts_what_is_alive_at_once() -> None:
    x = torch.zeros(MIB // 4)  # 1 MiB from outside: not counted, nor are views of it
    with torch.no_grad(), StorageTracker() as tracker:
        view = x.view(-1, 4)[:10]
        assert tracker.live == 0
        y = x + 1
        z = y * 2
        assert tracker.live == 2 * MIB
        del y
        w = z.view(-1, 2).transpose(0, 1)
        assert tracker.live == MIB
        del z
        assert tracker.live == MIB  # w keeps it
        del w
        assert tracker.live == 0
        x.add_(1)
    assert tracker.peak == 2 * MIB
    assert view.shape == (10, 4)


def test_the_tracker_sees_outputs_grow() -> None:
    with torch.no_grad(), StorageTracker() as tracker:
        out = torch.empty(0)
        torch.add(torch.ones(64), 1.0, out=out)
    assert tracker.peak == 2 * 64 * 4


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0], ids="alpha={}".format)
def test_the_tracker_agrees_with_the_allocator(alpha: float) -> None:
    """Nothing of note is allocated inside the operators, where the tracker cannot look."""
    q, k, v = cases.qkv(Shape(1, 4, 512, 77, 32))
    calls: list[Callable[[], object]] = [
        lambda: entmax(q, alpha),
        lambda: guided_attention(q, k, v, GuidanceConfig(alpha=alpha)),
    ]
    for call in calls:
        call()  # what the first call sets up once is not its working memory
        tracked, profiled = tracked_peak(call), profiled_peak(call)
        assert tracked <= profiled <= 1.25 * tracked + MIB / 4


def test_repeats_agree() -> None:
    q, k, v = cases.qkv(Shape(1, 4, 512, 77, 32))
    peaks = {tracked_peak(lambda: guided_attention(q, k, v, PAPER)) for _ in range(3)}
    assert len(peaks) == 1


# --- entmax -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 1.75, 2.0], ids="alpha={}".format)
@pytest.mark.parametrize("size", [(64, 77), (64, 4608), (1024, 512)], ids=str)
@pytest.mark.parametrize("dim", [0, 1], ids="dim={}".format)
def test_entmax_needs_a_few_tensors_of_its_inputs_size(dim: int, size: tuple[int, int], alpha: float) -> None:
    """The result and up to three more tensors in fp32; sorting with its indices and sums needs about eleven."""
    with FakeTensorMode():
        logits = torch.empty(size)
        peak = tracked_peak(lambda: entmax(logits, alpha, dim=dim))
    along = size[1 - dim] * 4 * 16  # numbers per row: maxima, thresholds, sums
    assert peak <= 4 * logits.nbytes + along


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha={}".format)
def test_entmax_in_half_precision_works_in_fp32(alpha: float, dtype: torch.dtype) -> None:
    logits = cases.random(256, 512, seed=1, dtype=dtype)
    assert tracked_peak(lambda: entmax(logits, alpha)) <= (4 * 2 + 1) * logits.nbytes + 256 * 4 * 16


# --- guided attention ---------------------------------------------------------------------------------------------


def fake(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype)


def guided_peak(shape: Shape, config: GuidanceConfig = PAPER, dtype: torch.dtype = torch.float32) -> int:
    """Measure the peak of guided_attention from shapes alone."""
    with FakeTensorMode():
        q = fake(shape.batch, shape.heads, shape.queries, shape.dim, dtype=dtype)
        k, v = (fake(shape.batch, shape.heads, shape.keys, shape.dim, dtype=dtype) for _ in "kv")
        return tracked_peak(lambda: guided_attention(q, k, v, config))


def logits_bytes(shape: Shape) -> int:
    return shape.batch * shape.heads * shape.queries * shape.keys * 4


def output_bytes(shape: Shape) -> int:
    return shape.batch * shape.heads * shape.queries * shape.dim * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_alone_give_the_peak(dtype: torch.dtype) -> None:
    """So the sizes below can be those of real models without their computation."""
    shape = Shape(1, 4, 1024, 512, 16)
    q, k, v = cases.qkv(shape, dtype=dtype)
    assert guided_peak(shape, dtype=dtype) == tracked_peak(lambda: guided_attention(q, k, v, PAPER))


@pytest.mark.parametrize(
    "shape, alpha, dtype",
    [
        (Shape(1, 8, 2048, 512, 64), 1.0, torch.float32),
        (Shape(1, 8, 2048, 512, 64), 1.25, torch.float32),
        (Shape(1, 8, 4096, 512, 40), 1.5, torch.float32),
        (Shape(1, 8, 2048, 512, 64), 1.5, torch.bfloat16),
        (Shape(1, 8, 2048, 512, 64), 2.0, torch.float32),
        (Shape(1, 24, 1024, 512, 128), 1.5, torch.float32),
    ],
    ids=str,
)
def test_far_below_the_logits_and_a_small_multiple_of_the_output(
    shape: Shape, alpha: float, dtype: torch.dtype
) -> None:
    peak = guided_peak(shape, GuidanceConfig(alpha=alpha), dtype)
    assert peak - output_bytes(shape) < logits_bytes(shape) / 4
    assert peak < 4 * output_bytes(shape)


@pytest.mark.parametrize("merge", [False, True], ids=["per-head", "merged"])
def test_more_keys_need_no_more(merge: bool) -> None:
    config = GuidanceConfig(merge_heads=merge, orthogonal_scale=0.5)
    few, many = (guided_peak(Shape(1, 8, 2048, keys, 40), config) for keys in (256, 1024))
    assert many < 1.5 * few


def test_more_queries_need_their_output_only() -> None:
    some, more = (guided_peak(Shape(1, 8, queries, 512, 40)) for queries in (8192, 16384))
    growth = output_bytes(Shape(1, 8, 16384 - 8192, 512, 40))
    assert more - some < 1.1 * growth


def test_the_read_outs_alone_too() -> None:
    shape = Shape(1, 8, 4096, 512, 40)
    with FakeTensorMode():
        q, k, v = (fake(1, 8, tokens, 40) for tokens in (4096, 512, 512))
        peak = tracked_peak(lambda: sparse_dense_attention(q, k, v))
    assert peak < logits_bytes(shape) / 2
    assert peak < 2 * 3 * output_bytes(shape)  # two outputs


@pytest.mark.parametrize("size", [(1, 1, 1, 512), (2048, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_are_not_expanded(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    plain = guided_peak(Shape(1, 8, 2048, 512, 40))
    with FakeTensorMode():
        q, k, v = (fake(1, 8, tokens, 40) for tokens in (2048, 512, 512))
        mask = fake(*size, dtype=dtype)
        masked = tracked_peak(lambda: guided_attention(q, k, v, PAPER, mask=mask))
    assert masked < plain + 2 * MIB  # a chunk of the mask may be inverted or cast


@pytest.mark.parametrize("with_base", [False, True], ids=["own-joint", "base"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_joint_attention_holds_no_square_of_the_sequence(masked: bool, with_base: bool) -> None:
    """Measured with real tensors, because torch's own attention is part of it."""
    shape = Shape(1, 8, 1536, 1536, 16)
    q, k, v = cases.qkv(shape)
    base = cases.random(*q.shape, seed=20) if with_base else None
    mask = cases.random(1536, 1536, seed=3) > -1 if masked else None
    peak = tracked_peak(lambda: guided_joint_attention(q, k, v, slice(0, 256), PAPER, base=base, mask=mask))
    casts_of_the_mask = 1536 * 1536 * 4 if masked else 0  # one mask for all heads, which torch's attention casts
    assert peak < logits_bytes(shape) / 4 + casts_of_the_mask


# --- the bias of the memory-efficient kernel -------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [333, 336])
@pytest.mark.parametrize("shape", [(1, 1, 333, -1), (1, 1, 1, -1), (2, 1, 1, -1), (2, 24, 333, -1), (2, 1, 333, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "part of a wider one"])
def test_a_bias_that_heads_share_is_not_copied_for_each(shape: tuple[int, ...], keys: int, layout: str) -> None:
    """The kernel runs only on CUDA, but its arguments can be made on any device."""
    own = (*shape[:3], keys if shape[3] == -1 else shape[3])
    bias = torch.randn(*own[:2], own[3], own[2]).transpose(-1, -2) if layout == "transposed" else torch.randn(own)
    if layout == "part of a wider one":
        bias = torch.cat((bias, torch.randn(*own[:3], 5)), dim=-1)[..., : own[3]]
    full = (2, 24, 333, keys)
    aligned = eager._aligned_bias(bias, full)
    assert torch.equal(aligned, bias.expand(full))
    assert aligned.stride(-1) == 1 and all(step % eager._BIAS_ALIGNMENT == 0 for step in aligned.stride()[:-1])
    rows = bias.numel() // bias.shape[-1]
    assert aligned.untyped_storage().nbytes() <= max(bias.untyped_storage().nbytes(), 4 * rows * (keys + 15))
