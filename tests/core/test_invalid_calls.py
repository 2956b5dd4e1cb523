# SPDX-License-Identifier: GPL-3.0-or-later
"""Invalid calls are refused with the given value and the allowed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from gag_core import GuidanceConfig, combine, entmax, guided_attention, guided_joint_attention, sparse_dense_attention

CONFIG = GuidanceConfig()
TOKENS = 12


def good(**changes: Any) -> dict[str, Any]:
    """Make valid arguments of any attention call, with some replaced."""
    q, k, v = cases.qkv(cases.Shape(2, 3, TOKENS, TOKENS, 8))
    return {"q": q, "k": k, "v": v, "mask": None} | changes


def call_sparse_dense(q: Any, k: Any, v: Any, mask: Any) -> object:
    return sparse_dense_attention(q, k, v, mask=mask)


def call_guided(q: Any, k: Any, v: Any, mask: Any) -> object:
    return guided_attention(q, k, v, CONFIG, mask=mask)


def call_joint(q: Any, k: Any, v: Any, mask: Any) -> object:
    return guided_joint_attention(q, k, v, slice(0, 4), CONFIG, mask=mask)


CALLS = {"sparse_dense": call_sparse_dense, "guided": call_guided, "joint": call_joint}


def zeros(*size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


# By name of the error: wrong arguments, and words that the message must have.
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "q of rank 3": ({"q": zeros(2, TOKENS, 8)}, ["q", "(2, 12, 8)", "head"]),
    "k of rank 5": ({"k": zeros(1, 2, 3, TOKENS, 8)}, ["k", "(1, 2, 3, 12, 8)", "head"]),
    "v of rank 2": ({"v": zeros(TOKENS, 8)}, ["v", "(12, 8)", "head"]),
    "heads of k": ({"k": zeros(2, 4, TOKENS, 8)}, ["k", "(2, 4, 12, 8)", "(2, 3, 12, 8)", "heads"]),
    "heads of v": ({"v": zeros(2, 1, TOKENS, 8)}, ["v", "(2, 1, 12, 8)", "(2, 3, 12, 8)", "heads"]),
    "batch of k and v": (
        {"k": zeros(1, 3, TOKENS, 8), "v": zeros(1, 3, TOKENS, 8)},
        ["(1, 3, 12, 8)", "(2, 3, 12, 8)", "batch"],
    ),
    "head dim of k": ({"k": zeros(2, 3, TOKENS, 16)}, ["k", "(2, 3, 12, 16)", "(2, 3, 12, 8)", "dim"]),
    "tokens of v": ({"v": zeros(2, 3, TOKENS + 1, 8)}, ["v", "(2, 3, 13, 8)", "(2, 3, 12, 8)", "tokens"]),
    "dtype of k": ({"k": zeros(2, 3, TOKENS, 8, dtype=torch.float16)}, ["k", "float16", "float32", "dtype"]),
    "dtype of v": ({"v": zeros(2, 3, TOKENS, 8, dtype=torch.bfloat16)}, ["v", "bfloat16", "float32", "dtype"]),
    "integers": ({"q": zeros(2, 3, TOKENS, 8, dtype=torch.int64)}, ["q", "int64"]),
    "complex numbers": ({"q": zeros(2, 3, TOKENS, 8, dtype=torch.complex64)}, ["q", "complex64"]),
    "device of k": ({"k": zeros(2, 3, TOKENS, 8, device="meta")}, ["k", "meta", "cpu", "device"]),
    "device of v": ({"v": zeros(2, 3, TOKENS, 8, device="meta")}, ["v", "meta", "cpu", "device"]),
    "q is no tensor": ({"q": [[1.0]]}, ["q", "tensor", "list"]),
    "v is None": ({"v": None}, ["v", "tensor", "None"]),
    "mask keys": ({"mask": zeros(TOKENS, TOKENS + 1)}, ["mask", "(12, 13)", "(2, 3, 12, 12)"]),
    "mask queries": ({"mask": zeros(1, 1, 5, TOKENS)}, ["mask", "(1, 1, 5, 12)", "(2, 3, 12, 12)"]),
    "mask heads": ({"mask": zeros(1, 2, 1, TOKENS)}, ["mask", "(1, 2, 1, 12)", "(2, 3, 12, 12)"]),
    "mask batch": ({"mask": zeros(3, 1, 1, TOKENS)}, ["mask", "(3, 1, 1, 12)", "(2, 3, 12, 12)"]),
    "mask without axes": ({"mask": zeros(2, TOKENS)}, ["mask", "(2, 12)", "(2, 3, 12, 12)"]),
    "mask of rank 5": ({"mask": zeros(1, 1, 1, 1, TOKENS)}, ["mask", "(1, 1, 1, 1, 12)", "(2, 3, 12, 12)"]),
    "mask of integers": ({"mask": zeros(TOKENS, TOKENS, dtype=torch.int32)}, ["mask", "int32", "bool"]),
    "mask is no tensor": ({"mask": True}, ["mask", "tensor", "bool"]),
    "mask device": ({"mask": zeros(TOKENS, TOKENS, device="meta")}, ["mask", "meta", "cpu"]),
    "no keys": ({"k": zeros(2, 3, 0, 8), "v": zeros(2, 3, 0, 8)}, ["(2, 3, 0, 8)"]),
}


def assert_refused(call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    message = str(raised.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert "\n" not in message
    # A sentence of gag_core, not a message of torch about some operator inside.
    assert not any(inner in message for inner in ("aten", "expanded size", "mat1", "Sizes of tensors", "The size of"))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrong", WRONG)
def test_attention_calls(wrong: str, call: str) -> None:
    changes, words = WRONG[wrong]
    if wrong == "no keys" and call == "joint":
        words = []  # also q and k of two lengths, which may be what is said
    assert_refused(lambda: CALLS[call](**good(**changes)), words)


@pytest.mark.parametrize("call", CALLS)
def test_the_good_call_is_not_refused(call: str) -> None:
    CALLS[call](**good())
    CALLS[call](**good(mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool)))


@pytest.mark.parametrize("alpha", [0.9, 2.1, float("nan")], ids="alpha={}".format)
def test_alpha_of_sparse_dense_attention(alpha: float) -> None:
    q, k, v = cases.qkv(cases.Shape(1, 1, 2, 3, 4))
    assert_refused(lambda: sparse_dense_attention(q, k, v, alpha=alpha), ["alpha", repr(alpha), "1", "2"])


BASES: dict[str, tuple[Any, list[str]]] = {
    "tokens": (zeros(2, 3, TOKENS + 1, 8), ["base", "(2, 3, 13, 8)", "(2, 3, 12, 8)"]),
    "merged heads": (zeros(2, TOKENS, 24), ["base", "(2, 12, 24)", "(2, 3, 12, 8)"]),
    "broadcast batch": (zeros(1, 3, TOKENS, 8), ["base", "(1, 3, 12, 8)", "(2, 3, 12, 8)"]),
    "dtype": (zeros(2, 3, TOKENS, 8, dtype=torch.float16), ["base", "float16", "float32"]),
    "device": (zeros(2, 3, TOKENS, 8, device="meta"), ["base", "meta", "cpu"]),
    "no tensor": (3.0, ["base", "float"]),
}


@pytest.mark.parametrize("strength", [1.0, 0.0], ids="strength={}".format)
@pytest.mark.parametrize("joint", [False, True], ids=["guided", "joint"])
@pytest.mark.parametrize("wrong", BASES)
def test_base(wrong: str, joint: bool, strength: float) -> None:
    q, k, v = (good()[name] for name in "qkv")
    base, words = BASES[wrong]
    config = GuidanceConfig(strength=strength)
    if joint:
        assert_refused(lambda: guided_joint_attention(q, k, v, slice(0, 4), config, base=base), words)
    else:
        assert_refused(lambda: guided_attention(q, k, v, config, base=base), words)


@pytest.mark.parametrize(
    "text",
    [
        slice(0, 0),
        slice(4, 4),
        slice(5, 4),
        slice(0, TOKENS, 2),
        slice(TOKENS, 0, -1),
        slice(0, TOKENS + 1),
        slice(TOKENS, TOKENS + 5),
        slice(TOKENS, None),
    ],
    ids=str,
)
def test_text_slices(text: slice) -> None:
    q, k, v = (good()[name] for name in "qkv")
    for base in (None, torch.zeros_like(q)):
        assert_refused(
            lambda base=base: guided_joint_attention(q, k, v, text, CONFIG, base=base),  # type: ignore[misc]
            ["text", str(text), str(TOKENS)],
        )


@pytest.mark.parametrize("text", [5, (0, 4), None, "0:4"], ids=repr)
def test_text_that_is_no_slice(text: Any) -> None:
    q, k, v = (good()[name] for name in "qkv")
    assert_refused(lambda: guided_joint_attention(q, k, v, text, CONFIG), ["text", "slice", type(text).__name__])


@pytest.mark.parametrize(
    "text, words",
    [
        ([], ["[]"]),
        ([slice(0, 3), slice(2, 4)], ["overlap", "slice(2, 4, None)"]),
        ([slice(2, 4), slice(0, 2)], ["order"]),
        ([slice(0, 2), slice(3, 3)], ["non-empty", "slice(3, 3, None)"]),
        ([slice(0, 2), slice(3, TOKENS + 1)], [str(TOKENS)]),
        ([slice(0, 2), 4], ["list"]),
        ((slice(0, 2), None), ["tuple"]),
    ],
    ids=str,
)
def test_several_text_slices(text: Any, words: list[str]) -> None:
    q, k, v = (good()[name] for name in "qkv")
    for queries in (q, q[:, :, :2]):
        assert_refused(
            lambda queries=queries: guided_joint_attention(queries, k, v, text, CONFIG),  # type: ignore[misc]
            ["text", *words],
        )


def test_joint_attention_needs_no_more_queries_than_keys() -> None:
    q, k, v = cases.qkv(cases.Shape(1, 2, 12, 9, 8))
    assert_refused(lambda: guided_joint_attention(q, k, v, slice(0, 4), CONFIG), ["12 queries", "9 keys"])


@pytest.mark.parametrize("config", [None, {"alpha": 1.5}, 1.5], ids=repr)
def test_config(config: Any) -> None:
    q, k, v = (good()[name] for name in "qkv")
    type_name = type(config).__name__
    assert_refused(lambda: guided_attention(q, k, v, config), ["GuidanceConfig", type_name])
    assert_refused(lambda: guided_joint_attention(q, k, v, slice(0, 4), config), ["GuidanceConfig", type_name])
    assert_refused(lambda: combine(q, q, config), ["GuidanceConfig", type_name])


@pytest.mark.parametrize(
    "sparse, dense, words",
    [
        (zeros(2, 3, 8), zeros(2, 3, 8), ["(2, 3, 8)", "head"]),
        (zeros(2, 3, 5, 8), zeros(2, 3, 6, 8), ["(2, 3, 5, 8)", "(2, 3, 6, 8)"]),
        (zeros(2, 3, 5, 8), zeros(1, 3, 5, 8), ["(2, 3, 5, 8)", "(1, 3, 5, 8)"]),
        (zeros(1, 1, 1, 1), zeros(1, 1, 1, 1, dtype=torch.float16), ["float32", "float16"]),
        (zeros(1, 1, 1, 1), zeros(1, 1, 1, 1, device="meta"), ["cpu", "meta"]),
        (zeros(1, 1, 1, 1, dtype=torch.int64), zeros(1, 1, 1, 1, dtype=torch.int64), ["sparse", "int64"]),
        (zeros(1, 1, 1, 1), None, ["dense", "None"]),
    ],
    ids=["rank", "tokens", "batch", "dtype", "device", "integers", "no tensor"],
)
def test_combine(sparse: Any, dense: Any, words: list[str]) -> None:
    assert_refused(lambda: combine(sparse, dense, CONFIG), words)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5"], ids=repr)
@pytest.mark.parametrize("call", ["sparse_dense", "guided", "joint"])
def test_scale(call: str, scale: Any) -> None:
    """Otherwise such a scale would give NaN everywhere, or a message about an operator."""
    q, k, v = (good()[name] for name in "qkv")
    calls: dict[str, Callable[[], object]] = {
        "sparse_dense": lambda: sparse_dense_attention(q, k, v, scale=scale),
        "guided": lambda: guided_attention(q, k, v, CONFIG, scale=scale),
        "joint": lambda: guided_joint_attention(q, k, v, slice(0, 4), CONFIG, scale=scale),
    }
    assert_refused(calls[call], ["scale", repr(scale)])


class _Raises:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


HOSTILE: list[Any] = ["\ud83d", "x" * 10**6, 10**5000, _Raises(), [[_Raises()]], b"\xff", {}, float("nan"), 1j]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_values_are_repeated_short_and_encodable(value: Any) -> None:
    q, k, v = (good()[name] for name in "qkv")
    calls: list[Callable[[], object]] = [
        lambda: sparse_dense_attention(q, k, v, alpha=value),
        lambda: sparse_dense_attention(q, k, v, scale=value),
        lambda: guided_attention(q, k, v, value),
        lambda: guided_attention(q, k, v, CONFIG, base=value),
        lambda: guided_attention(q, k, v, CONFIG, mask=value),
        lambda: guided_joint_attention(q, k, v, value, CONFIG),
        lambda: guided_joint_attention(q, k, v, slice(0, value), CONFIG),
        lambda: combine(value, q, CONFIG),
        lambda: entmax(value),
        lambda: entmax(q, alpha=value),
        lambda: entmax(q, dim=value),
        *(lambda field=field: GuidanceConfig(**{field.name: value}) for field in dataclasses.fields(GuidanceConfig)),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as raised:
            call()
        message = str(raised.value)
        assert len(message.encode("utf-8")) < 600
        assert "\n" not in message
