# SPDX-License-Identifier: GPL-3.0-or-later
"""Thousands of random calls: finite stays finite, rows do not mix, every error is a clear sentence."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

import cases
import reference
from gag_core import (
    GuidanceConfig,
    combine,
    entmax,
    guided_attention,
    guided_joint_attention,
    sparse_dense_attention,
)
from properties import ANY_CONFIGS as CONFIGS
from properties import FLOATS, FUZZ_LAYOUTS, SEEDS, TAME, TAME_MASKS, VALUES, Call, calls, end_of, examples
from tolerances import assert_close

TAME_CONFIGS = st.builds(
    GuidanceConfig,
    rule=st.sampled_from(["gag", "uniform", "pladis"]),
    guidance_scale=st.floats(-3, 12),
    norm_threshold=st.sampled_from([0.1, 2.0, 15.0, math.inf]),
    norm_mode=st.sampled_from(["absolute", "relative"]),
    orthogonal_scale=st.sampled_from([0.0, 0.5, 1.0]),
    alpha=st.sampled_from([1.0, 1.1, 1.5, 1.75, 2.0]),
    strength=st.floats(-1, 2),
    merge_heads=st.booleans(),
)
# Rule "uniform" has no sparse read-out, so the tests of combine and of kernels leave it out.
WITH_UNIFORM = CONFIGS | CONFIGS.map(lambda config: dataclasses.replace(config, rule="uniform"))
WIDE = st.sampled_from([torch.float32, torch.float64])


@st.composite
def text_slices(draw: st.DrawFn, tokens: int) -> reference.Text:
    """Draw the text tokens of a sequence, in one of the ways to write a slice, or several slices."""
    if draw(st.booleans()):
        edges = sorted(draw(st.sets(st.integers(0, tokens), min_size=2, max_size=6)))
        return [slice(*ends) for ends in zip(edges[::2], edges[1::2], strict=False)]
    start = draw(st.integers(0, tokens - 1))
    stop = draw(st.integers(start + 1, tokens))
    ends = (None if start == 0 and draw(st.booleans()) else start), (None if stop == tokens else stop)
    return slice(*ends, draw(st.sampled_from([None, 1])))


def guided(call: Call, config: GuidanceConfig) -> Tensor:
    return guided_attention(call.q, call.k, call.v, config, base=call.base, mask=call.mask, scale=call.scale)


def guided_joint(call: Call, text: reference.Text, config: GuidanceConfig) -> Tensor:
    return guided_joint_attention(
        call.q, call.k, call.v, text, config, base=call.base, mask=call.mask, scale=call.scale
    )


def check_output(out: Tensor, call: Call, *, merged_for_free: bool = True) -> None:
    """Check the properties of an output that hold for all numbers."""
    assert out.shape == (*call.q.shape[:3], call.v.shape[3])
    assert out.dtype == call.q.dtype
    assert torch.isfinite(out).all()
    if merged_for_free:
        assert out.transpose(1, 2).is_contiguous()


# --- finite numbers -----------------------------------------------------------------------------------------------


@examples(1200)
@hypothesis.given(call=calls(), config=WITH_UNIFORM)
def test_guided_attention_of_finite_numbers_is_finite(call: Call, config: GuidanceConfig) -> None:
    before = [tensor.clone() for tensor in call.tensors]
    out = guided(call, config)
    check_output(out, call)
    if config.strength == 0.0 and call.base is not None:
        assert torch.equal(out, call.base)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(call.tensors, before, strict=True))


@examples(800)
@hypothesis.given(call=calls(joint=True), config=WITH_UNIFORM, data=st.data())
def test_guided_joint_attention_of_finite_numbers_is_finite(
    call: Call, config: GuidanceConfig, data: st.DataObject
) -> None:
    text = data.draw(text_slices(call.shape.keys))
    before = [tensor.clone() for tensor in call.tensors]
    out = guided_joint(call, text, config)
    check_output(out, call)
    if call.base is not None:
        # Text tokens keep the host's output, and with strength 0 all tokens do.
        changed = torch.zeros(call.shape.queries, dtype=torch.bool)
        if config.strength != 0.0:
            changed[reference.image_queries(text, call.shape.queries, call.shape.keys)] = True
        assert torch.equal(out[:, :, ~changed], call.base[:, :, ~changed])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(call.tensors, before, strict=True))


@examples(300)
@hypothesis.given(call=calls(), alpha=st.sampled_from([1.0, 1.001, 1.5, 2.0]))
def test_both_read_outs_of_finite_numbers_are_averages_of_the_values(call: Call, alpha: float) -> None:
    sparse, dense = sparse_dense_attention(call.q, call.k, call.v, alpha=alpha, mask=call.mask, scale=call.scale)
    largest = call.v.double().abs().amax()
    for out in (sparse, dense):
        check_output(out, call)
        assert (out.double().abs() <= largest * (1 + 2e-5) + 1e-30).all()


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    dtype = draw(FLOATS)
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    made = VALUES[draw(st.sampled_from(list(VALUES)))](
        cases.random(*shape, seed=draw(SEEDS), std=draw(st.sampled_from([0.1, 1.0, 30.0])), dtype=dtype), end_of(dtype)
    )
    if draw(st.booleans()):
        made = made.masked_fill(cases.random(*shape, seed=draw(SEEDS)) > 0.3, -math.inf)
    return made.transpose(0, -1) if draw(st.booleans()) else made


@examples(600)
@hypothesis.given(z=logits(), alpha=st.sampled_from([1.0, 1.0 + 1e-12, 1.001, 1.3, 1.5, 2.0, 1, 2]), data=st.data())
def test_entmax_of_any_logits_is_a_distribution(z: Tensor, alpha: float, data: st.DataObject) -> None:
    dim = data.draw(st.integers(-z.ndim, z.ndim - 1))
    before = z.clone()
    weights = entmax(z, alpha, dim)
    assert torch.equal(z, before)
    assert weights.shape == z.shape and weights.dtype == z.dtype
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    assert (weights[z == -math.inf] == 0).all()
    total = weights.double().sum(dim)
    nothing_allowed = (z == -math.inf).all(dim)
    rounding = torch.finfo(z.dtype).eps * z.shape[dim] + 1e-5
    assert (total[nothing_allowed] == 0).all()
    assert ((total[~nothing_allowed] - 1).abs() <= rounding).all()
    # A larger logit never gets a smaller weight.
    ordered = weights.gather(dim, z.argsort(dim=dim))
    assert (ordered.double().diff(dim=dim) >= -1e-6).all()


@examples(400)
@hypothesis.given(call=calls(), config=CONFIGS, second=st.sampled_from(list(VALUES)))
def test_combining_any_two_read_outs_is_finite(call: Call, config: GuidanceConfig, second: str) -> None:
    sparse = call.q
    other = VALUES[second](cases.random(*sparse.shape, seed=7, dtype=sparse.dtype), end_of(sparse.dtype))
    before = [sparse.clone(), other.clone()]
    out = combine(sparse, other, config)
    assert out.shape == sparse.shape and out.dtype == sparse.dtype
    assert torch.isfinite(out).all()
    assert torch.equal(sparse, before[0]) and torch.equal(other, before[1])


# --- the reference ------------------------------------------------------------------------------------------------


def error_of(call: Call, text: reference.Text, config: GuidanceConfig) -> Tensor:
    """Compute the fp32 error that a guided row may have, ``[B, H, N, 1]``; unbounded where S cancels to 0.

    Errors of the read-outs are relative to the values, grow with the logits, and are multiplied by the extrapolation.
    """
    mask, words = call.mask, reference.text_indices(text, call.k.shape[2])
    if mask is not None:
        mask = mask.expand(*call.q.shape[:3], call.k.shape[2])[..., words]
    sparse, dense = reference.sparse_dense_attention(
        call.q, call.k[:, :, words], call.v[:, :, words], alpha=config.alpha, mask=mask, scale=call.scale
    )
    axes = (1, 3) if config.merge_heads else (3,)
    ratio = dense.norm(dim=axes, keepdim=True) / sparse.norm(dim=axes, keepdim=True).clamp_min(1e-30)
    size = max(float(tensor.double().abs().amax()) for tensor in (call.v, call.base) if tensor is not None)
    logits = float(reference.attention_logits(call.q, call.k, scale=call.scale).abs().amax())
    gain = (1 + abs(config.strength)) * (1 + abs(config.guidance_scale))
    error = 1e-5 * size * gain * (1 + 0.02 * logits) * (1 + ratio)
    if config.rule == "uniform" and call.q.dtype.itemsize < 4:
        # torch's own attention gives the read-outs. In half precision it rounds values and weights to the dtype.
        error = error + 4 * torch.finfo(call.q.dtype).eps * size * gain
    return error


@examples(500)
@hypothesis.given(call=calls(values=TAME, queries=1, masks=TAME_MASKS), config=TAME_CONFIGS)
def test_guided_attention_is_near_the_reference(call: Call, config: GuidanceConfig) -> None:
    expected = reference.guided_attention(
        call.q, call.k, call.v, config, base=call.base, mask=call.mask, scale=call.scale
    )
    assert_close(guided(call, config), expected, error=error_of(call, slice(None), config))


@examples(500)
@hypothesis.given(call=calls(values=TAME, joint=True, masks=TAME_MASKS), config=TAME_CONFIGS, data=st.data())
def test_guided_joint_attention_is_near_the_reference(call: Call, config: GuidanceConfig, data: st.DataObject) -> None:
    text = data.draw(text_slices(call.shape.keys))
    expected = reference.guided_joint_attention(
        call.q, call.k, call.v, text, config, base=call.base, mask=call.mask, scale=call.scale
    )
    error = error_of(call, text, config)
    if call.base is None:
        # torch's own attention gives the joint output. It rounds to the dtype, in half precision also on the way.
        error += 2 * torch.finfo(call.q.dtype).eps * float(call.v.double().abs().amax())
    assert_close(guided_joint(call, text, config), expected, error=error)


# --- who sees whom ------------------------------------------------------------------------------------------------


@examples(300)
@hypothesis.given(call=calls(dtypes=WIDE, values=TAME, queries=1), config=TAME_CONFIGS, seed=SEEDS)
def test_the_order_of_the_keys_does_not_matter(call: Call, config: GuidanceConfig, seed: int) -> None:
    order = torch.randperm(call.shape.keys, generator=torch.Generator().manual_seed(seed))
    mask = call.mask if call.mask is None or call.mask.ndim == 0 or call.mask.shape[-1] == 1 else call.mask[..., order]
    moved = dataclasses.replace(call, k=call.k[:, :, order], v=call.v[:, :, order], mask=mask)
    assert_close(guided(moved, config), guided(call, config).double(), error=2 * error_of(call, slice(None), config))


@examples(300)
@hypothesis.given(call=calls(dtypes=WIDE, values=TAME, queries=1), config=TAME_CONFIGS, data=st.data())
def test_a_query_alone_gives_its_row(call: Call, config: GuidanceConfig, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, call.shape.queries - 1))
    rows = slice(row, row + 1)
    mask = call.mask
    if mask is not None and mask.ndim >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    alone = dataclasses.replace(
        call, q=call.q[:, :, rows], base=None if call.base is None else call.base[:, :, rows], mask=mask
    )
    error = 2 * error_of(call, slice(None), config)[:, :, rows]
    assert_close(guided(alone, config), guided(call, config)[:, :, rows].double(), error=error)


POISONS = st.sampled_from([math.nan, math.inf, -math.inf])


@st.composite
def poisoned(draw: st.DrawFn, call: Call) -> tuple[Call, Call, str, tuple[int, int, int]]:
    """Draw the call without and with one NaN or infinity in q, k, v or base, the tensor's name, and the position."""
    name = draw(st.sampled_from(["q", "k", "v", *([] if call.base is None else ["base"])]))
    # Both have the same layout, so that the same kernels run and all other bits can be compared.
    clean: Tensor = getattr(call, name).contiguous().clone()
    bad = clean.clone()
    batch, head, token, channel = (draw(st.integers(0, size - 1)) for size in bad.shape)
    bad[batch, head, token, channel] = draw(POISONS)

    def with_tensor(tensor: Tensor) -> Call:
        changes: dict[str, Any] = {name: tensor}
        return dataclasses.replace(call, **changes)

    return with_tensor(clean), with_tensor(bad), name, (batch, head, token)


def untouched(shape: torch.Size, name: str, position: tuple[int, int, int], merge_heads: bool) -> Tensor:
    """Return True for each row ``[B, H, N]`` of the output that does not depend on the poisoned position."""
    batch, head, token = position
    affected = torch.zeros(shape[:3], dtype=torch.bool)
    # Merged heads take norms over all heads of a token. To the base the guidance is only added.
    heads = slice(None) if merge_heads and name != "base" else head
    tokens = token if name in ("q", "base") else slice(None)
    affected[batch, heads, tokens] = True
    return ~affected


@examples(500)
@hypothesis.given(call=calls(values=("normal", "large", "ties"), queries=1), config=CONFIGS, data=st.data())
def test_nan_and_infinity_stay_in_their_row_and_head(call: Call, config: GuidanceConfig, data: st.DataObject) -> None:
    clean, bad, name, position = data.draw(poisoned(call))
    rows = untouched(call.q.shape, name, position, config.merge_heads)
    assert torch.equal(guided(bad, config)[rows], guided(clean, config)[rows])


@examples(400)
@hypothesis.given(call=calls(values=("normal", "large", "ties"), joint=True), config=CONFIGS, data=st.data())
def test_nan_and_infinity_stay_in_their_row_and_head_of_a_joint_sequence(
    call: Call, config: GuidanceConfig, data: st.DataObject
) -> None:
    text = data.draw(text_slices(call.shape.keys))
    clean, bad, name, position = data.draw(poisoned(call))
    rows = untouched(call.q.shape, name, position, config.merge_heads)
    assert torch.equal(guided_joint(bad, text, config)[rows], guided_joint(clean, text, config)[rows])


# --- calls that cannot be right -------------------------------------------------------------------------------------

_SIZES = st.just([2, 2, 4, 3]) | st.lists(st.integers(0, 4), max_size=5)
_DTYPES = st.sampled_from(
    [torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8]
)
_LAYOUTS: list[Callable[[Tensor], Any]] = [
    lambda x: x,
    lambda x: x,
    lambda x: x.to("meta"),
    lambda x: x.to_sparse(),
    lambda x: x.numpy(),
    lambda x: x.flatten().tolist(),
    lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
]
TENSORS = st.builds(
    lambda size, dtype, layout: layout(torch.ones(size, dtype=dtype)), _SIZES, _DTYPES, st.sampled_from(_LAYOUTS)
)
NUMBERS = st.floats() | st.integers(-3, 3) | st.sampled_from([10**400, True])
JUNK = st.none() | NUMBERS | st.text(max_size=3) | st.sampled_from([[], (), {}, object(), torch.float32, slice(0, 2)])
ENDS = st.none() | st.integers(-5, 7) | st.sampled_from(["a", 1.0, True, math.nan])
ANYTHING = JUNK | TENSORS
SLICES = st.builds(slice, ENDS, ENDS, ENDS)
# Arguments that are nearly valid.
OWN: dict[str, st.SearchStrategy[Any]] = {
    "text": SLICES | st.lists(SLICES | ANYTHING, max_size=3) | ANYTHING,
    "scale": NUMBERS | ANYTHING,
    "alpha": NUMBERS | ANYTHING,
}
FIELDS = [field.name for field in dataclasses.fields(GuidanceConfig)]
# Every message starts with the name of the wrong argument and ends with the given value.
SENTENCE = re.compile(
    r"(q|k|v|q, k and v|q and k|k and v|mask|base|config|text|scale|alpha|sparse|dense|sparse and dense|attention|"
    r"joint attention|dim|entmax|" + "|".join(FIELDS) + r") (must|needs)\b.* got .+\.",
    # The given value may be a string that contains line ends.
    re.DOTALL,
)


def refused_in_a_sentence(call: Callable[[], object]) -> bool:
    """Return True if a call was refused with one of the sentences of gag_core; any other error fails the test."""
    try:
        call()
    except (ValueError, TypeError) as error:
        assert type(error) in (ValueError, TypeError)
        assert SENTENCE.fullmatch(str(error)), str(error)
        assert len(str(error)) < 500
        return True
    return False


GOOD: dict[str, Any] = {
    **{name: torch.ones(2, 2, 4, 3) for name in ("q", "k", "v")},
    "text": slice(0, 2),
    "config": GuidanceConfig(),
    "base": None,
    "mask": None,
    "scale": None,
    "alpha": 1.5,
}
ARGUMENTS = {
    guided_attention: ("q", "k", "v", "config", "base", "mask", "scale"),
    guided_joint_attention: ("q", "k", "v", "text", "config", "base", "mask", "scale"),
    sparse_dense_attention: ("q", "k", "v", "alpha", "mask", "scale"),
}


@examples(1500)
@hypothesis.given(function=st.sampled_from(list(ARGUMENTS)), data=st.data())
def test_a_wrong_attention_call_is_refused_in_a_sentence(function: Callable[..., Any], data: st.DataObject) -> None:
    names = ARGUMENTS[function]
    wrong = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    changes = {name: data.draw(OWN.get(name, ANYTHING), label=name) for name in wrong}
    refused_in_a_sentence(lambda: function(**{name: GOOD[name] for name in names} | changes))


@examples(300)
@hypothesis.given(function=st.sampled_from(list(ARGUMENTS)), data=st.data())
def test_arguments_that_are_no_tensors_are_refused(function: Callable[..., Any], data: st.DataObject) -> None:
    names = ARGUMENTS[function]
    name = data.draw(st.sampled_from(["q", "k", "v", "config"])) if "config" in names else "q"
    junk = data.draw(JUNK)
    assert refused_in_a_sentence(lambda: function(**{n: GOOD[n] for n in names} | {name: junk}))


@examples(400)
@hypothesis.given(logits=ANYTHING, alpha=NUMBERS | ANYTHING, dim=st.integers(-6, 6) | ANYTHING)
def test_a_wrong_entmax_call_is_refused_in_a_sentence(logits: Any, alpha: Any, dim: Any) -> None:
    refused_in_a_sentence(lambda: entmax(logits, alpha, dim))
    refused_in_a_sentence(lambda: entmax(torch.ones(2, 3), alpha, dim))
    refused_in_a_sentence(lambda: entmax(torch.ones(2, 3), 1.5, dim))


@examples(300)
@hypothesis.given(sparse=ANYTHING, dense=ANYTHING, config=st.just(GuidanceConfig()) | ANYTHING)
def test_a_wrong_combination_is_refused_in_a_sentence(sparse: Any, dense: Any, config: Any) -> None:
    refused_in_a_sentence(lambda: combine(sparse, dense, config))
    refused_in_a_sentence(lambda: combine(torch.ones(1, 1, 2, 3), dense, config))


@examples(600)
@hypothesis.given(changes=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3))
def test_a_wrong_config_is_refused_in_a_sentence(changes: dict[str, Any]) -> None:
    refused_in_a_sentence(lambda: GuidanceConfig(**changes))


@examples(100)
@hypothesis.given(layouts=st.lists(st.sampled_from(list(FUZZ_LAYOUTS)), min_size=3, max_size=3), seed=SEEDS)
def test_strides_change_nothing(layouts: list[str], seed: int) -> None:
    """Memory layouts do not change the result; broadcast tensors are compared with copies."""
    config = GuidanceConfig(guidance_scale=2.0)
    tensors = cases.qkv(cases.Shape(2, 3, 5, 7, 8), seed=seed)
    arranged = [FUZZ_LAYOUTS[layout](x) for layout, x in zip(layouts, tensors, strict=True)]
    copies = [x.contiguous() for x in arranged]
    torch.testing.assert_close(
        guided_attention(arranged[0], arranged[1], arranged[2], config),
        guided_attention(copies[0], copies[1], copies[2], config),
        atol=1e-4,
        rtol=1e-4,
    )
