# SPDX-License-Identifier: GPL-3.0-or-later
"""The path of one guided call through the files of gag_core: short, and without going back and forth."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

import cases
import gag_core
from cases import MASKS, Shape
from gag_core import GuidanceConfig, guided_attention, guided_joint_attention

CORE = Path(gag_core.__file__).parent
CROSS = ["attention", "eager", "numerics", "eager", "numerics", "entmax", "geometry", "numerics"]
# The joint attention itself comes first, then the guidance of its image queries.
JOINT = ["attention", "eager", *CROSS]
# Rule "uniform" is plain attention to other values: of entmax.py it asks for the mode of differentiation alone, and of
# geometry.py for the text mass.
UNIFORM = {"attention", "eager", "uniform", "numerics", "entmax"}


def path_of(call: Callable[[], object]) -> list[str]:
    """Return the files of gag_core whose functions are called, in order, each stretch of calls in one file once."""
    files: list[str] = []

    def record(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(CORE):
            files.append(path.relative_to(CORE).with_suffix("").as_posix())

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [file for file, _ in itertools.groupby(files)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [1.5, 1.3], ids="alpha={}".format)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
def test_guided_attention(with_base: bool, masked: bool, alpha: float, dtype: torch.dtype) -> None:
    shape = Shape(2, 3, 14, 77, 16)
    q, k, v = cases.qkv(shape, dtype=dtype)
    base = torch.zeros_like(q) if with_base else None
    mask = MASKS["bool-per-key"](shape) if masked else None
    config = GuidanceConfig(alpha=alpha, orthogonal_scale=0.5)
    assert path_of(lambda: guided_attention(q, k, v, config, base=base, mask=mask)) == CROSS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guided_joint_attention(dtype: torch.dtype) -> None:
    q, k, v = cases.qkv(Shape(1, 2, 40, 40, 16), dtype=dtype)
    config = GuidanceConfig()
    path = path_of(lambda: guided_joint_attention(q, k, v, slice(0, 13), config))
    assert path == JOINT
    assert max(Counter(path).values()) <= 3


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("with_base", [False, True], ids=["own-dense", "base"])
def test_rule_uniform(with_base: bool, masked: bool) -> None:
    shape = Shape(2, 3, 14, 77, 16)
    q, k, v = cases.qkv(shape)
    base = torch.zeros_like(q) if with_base else None
    mask = MASKS["bool-per-key"](shape) if masked else None
    config = GuidanceConfig(rule="uniform", guidance_scale=0.5)
    path = path_of(lambda: guided_attention(q, k, v, config, base=base, mask=mask))
    assert path[:3] == ["attention", "eager", "uniform"]
    assert set(path) == UNIFORM


def test_rule_uniform_in_a_joint_attention() -> None:
    q, k, v = cases.qkv(Shape(1, 2, 40, 40, 16))
    config = GuidanceConfig(rule="uniform", guidance_scale=0.5)
    path = path_of(lambda: guided_joint_attention(q, k, v, slice(0, 13), config))
    assert set(path) == {*UNIFORM, "geometry"}
    assert path.count("geometry") == 1
