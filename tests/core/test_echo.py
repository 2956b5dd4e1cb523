# SPDX-License-Identifier: GPL-3.0-or-later
"""gag_core.echo: values as messages and labels repeat them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gag_core.echo import echo, plain

HALF = "\ud83d"


class _Raises:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


class _NoString:
    def __repr__(self) -> str:
        return 5  # type: ignore[return-value]

    __str__ = __repr__


class _Text(str):
    def __str__(self) -> str:
        raise RuntimeError("no str")

    def __len__(self) -> int:
        raise RuntimeError("no len")


class _Long:
    def __repr__(self) -> str:
        return "<b>\n\0" + HALF * 10**5


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


_LOOP: list[Any] = []
_LOOP.append(_LOOP)

VALUES: list[Any] = [
    *(None, True, math.nan, -math.inf, 1e308, 10**400, 10**5000, b"\xff" * 1000, HALF, "a\nb", "x" * 10**6, "\u202e"),
    *(_Raises(), _NoString(), _Text("text"), _Long(), _Raises, [_Raises()] * 50, {1: _Raises(), "1": _Long()}),
    *(_nested(5000), _LOOP, torch.zeros(1000, 1000), torch.nn.Parameter(torch.zeros(2)), torch.nn.Linear(2, 2)),
    *(range(10**9), {"a", 1, None}, ("x" * 1000,) * 100, ValueError(HALF), type("str", (), {})(), object()),
]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 30, 200])
def test_every_value_is_short_and_encodable(limit: int) -> None:
    for value in VALUES:
        for text in (echo(value, limit), plain(value, limit)):
            text.encode("utf-8")
            assert type(text) is str
            assert len(text) <= limit
            assert text.isprintable() or "\u200d" in text


@given(st.text(st.characters(), max_size=300) | st.lists(st.text(st.characters()), max_size=9), st.integers(0, 250))
def test_every_text_is_short_and_encodable(value: Any, limit: int) -> None:
    assert len(echo(value, limit).encode("utf-8").decode("utf-8")) <= limit
    assert len(plain(value, limit).encode("utf-8").decode("utf-8")) <= limit


@pytest.mark.parametrize(
    "value", ["d0,u1", 5, 0.25, None, True, "<img src=x>", "it's", "caf\u00e9 \U0001f642", ["a", 1], {}]
)
def test_short_values_look_as_they_are(value: Any) -> None:
    assert echo(value) == repr(value)
    assert plain(value) == str(value)


def test_the_middle_is_left_out() -> None:
    assert echo("a" * 100 + "z" * 900, 20) == "'" + "a" * 7 + "..." + "z" * 8 + "'"
    assert plain("a" * 100 + "z" * 900, 21) == "a" * 9 + "..." + "z" * 9


def test_half_a_pair_is_escaped() -> None:
    assert echo(HALF) == r"'\ud83d'"
    assert plain(f"red {HALF}\n") == r"red \ud83d\n"


def test_joiners_of_words_and_emoji_stay() -> None:
    assert plain("\u0645\u06cc\u200c\u062e\u0648") == "\u0645\u06cc\u200c\u062e\u0648"


def test_tensors_are_their_shapes() -> None:
    assert echo(torch.zeros(2, 3)) == "<Tensor of shape (2, 3)>"
