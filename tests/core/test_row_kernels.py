# SPDX-License-Identifier: GPL-3.0-or-later
"""The row path in Triton's interpreter, against the fp64 reference: products, weights, guidance; and its launches.

``test_kernels.py`` holds the fused kernel to the same calls. What the compilers make of the kernels is in
``test_kernel_builds.py``.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import kernel_calls
import reference
from benchmarks.speed.launches import LaunchCounter, wide_products_on_meta
from cases import LAYOUTS, MASKS, Shape, shape_id
from gag_core import GuidanceConfig, eager, guided_attention, numerics
from gag_core.attention import use_implementation
from gag_core.triton import launch, row
from kernel_calls import CONFIGS, DEVICE, DTYPES, SHAPES, assert_matches, by_kernel, launched

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux"),
    # The interpreter computes in NumPy, which warns about infinities that the kernels handle.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Few queries: the interpreter takes a few milliseconds for each program.
SMALL = Shape(2, 2, 5, 77, 32)
interpreted_only = pytest.mark.skipif(DEVICE.type != "cpu", reason="only for the interpreter")


@pytest.fixture(params=[False, True], ids=["products-in-fp32", "products-in-half"])
def half_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of products. A CPU lacks those of half precision, so their results are computed from copies."""
    if request.param and DEVICE.type == "cpu":
        monkeypatch.setattr(row, "has_wide_products", lambda x: x.dtype != torch.float32)
        monkeypatch.setattr(row, "_product", lambda a, b: torch.bmm(a.float(), b.float()))
    elif not request.param:
        monkeypatch.setattr(row, "has_wide_products", lambda x: False)
    return bool(request.param)


@pytest.fixture
def rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let rows of more than 32 keys be too long to be held on chip."""
    monkeypatch.setattr(row, "_KEYS_ON_CHIP", 32)
    monkeypatch.setattr(row, "_LONG_BLOCK", 32)
    row._plan.cache_clear()
    yield
    row._plan.cache_clear()


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes(shape: Shape) -> None:
    assert_matches("row", *cases.qkv(shape._replace(queries=min(shape.queries, 20)), std=1.0), CONFIGS["gentle"])


@pytest.mark.usefixtures("half_products")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [Shape(2, 2, 9, 77, 40), Shape(1, 1, 5, 512, 128)], ids=shape_id)
def test_half_precision(shape: Shape, dtype: torch.dtype) -> None:
    assert_matches("row", *cases.qkv(shape, dtype=dtype, std=1.0), CONFIGS["gentle"])


@pytest.mark.parametrize("with_base", [False, True], ids=["dense", "base"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, with_base: bool) -> None:
    q, k, v = cases.qkv(SMALL)
    assert_matches("row", q, k, v, CONFIGS[name], base=cases.random(*q.shape, seed=20) if with_base else None)


@pytest.mark.parametrize("keys, alpha", [(77, 1.05), (77, 1.25), (77, 1.5), (77, 1.75), (77, 2.0), (700, 1.5)], ids=str)
def test_many_ties_at_the_edge_of_the_support(keys: int, alpha: float) -> None:
    """The search for the threshold takes most steps for such rows."""
    q, k, v = cases.with_logits(cases.ties_at_the_edge(keys, alpha)[::2], 16)
    assert_matches("row", q, k, v, dataclasses.replace(CONFIGS["gentle"], alpha=alpha), scale=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    change = LAYOUTS[layout]
    q, k, v = cases.qkv(SMALL)
    base = cases.random(*q.shape, seed=20)
    out = change(torch.zeros_like(q))
    result = launched("row", out, change(q), change(k), change(v), CONFIGS["gentle"], base=change(base), scale=0.2)
    expected = reference.guided_attention(q, k, v, CONFIGS["gentle"], base=base, scale=0.2)
    assert (result - expected).norm() <= kernel_calls.FP32_ERROR * expected.norm()


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    assert_matches("row", *cases.qkv(SMALL), CONFIGS["gentle"], mask=MASKS[name](SMALL))


@pytest.mark.usefixtures("rows_in_blocks")
@pytest.mark.parametrize("name", ["bool-some-rows-empty", "additive-inf", "additive-lowest", "bool-per-key"])
def test_masks_of_rows_in_blocks(name: str) -> None:
    assert_matches("row", *cases.qkv(SMALL), CONFIGS["gentle"], mask=MASKS[name](SMALL))


@pytest.mark.usefixtures("rows_in_blocks")
@pytest.mark.parametrize("name", ["paper", "alpha-1.25", "sparsemax-half"])
def test_configs_of_rows_in_blocks(name: str) -> None:
    assert_matches("row", *cases.qkv(SMALL), CONFIGS[name])


def test_more_keys_than_a_row_on_chip_holds() -> None:
    shape = Shape(1, 1, 2, row._KEYS_ON_CHIP + 100, 16)
    assert_matches("row", *cases.qkv(shape), CONFIGS["gentle"])


def test_values_of_another_width() -> None:
    q, k, _ = cases.qkv(SMALL)
    v = cases.random(SMALL.batch, SMALL.heads, SMALL.keys, 20, seed=9)
    assert_matches("row", q, k, v, CONFIGS["paper"])


@pytest.mark.parametrize("std", [0.01, 6.0, 30.0])
def test_flat_and_peaked_logits(std: float) -> None:
    assert_matches("row", *cases.qkv(kernel_calls.SMALL, std=std), CONFIGS["gentle"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_scale(dtype: torch.dtype) -> None:
    shape = SMALL._replace(batch=1)
    q, k, v = cases.qkv(shape, dtype=dtype)
    mask = MASKS["bool-per-key"](shape)
    for scale in (-0.3, 0.0, 1e-300, 1e300):
        out = by_kernel("row", q, k, v, CONFIGS["gentle"], mask=mask, scale=scale)
        if abs(scale) < 1.0:
            expected = reference.guided_attention(q, k, v, CONFIGS["gentle"], mask=mask, scale=scale)
            limit = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 6e-2}[dtype]
            assert (out.double() - expected).norm() <= limit * expected.norm()
        else:
            assert torch.isfinite(out).all()


@pytest.mark.usefixtures("half_products")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["paper", "orthogonal", "pladis"])
def test_extreme_values_stay_finite(name: str, dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(Shape(1, 1, 6, 40, 16), dtype=dtype)
    config = dataclasses.replace(CONFIGS[name], guidance_scale=1e30, norm_threshold=math.inf)
    v[..., ::2, :] *= torch.finfo(dtype).max / v.abs().max()
    v[..., 1::2, :] *= torch.finfo(dtype).tiny
    assert torch.isfinite(by_kernel("row", q * 8, k * 8, v / 64, config)).all()
    assert torch.isfinite(by_kernel("row", q, k, torch.zeros_like(v), config)).all()


@pytest.mark.usefixtures("half_products")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_and_sums_beyond_the_range_stay_finite(dtype: torch.dtype) -> None:
    end = torch.finfo(dtype).max
    q, k, v = (x.sign() * end for x in cases.qkv(Shape(1, 1, 4, 40, 16), dtype=dtype))
    v[..., 0] = end
    mask = torch.full((1, 1, 1, 40), torch.finfo(torch.float32).max)
    assert torch.isfinite(by_kernel("row", q, k, v, CONFIGS["paper"])).all()
    assert torch.isfinite(by_kernel("row", q, k, v, CONFIGS["paper"], mask=mask)).all()
    result = by_kernel("row", q * 0, k, v, CONFIGS["paper"])
    torch.testing.assert_close(result[..., 0], torch.full_like(result[..., 0], end))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_spoils_its_own_row_alone(bad: float) -> None:
    q, k, v = cases.qkv(SMALL)
    clean = by_kernel("row", q, k, v, CONFIGS["gentle"])
    q[0, 1, 3, 2] = bad
    result = by_kernel("row", q, k, v, CONFIGS["gentle"])
    assert torch.isnan(result[0, 1, 3]).all() or bad == math.inf
    result[0, 1, 3] = clean[0, 1, 3]
    torch.testing.assert_close(result, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("in_blocks", [False, True], ids=["on-chip", "in-blocks"])
def test_the_text_part_of_a_joint_attention(in_blocks: bool, request: pytest.FixtureRequest) -> None:
    if in_blocks:
        request.getfixturevalue("rows_in_blocks")
    q, k, v = cases.qkv(SMALL)
    joint_lse = reference.attention_logits(q, k).logsumexp(-1) + cases.random(*q.shape[:3], seed=5).abs()
    # The mass of the first query exceeds 1 by rounding; the second query reads nothing in the whole sequence.
    joint_lse[..., 0] -= 5.0
    mask = torch.ones(1, 1, SMALL.queries, 1, dtype=torch.bool)
    mask[:, :, 1] = False
    joint_lse[..., 1] = -math.inf
    base = cases.random(*q.shape, seed=6)
    options = {"base": base, "mask": mask, "joint_lse": joint_lse.float()}
    result = by_kernel("row", q, k, v, CONFIGS["gentle"], **options)
    expected = torch.empty_like(result)
    eager.guide(expected, q, k, v, CONFIGS["gentle"], scale=q.shape[3] ** -0.5, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(result[:, :, 1], base[:, :, 1])


@interpreted_only
def test_chunks_of_queries_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(2, 2, 9, 77, 32)
    q, k, v = cases.qkv(shape)
    mask, base = MASKS["additive-inf"](shape), cases.random(*q.shape, seed=20)
    whole = by_kernel("row", q, k, v, CONFIGS["gentle"], mask=mask, base=base)
    for constant in ("_CPU_CHUNK", "_LEAST_CPU_CHUNK"):
        monkeypatch.setattr(eager, constant, 2500)
    assert len(eager.chunks(q, per_query=2 * 80, per_head=80 * 64)) > 2
    parts = by_kernel("row", q, k, v, CONFIGS["gentle"], mask=mask, base=base)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["bool-per-head", "additive-inf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_padding_of_keys_may_hold_anything(dtype: torch.dtype, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    prepare, padded = row._Memory.prepare, []

    def spoiled(*arguments: Any) -> Any:
        memory = prepare(*arguments)
        padding = memory.keys[..., memory.key_count :]
        padded.append(padding.fill_(math.nan).numel())
        return memory

    expected = [by_kernel("row", q, k, v, CONFIGS["gentle"], mask=m) for m in (None, MASKS[mask](SMALL))]
    monkeypatch.setattr(row._Memory, "prepare", spoiled)
    found = [by_kernel("row", q, k, v, CONFIGS["gentle"], mask=m) for m in (None, MASKS[mask](SMALL))]
    assert all(padded)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@interpreted_only
def test_the_result_may_overwrite_the_base() -> None:
    q, k, v = cases.qkv(SMALL)
    base = cases.random(*q.shape, seed=20)
    expected = by_kernel("row", q, k, v, CONFIGS["gentle"], base=base)
    assert torch.equal(launched("row", base, q, k, v, CONFIGS["gentle"], base=base), expected)


# --- launches ------------------------------------------------------------------------------------------------------


class OperationCounter(TorchDispatchMode):
    """Count the operations of torch inside a ``with`` block, views and allocations too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@interpreted_only
@pytest.mark.parametrize(
    "shape, dtype, most, most_operations",
    [
        (Shape(2, 10, 4096, 77, 64), torch.float16, 8, 18),
        (Shape(2, 20, 1024, 77, 64), torch.float16, 8, 18),
        (Shape(1, 24, 4096, 512, 128), torch.bfloat16, 27, 1000),
    ],
    ids=["SDXL 4096", "SDXL 1024", "Flux"],
)
def test_few_launches(
    shape: Shape, dtype: torch.dtype, most: int, most_operations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data stand for those of a card, for which chunks are larger than on a CPU.

    Operations of torch are counted too, with views and allocations. Each takes about a microsecond of a CPU. A call in
    one chunk, as in SDXL, needs no views of parts of its tensors.
    """
    q, k, v = (
        torch.empty(shape.batch, tokens, shape.heads, shape.dim, dtype=dtype, device="meta").transpose(1, 2)
        for tokens in (shape.queries, shape.keys, shape.keys)
    )
    started = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *arguments, **settings: started.append(self.name)

    monkeypatch.setattr(row, "_current_device", lambda device: launch._current_device(torch.device("cpu")))
    from gag_core.triton import row_kernels

    for name in ("row_weights_kernel", "row_guidance_kernel"):
        monkeypatch.setattr(row_kernels, name, Kernel(name))
    row._plan.cache_clear()
    joint = shape.dim == 128
    lse = torch.empty(*q.shape[:3], device="meta") if joint else None
    out = torch.empty_like(q)
    with wide_products_on_meta(True), LaunchCounter() as counter, OperationCounter() as operations:
        row.launch(out, q, k, v, CONFIGS["gentle"], out if joint else None, None, 0.1, lse)
    row._plan.cache_clear()
    assert operations.count <= most_operations
    assert started.count("row_weights_kernel") == started.count("row_guidance_kernel") > 0
    assert counter.launches + len(started) <= most


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def by_row_path(new_guard: None) -> Iterator[None]:
    """Use the row path for CPU tensors as on a card."""
    if DEVICE.type != "cpu":
        pytest.skip("the interpreter is off")
    with use_implementation(row.guide):
        yield


@pytest.mark.usefixtures("by_row_path")
def test_a_kernel_that_fails_is_logged_once_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = cases.qkv(SMALL)
    calls = []

    def broken(*args: object, **options: object) -> None:
        calls.append(args)
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(row, "launch", broken)  # for the check
    with caplog.at_level(logging.WARNING):
        results = [guided_attention(q, k, v, CONFIGS["paper"]) for _ in range(3)]
    expected = torch.empty_like(results[0])
    eager.guide(expected, q, k, v, CONFIGS["paper"], base=None, mask=None, scale=q.shape[3] ** -0.5)
    assert all(torch.equal(result, expected) for result in results)
    assert len(calls) == 1
    [record] = caplog.records
    assert "ptxas died" in record.getMessage() and "row" in record.getMessage()


@pytest.mark.usefixtures("by_row_path")
def test_a_compiled_graph_does_not_break() -> None:
    torch.compiler.reset()
    q, k, v = cases.qkv(SMALL)

    def model() -> Tensor:
        return guided_attention(q, k, v, GuidanceConfig()) * 2

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), model())


def test_kernel_calls_are_those_of_the_row_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper that all tests above use calls the row path."""
    monkeypatch.setattr(row, "launch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kernel_calls.by_kernel("row", *cases.qkv(SMALL), CONFIGS["paper"])


def test_sums_in_fp16_are_computed_from_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's option "fp16_accumulation" would sum products of fp16 in fp16."""
    dtypes = []
    product = row._product
    monkeypatch.setattr(numerics, "_multiplies_wide", lambda device, dtype: True)
    # torch's own object reads and writes a setting of the process, which a CPU has too.
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=True))

    def noted(a: Tensor, b: Tensor) -> Tensor:
        dtypes.append(b.dtype)
        return product(a, b)

    monkeypatch.setattr(row, "_product", noted)
    by_kernel("row", *cases.qkv(Shape(1, 1, 3, 5, 16), dtype=torch.float16), CONFIGS["paper"])
    assert dtypes == [torch.float32, torch.float32]
