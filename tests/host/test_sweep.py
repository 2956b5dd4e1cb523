# SPDX-License-Identifier: GPL-3.0-or-later
"""A sweep's models equal those that the GAG nodes make by hand, bit for bit; wrong values are refused in a sentence."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import host_process as host
from properties import examples

sweep = host.pack_module("nodes.sweep")
FIELDS, MOST, parse_values = sweep.FIELDS, sweep.MAX_PICTURES, sweep.parse_values
GuidanceConfig = host.pack_module("gag_core").GuidanceConfig
PRESETS = host.pack_module("nodes.presets").PRESETS
Curve = host.pack_module("nodes.patching.strength_curve").Curve
guided_model = host.pack_module("nodes.patching.guided_model")
# Settings by hand that the sweeps below start from. None is its default.
BY_HAND: dict[str, Any] = {
    **host.preset_inputs("beside CFG"),
    "guidance_scale": 4.0,
    "norm_threshold": 0.05,
    "orthogonal_scale": 0.3,
    "strength": 0.9,
    "apply_to": "positive",
    "blocks": "d,m",
    "start_percent": 0.1,
    "end_percent": 0.9,
}
# Two values of each setting, as text and as values.
TRIED: dict[str, tuple[str, list[Any]]] = {
    "preset": ("paper, auto", ["paper", "auto"]),
    "rule": ("pladis, gag", ["pladis", "gag"]),
    "guidance_scale": ("0..10 in 2", [0.0, 10.0]),
    "norm_threshold": ("0.5, inf", [0.5, math.inf]),
    "norm_mode": ("relative,absolute", ["relative", "absolute"]),
    "orthogonal_scale": ("-1, .5", [-1.0, 0.5]),
    "alpha": ("1.2..1.8 in 2", [1.2, 1.8]),
    "strength": ("0, 1", [0.0, 1.0]),
    "merge_heads": ("on, off", [True, False]),
    "apply_to": ("both, positive", ["both", "positive"]),
    "blocks": ("u; d0, m", ["u", "d0, m"]),
    "start_percent": ("0, 0.5", [0.0, 0.5]),
    "end_percent": ("0.5, 1", [0.5, 1.0]),
    "adapt_to_cfg": ("off, on", [False, True]),
}


def advanced(model: Any, **settings: Any) -> Any:
    return host.run_node("GAGuidanceAdvanced", model=model, **{**BY_HAND, **settings})[0]


def swept(model: Any, field: str, values: str, **inputs: Any) -> tuple[list[Any], list[str], int]:
    models, labels, columns = host.run_node("GAGSweep", model=model, field=field, values=values, **inputs)
    assert len(models) == len(labels)
    return models, labels, columns


def picture(model: Any) -> Tensor:
    return host.sample(model, "sd15", steps=4)


def guidances(model: Any) -> tuple[Any, ...]:
    found: tuple[Any, ...] = guided_model.guidances_of(model)
    return found


# --- the models ---------------------------------------------------------------------------------------------------


def test_every_setting_can_be_varied() -> None:
    """A setting is a field of the config, or an input of GAG (advanced) that acts on the picture."""
    inputs = {item.id for item in host.NODES["GAGuidanceAdvanced"].GET_SCHEMA().inputs}
    config = {field.name for field in dataclasses.fields(GuidanceConfig)}
    assert set(FIELDS) == (inputs | config | {"preset"}) - {"model", "verbose", "schedule"}
    assert set(TRIED) == {name for name in FIELDS if not name.startswith("anderson_")}


@pytest.mark.parametrize("field", TRIED)
def test_each_model_is_the_one_set_by_hand(field: str) -> None:
    text, values = TRIED[field]
    plain = host.build_model("sd15")
    models, labels, columns = swept(advanced(plain), field, text)
    assert len(models) == 3 and columns == 3
    assert labels[0] == "without GAG"
    assert torch.equal(picture(models[0]), picture(plain))
    pictures = []
    for model, label, value in zip(models[1:], labels[1:], values, strict=True):
        shown = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        assert label == f"{field} {shown:g}" if isinstance(value, float) else label == f"{field} {shown}"
        if field == "preset":
            by_hand = advanced(plain, **host.preset_inputs(value))
        else:
            by_hand = advanced(plain, **{field: value})
        pictures.append(picture(model))
        assert torch.equal(pictures[-1], picture(by_hand))
    assert not torch.equal(*pictures), "a setting that changes nothing was tried"


def test_two_settings_make_every_pair_row_by_row() -> None:
    plain = host.build_model("sd15")
    models, labels, columns = swept(
        advanced(plain), "guidance_scale", "1, 3", field_2="alpha", values_2="1.3, 1.5, 2", include_off=False
    )
    pairs = [(scale, alpha) for scale in (1.0, 3.0) for alpha in (1.3, 1.5, 2.0)]
    assert labels == [f"guidance_scale {scale:g}, alpha {alpha:g}" for scale, alpha in pairs]
    assert columns == 3
    for model, (scale, alpha) in zip(models, pairs, strict=True):
        (guidance,) = guidances(model)
        assert guidance.config == dataclasses.replace(
            guidances(advanced(plain))[0].config, guidance_scale=scale, alpha=alpha
        )


def test_a_preset_is_applied_before_the_other_setting() -> None:
    plain = host.build_model("sd15")
    for order in (("preset", "guidance_scale"), ("guidance_scale", "preset")):
        texts = {"preset": "paper", "guidance_scale": "3"}
        models, _, _ = swept(
            plain, order[0], texts[order[0]], field_2=order[1], values_2=texts[order[1]], include_off=False
        )
        (guidance,) = guidances(models[0])
        assert guidance.config == dataclasses.replace(PRESETS["paper"].config, guidance_scale=3.0)
        assert (guidance.start_percent, guidance.end_percent, guidance.adapt_to_cfg) == (0.0, 1.0, False)


def test_the_default_preset_is_varied_without_a_gag_node(caplog: pytest.LogCaptureFixture) -> None:
    plain = host.build_model("sd15")
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        (off, model), _, _ = swept(plain, "strength", "0.7")
    assert "there is no GAG node on the model, so preset auto is varied" in caplog.text
    by_hand = host.guide(plain, "auto", strength=0.7)
    assert torch.equal(picture(model), picture(by_hand))
    assert torch.equal(picture(off), picture(plain))


def test_the_last_of_several_nodes_is_varied_and_the_others_stay() -> None:
    plain = host.build_model("sd15")
    first = host.guide(plain, "paper", end_percent=0.4)
    both = host.guide(first, "no CFG", start_percent=0.4, schedule=[1.0, 0.5])
    (off, zero, half), _, _ = swept(both, "strength", "0, 0.5")
    assert torch.equal(picture(off), picture(plain))
    assert torch.equal(picture(zero), picture(first))
    assert torch.equal(picture(half), picture(both))
    assert not torch.equal(picture(half), picture(first))


def test_settings_that_are_not_varied_stay() -> None:
    curve = Curve("bump")
    model = advanced(host.build_model("sd15"), schedule=curve, verbose=True)
    (base,) = guidances(model)
    for varied in swept(model, "alpha", "1.3, 1.7", include_off=False)[0]:
        (guidance,) = guidances(varied)
        assert (guidance.schedule, guidance.verbose, guidance.apply_to) == (curve, True, "positive")
        assert (guidance.layers, guidance.order) == (base.layers, base.order)
    assert guidances(model) == (base,), "the input model was changed"


def test_probes_stay_on_every_model() -> None:
    model, _ = host.run_node("GAGProbe", model=advanced(host.build_model("sd15")))
    for varied in swept(model, "strength", "0, 1")[0]:
        assert len(guided_model._probes_of(varied)) == 1


def test_off_is_the_model_without_any_gag_node() -> None:
    plain = host.build_model("sd15")
    off = swept(advanced(plain), "alpha", "1.5")[0][0]
    assert off.wrappers == plain.wrappers or not any(entry for kind in off.wrappers.values() for entry in kind.values())


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (8, 8), (9, 5), (10, 5), (17, 6), (24, 8), (25, 7), (63, 8)]
)
def test_rows_of_one_setting_are_even(count: int, columns: int) -> None:
    values = ", ".join(map(str, range(1, count + 1)))
    assert swept(host.build_model("sd15"), "guidance_scale", values, include_off=False)[2] == columns


# --- the values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "text", "values"),
    [
        ("guidance_scale", "1, 2, 5", [1.0, 2.0, 5.0]),
        ("guidance_scale", "0..10 in 6", [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
        ("guidance_scale", " 10 .. 0  in 3 ,  -1e1", [10.0, 5.0, 0.0, -10.0]),
        # Values are those that users would write, and not 0.30000000000000004.
        ("alpha", "1..2 IN 11", [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]),
        ("norm_threshold", ".5, 1., inf", [0.5, 1.0, math.inf]),
        ("anderson_depth", "1..3 in 3, 5", [1, 2, 3, 5]),
        ("merge_heads", "off,on", [False, True]),
        ("preset", "auto , paper", ["auto", "paper"]),
        ("blocks", "d0,m; u ;double 0-18, single 1", ["d0,m", "u", "double 0-18, single 1"]),
    ],
)
def test_texts_are_parsed_into_values_of_the_right_type(field: str, text: str, values: list[Any]) -> None:
    found = parse_values(field, text)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@examples(300)
@hypothesis.given(
    first=st.integers(-1000, 1000), last=st.integers(-1000, 1000), count=st.integers(2, MOST), digits=st.integers(0, 3)
)
def test_ranges_are_even_and_include_both_ends(first: int, last: int, count: int, digits: int) -> None:
    low, high = first / 10**digits, last / 10**digits
    found = parse_values("guidance_scale", f"{low}..{high} in {count}")
    assert len(found) == count
    assert (found[0], found[-1]) == (low, high)
    for step, value in enumerate(found):
        assert value == pytest.approx(low + (high - low) * step / (count - 1), rel=1e-11, abs=1e-9)


@examples(300)
@hypothesis.given(
    field=st.sampled_from(list(FIELDS)), text=st.text(max_size=20) | st.text("0123456789.,-in e;", max_size=20)
)
def test_any_text_is_parsed_or_refused_in_a_sentence(field: str, text: str) -> None:
    try:
        values = parse_values(field, text)
    except ValueError as error:
        assert str(error).startswith((f"{field} must be ", "A sweep must make 64 pictures at most"))
        assert len(str(error)) < 300
    else:
        assert values and all(type(value) is FIELDS[field] for value in values)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "field": ({"field": "colour"}, "field must be one of preset, rule, .*, adapt_to_cfg, got 'colour'."),
    "second field": ({"field_2": "colour", "values_2": "1"}, "field must be one of preset, .*, got 'colour'."),
    "twice": (
        {"field_2": "guidance_scale", "values_2": "1"},
        "must be two different settings, got guidance_scale twice",
    ),
    "empty": ({"values": " "}, "guidance_scale must be values such as 1, 2, 5 or 0..10 in 6, got ''."),
    "a gap": ({"values": "1,,2"}, "guidance_scale must be values such as .*, got ''."),
    "no number": ({"values": "1, two"}, "guidance_scale must be values such as .*, got 'two'."),
    "one in a range": ({"values": "0..5 in 1"}, "guidance_scale must be values such as .*, got '0..5 in 1'."),
    "switch": ({"field": "merge_heads", "values": "1"}, "merge_heads must be values such as on, off, got '1'."),
    "word": ({"field": "rule", "values": "gag, nag"}, "rule must be one of gag, uniform, .*, got 'nag'."),
    "whole": (
        {"field": "anderson_depth", "values": "1..2 in 3"},
        "anderson_depth must be whole numbers, got '1..2 in 3'.",
    ),
    "too many": (
        {"values": "0..10 in 65"},
        "A sweep must make 64 pictures at most, got more with guidance_scale '0..10 in",
    ),
    "endless": ({"values": "0..10 in 999999999"}, "A sweep must make 64 pictures at most"),
    "off is one too": ({"values": "0..10 in 64"}, "A sweep must make 64 pictures at most, got 65; leave values out."),
    "pairs": (
        {"values": "0..10 in 9", "field_2": "alpha", "values_2": "1..2 in 8"},
        "A sweep must make 64 pictures at most, got 73; leave values out.",
    ),
    "out of range": ({"field": "alpha", "values": "1.5, 3"}, "alpha 3: alpha must be a number from 1 to 2, got 3.0."),
    "no block": ({"field": "blocks", "values": "u; d9"}, "blocks d9: blocks: 'd9' is out of range; this model has"),
    "no stretch": (
        {"field": "start_percent", "values": "0.9", "field_2": "end_percent", "values_2": "1, 0.5"},
        "start_percent 0.9, end_percent 0.5: start_percent and end_percent must lie between 0 and 1, the start not",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused_in_a_sentence_and_change_nothing(case: str) -> None:
    inputs, sentence = WRONG[case]
    model = advanced(host.build_model("sd15"))
    before = guidances(model)
    with pytest.raises(ValueError, match=sentence) as raised:
        host.run_node("GAGSweep", model=model, **{"field": "guidance_scale", "values": "1", **inputs})
    assert "\n" not in str(raised.value)
    assert guidances(model) == before


def test_an_input_that_is_not_a_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^GAG needs a diffusion model, got NoneType; connect the output MODEL of a model loader\.$"
    ):
        host.run_node("GAGSweep", model=None)
