# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark command: it runs, its methods compute the same, and its goals are judged correctly."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import cases
import reference
from benchmarks.speed import attention as benchmark
from benchmarks.speed import methods
from benchmarks.speed.methods import ALPHAS, ANDERSON, EAGER, FUSED, PACKAGE, SDPA, SORT, UNIFORM
from gag_core import GuidanceConfig
from gag_core.baselines import SHAPES, Shape, exact
from tolerances import assert_close

CPU = torch.device("cpu")
TEXT = 24


@pytest.mark.parametrize("method", [EAGER, SORT, PACKAGE], ids=lambda method: method.name)
def test_every_method_computes_the_same(method: methods.Method) -> None:
    """Otherwise the comparison of their times would be unfair."""
    q, k, v = cases.qkv(cases.Shape(2, 3, 20, 77, 16))
    with methods.swapped(method.swaps()):
        assert_close(method.attention(0)(q, k, v), reference.guided_attention(q, k, v, GuidanceConfig()), error=1e-3)


@pytest.mark.parametrize("method", [EAGER, SORT, PACKAGE], ids=lambda method: method.name)
def test_every_method_computes_the_same_joint_attention(method: methods.Method) -> None:
    q, k, v = cases.qkv(cases.Shape(2, 3, 60, 60, 16))
    expected = reference.guided_joint_attention(q, k, v, slice(0, TEXT), GuidanceConfig())
    with methods.swapped(method.swaps()):
        assert_close(method.attention(TEXT)(q, k, v), expected, error=1e-3)


@pytest.mark.parametrize("method", [*ANDERSON, *ALPHAS, UNIFORM], ids=lambda method: method.name)
@pytest.mark.parametrize("text", [0, TEXT])
def test_methods_with_other_settings_compute_them(method: methods.Method, text: int) -> None:
    q, k, v = cases.qkv(cases.Shape(1, 2, 40, 40, 16), dtype=torch.float64)
    if text:
        expected = reference.guided_joint_attention(q, k, v, slice(0, text), method.config)
    else:
        expected = reference.guided_attention(q, k, v, method.config)
    assert_close(method.attention(text)(q, k, v), expected, error=1e-5)
    checked = slice(None, None, 7)
    found = exact(q, k, v, method.config, text=text, rows=checked)
    assert_close(found.guided, expected[:, :, checked], error=1e-5)


def test_the_command_times_other_settings_if_asked(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = ["--shapes", "1x2x100x77x16", "1x2x90x90x16x64", "--repeats", "1", "--threads", "1", "--json", str(file)]
    assert benchmark.main([*command, "--anderson", "--alphas"]) == 0
    found = json.loads(file.read_text())["results"]
    rows = [row for row in found if row["method"].startswith(("anderson", "alpha"))]
    assert [row["method"] for row in rows] == [method.name for method in (*ANDERSON, *ALPHAS)] * 2
    assert all(row["times_sdpa"] > 0 and row["error"] < 1e-2 for row in rows)


def test_the_swapped_function_is_the_one_that_runs() -> None:
    """Otherwise every row of the table would be the same method."""
    calls = []

    def guide(out: torch.Tensor, *_: object, **__: object) -> None:
        calls.append(out.fill_(7))

    q, k, v = cases.qkv(cases.Shape(1, 1, 60, 60, 16))
    for text in (0, TEXT):
        with methods.swapped(methods.guided_by(guide)()):
            assert (SORT.attention(text)(q, k, v)[:, :, text:] == 7).all()
    assert len(calls) == 2


@pytest.mark.parametrize("text", [0, TEXT])
def test_the_exact_attention(text: int) -> None:
    q, k, v = cases.qkv(cases.Shape(2, 3, 60, 60, 16))
    checked = slice(None, None, 7)
    found = exact(q, k, v, GuidanceConfig(), text=text, rows=checked)
    if text:
        expected = reference.guided_joint_attention(q, k, v, slice(0, text), GuidanceConfig())
    else:
        expected = reference.guided_attention(q, k, v, GuidanceConfig())
    assert_close(found.guided, expected[:, :, checked], error=1e-9)
    plain = torch.matmul(reference.softmax(reference.attention_logits(q, k)), v.double())
    assert_close(found.plain, plain[:, :, checked], error=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    file = tmp_path / "results.json"
    shapes = ["1x2x300x77x16", "1x2x300x300x16x64"]
    command = ["--shapes", *shapes, "--repeats", "1", "--threads", "1", "--dtype", dtype, "--json", str(file)]
    assert benchmark.main(command) == 0
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())
    names = [SDPA.name, UNIFORM.name, EAGER.name, SORT.name]
    if importlib.util.find_spec("entmax") is not None:
        names.append(PACKAGE.name)
    assert [row["method"] for row in results["results"]] == names * 2
    for shape in ("custom: 300 x 77, B1 H2 d16", "custom: 300 x 300, text 64, B1 H2 d16"):
        assert all(f"| {shape} | {name} |" in printed for name in names)
    for row in results["results"]:
        values = [value for value in row.values() if isinstance(value, float)]
        assert len(values) >= 7 and all(math.isfinite(value) for value in values)
        assert 0 < row["best_ms"] <= row["median_ms"] and row["error"] < 1e-2
    # The goals for errors hold on any machine. Those for time do not apply to such small shapes.
    errors = [goal for goal in results["goals"] if "error" in goal["goal"]]
    assert errors and all(goal["met"] for goal in errors)
    assert any(FUSED.name in note for note in results["notes"])


def row(method: methods.Method, shape: Shape, **values: float) -> benchmark.Row:
    ones = dict.fromkeys(benchmark.Row._fields[2:], 1.0)
    return benchmark.Row(shape, method.name, **{**ones, **values})


def test_the_goals_go_by_the_worst_shape() -> None:
    unet, flux = SHAPES["sdxl-1024"][0], SHAPES["flux-1024"][0]
    rows = [
        row(EAGER, unet, times_sdpa=3.0, faster_than_sort=2.0),
        row(EAGER, flux, times_sdpa=5.0, faster_than_sort=9.0),
        row(FUSED, unet, times_sdpa=1.4),
        row(FUSED, flux, times_sdpa=1.25),
    ]
    found = {goal["goal"]: goal for goal in benchmark.judged(rows, CPU, torch.float32) if goal["method"] == EAGER.name}
    slow, fast = found["time at most 4 times SDPA"], found["at least 3 times faster than sort-based"]
    assert (slow["worst"], slow["shape"], slow["shapes_met"], slow["met"]) == (5.0, str(flux), 1, False)
    assert (fast["worst"], fast["shape"], fast["shapes_met"], fast["met"]) == (2.0, str(unet), 1, False)
    on_gpu = {goal["goal"]: goal for goal in benchmark.judged(rows, torch.device("cuda"), torch.float16)}
    assert on_gpu["time at most 1.5 times SDPA (UNets)"]["met"]
    assert on_gpu["adds at most 0.2 of the joint attention (Flux)"]["worst"] == 0.25
    assert not on_gpu["adds at most 0.2 of the joint attention (Flux)"]["met"]


def test_in_a_joint_attention_the_added_times_are_compared() -> None:
    measured = {
        method.name: benchmark.Measured([time], extra=0, error=1e-7)
        for method, time in ((SDPA, 10.0), (EAGER, 12.0), (SORT, 30.0))
    }
    joint = SHAPES["flux-1024"][0]
    by_name = {row.method: row for row in benchmark.compared(joint, measured, output=1)}
    assert by_name[EAGER.name].faster_than_sort == 10.0 and by_name[EAGER.name].times_sdpa == 1.2
    by_name = {row.method: row for row in benchmark.compared(joint._replace(text=0), measured, output=1)}
    assert by_name[EAGER.name].faster_than_sort == 2.5


def test_wrong_shapes_are_refused_with_a_message() -> None:
    for wrong in ("4096x77", "sdxl", "1x2x0x4x5", "1x2x8x9x5x4", "1x2x8x8x5x9"):
        with pytest.raises(argparse.ArgumentTypeError) as raised:
            benchmark.parse_shapes(wrong)
        assert wrong in str(raised.value) and "sdxl-1024" in str(raised.value)


@pytest.mark.parametrize("wrong", [["--device", "tpu"], ["--device", "meta"], ["--repeats", "0"], ["--threads", "-1"]])
def test_wrong_options_are_refused_with_a_message(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        benchmark.main(wrong)
    assert raised.value.code == 2 and wrong[1] in capsys.readouterr().err
