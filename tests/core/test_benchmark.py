# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark command runs, and what it compares with is right."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

import attention as benchmark
import cases
import reference
from gag_core import GuidanceConfig
from tolerances import assert_close

ROOT = Path(__file__).resolve().parents[2]


def test_the_sort_based_way_computes_the_same() -> None:
    """A baseline that computes something else, or less, would be no baseline."""
    q, k, v = cases.qkv(cases.Shape(2, 3, 20, 77, 16))
    expected = reference.guided_attention(q, k, v, GuidanceConfig())
    assert_close(benchmark.sort_based_guided_attention(q, k, v), expected, error=1e-3)
    assert_close(benchmark.exact(q, k, v), expected, error=1e-9)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/attention.py", "--shapes", "1x2x300x77x16", "--repeats", "1", "--json", file]
    run = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "| 1x2x300x77x16, B1 H2 d16 |" in run.stdout
    (result,) = json.loads(file.read_text())["results"]
    assert result["gag"]["error"] < 1e-3 and result["sort"]["error"] < 1e-3
    assert 0 < result["gag"]["mebibytes"] < result["sort"]["mebibytes"]
    assert result["memory_ratio"] == result["gag"]["mebibytes"] / result["sort"]["mebibytes"]


def test_shapes_are_refused_in_words() -> None:
    for wrong in ("4096x77", "sdxl", "1x2x0x4x5"):
        with pytest.raises(argparse.ArgumentTypeError) as raised:
            benchmark.parse_shape(wrong)
        assert wrong in str(raised.value) and "sdxl-4096x77" in str(raised.value)
