# SPDX-License-Identifier: GPL-3.0-or-later
"""GuidanceConfig: defaults, validation with clear messages, immutability."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from gag_core import GuidanceConfig

DEFAULTS: dict[str, object] = {
    "rule": "gag",
    "guidance_scale": 10.0,
    "norm_threshold": 15.0,
    "norm_mode": "absolute",
    "orthogonal_scale": 0.0,
    "alpha": 1.5,
    "strength": 1.0,
    "merge_heads": False,
    "anderson_depth": 1,
    "anderson_regularization": 0.01,
}


def test_fields_and_defaults() -> None:
    assert dataclasses.asdict(GuidanceConfig()) == DEFAULTS


@pytest.mark.parametrize("field", DEFAULTS)
def test_is_frozen(field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(GuidanceConfig(), field, DEFAULTS[field])


def test_is_a_value() -> None:
    assert GuidanceConfig(alpha=1.25) == GuidanceConfig(alpha=1.25) != GuidanceConfig()
    assert len({GuidanceConfig(), GuidanceConfig(), GuidanceConfig(strength=0.5)}) == 2


def test_replace_keeps_the_rest_and_validates() -> None:
    config = GuidanceConfig(guidance_scale=2.0, norm_mode="relative", norm_threshold=0.1)
    changed = dataclasses.replace(config, alpha=2.0)
    assert dataclasses.asdict(changed) == {**dataclasses.asdict(config), "alpha": 2.0}
    with pytest.raises(ValueError, match="alpha"):
        dataclasses.replace(config, alpha=2.5)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rule", "uniform"),
        ("rule", "pladis"),
        ("rule", "anderson"),
        ("anderson_depth", 5),
        ("anderson_regularization", 0.0),
        ("norm_mode", "relative"),
        ("norm_threshold", math.inf),
        ("norm_threshold", 0.0),
        ("orthogonal_scale", 1.0),
        ("guidance_scale", 0.0),
        ("strength", 0.0),
        ("alpha", 1.0),
        ("alpha", 1),
        ("alpha", 2.0),
        ("merge_heads", True),
    ],
)
def test_accepts_allowed_values(field: str, value: Any) -> None:
    assert getattr(GuidanceConfig(**{field: value}), field) == value


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("rule", "nag", ["gag", "pladis"]),
        ("rule", "", ["gag", "pladis"]),
        ("rule", None, ["gag", "pladis"]),
        ("norm_mode", "Relative", ["absolute", "relative"]),
        ("norm_mode", None, ["absolute", "relative"]),
        ("alpha", 0.999, ["1", "2"]),
        ("alpha", 2.001, ["1", "2"]),
        ("alpha", math.nan, ["1", "2"]),
        ("alpha", math.inf, ["1", "2"]),
        ("norm_threshold", -0.1, ["0"]),
        ("norm_threshold", math.nan, ["0"]),
        ("norm_threshold", -math.inf, ["0"]),
        ("guidance_scale", math.nan, ["finite"]),
        ("guidance_scale", math.inf, ["finite"]),
        ("orthogonal_scale", math.nan, ["finite"]),
        ("orthogonal_scale", -math.inf, ["finite"]),
        ("strength", math.nan, ["finite"]),
        ("strength", math.inf, ["finite"]),
    ],
)
def test_refuses_other_values_in_one_sentence(field: str, value: Any, allowed: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        GuidanceConfig(**{field: value})
    message = str(raised.value)
    assert field in message and repr(value) in message, message
    assert all(word in message for word in allowed), message
    assert "\n" not in message


@pytest.mark.parametrize("field", ["guidance_scale", "norm_threshold", "orthogonal_scale", "alpha", "strength"])
@pytest.mark.parametrize("value", ["1.5", None, [1.5], 1.5 + 0j, True], ids=repr)
def test_refuses_values_that_are_no_numbers(field: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        GuidanceConfig(**{field: value})
    assert field in str(raised.value) and repr(value) in str(raised.value)


@pytest.mark.parametrize("value", ["yes", None, 1], ids=repr)
def test_refuses_a_merge_heads_that_is_no_bool(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="merge_heads"):
        GuidanceConfig(merge_heads=value)
