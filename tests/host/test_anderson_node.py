# SPDX-License-Identifier: GPL-3.0-or-later
"""GAG Anderson in real runs: guided calls equal the fp64 reference, off changes nothing, bad input is refused."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import comfy.samplers
import pytest
import torch
from torch import Tensor

import host_process as host
import reference
from comfy_host import ROOT
from recorder import Call, record_calls
from transformers_of_host import TRANSFORMERS

GuidanceConfig = host.pack_module("gag_core").GuidanceConfig
DEFAULT = host.pack_module("nodes.anderson").DEFAULT
PROMPT = "a red circle left of a blue square"
NODE = "GAGAnderson"
TOKENS = 12
# Names of the node's inputs, by the name of the config's field.
FIELDS = {"anderson_depth": "depth", "anderson_regularization": "regularization"}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "depth 3": {"anderson_depth": 3},
    "capped, along S": {"orthogonal_scale": 0.0, "norm_threshold": 0.05, "guidance_scale": 10.0},
    "plain sparse, half": {"guidance_scale": 0.0, "strength": 0.5},
    "sparsemax, regularised": {"alpha": 2.0, "anderson_regularization": 0.5, "norm_mode": "absolute"},
}


def guided(model: Any, **fields: Any) -> Any:
    (out,) = host.run_node(NODE, model=model, **{FIELDS.get(name, name): value for name, value in fields.items()})
    return out


def check(call: Call, expected: Tensor, config: Any) -> None:
    """Compare fp32 with fp64. Iterated read-outs (depth > 1) magnify rounding errors, more so in some tokens."""
    if config.anderson_depth == 1:
        call.check(expected, config.guidance_scale)
        return
    largest = float(call.v.abs().max())
    error = (call.out.double() - expected).abs().amax(dim=-1)
    assert (error < 1e-4 * largest).double().mean() > 0.98
    assert error.max() < 0.3 * largest


# --- the node -----------------------------------------------------------------------------------------------------


def test_the_nodes_defaults_are_those_of_its_config() -> None:
    inputs = {item.id: item for item in host.NODES[NODE].GET_SCHEMA().inputs}
    for field in dataclasses.fields(GuidanceConfig):
        if field.name not in ("rule", "merge_heads"):
            assert inputs[FIELDS.get(field.name, field.name)].default == getattr(DEFAULT, field.name)
    assert DEFAULT.rule == "anderson" and not DEFAULT.merge_heads
    assert list(inputs)[-1] == "schedule" and inputs["schedule"].optional


def test_every_input_and_output_has_a_tooltip_and_is_on_the_help_page() -> None:
    schema = host.NODES[NODE].GET_SCHEMA()
    page = Path(ROOT, "web", "docs", f"{NODE}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    assert all(len(item.tooltip) > 10 for item in (*schema.inputs, *schema.outputs))
    page_text = " ".join(page.split())
    for item in schema.inputs:
        assert f"- **{item.id}**: " in page
        if item.id != "schedule":
            # The page may say more, but the first sentence of the tooltip must be on it.
            first = re.split(r"(?<=[.:]) ", item.tooltip)[0]
            assert first in page_text, first


def test_the_advanced_node_does_not_offer_the_rule_anderson() -> None:
    """The node lacks the settings of that rule."""
    (rule,) = (item for item in host.NODES["GAGuidanceAdvanced"].GET_SCHEMA().inputs if item.id == "rule")
    assert rule.options == ["gag", "uniform", "pladis"]


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bound below 0": ({"guidance_scale": -1.0}, ["guidance_scale", "at least 0", "-1.0"]),
    "depth 0": ({"depth": 0}, ["depth", "from 1 to 5", "0"]),
    "depth 6": ({"depth": 6}, ["depth", "from 1 to 5", "6"]),
    "depth between": ({"depth": 1.5}, ["depth", "whole number", "1.5"]),
    "regularization": ({"regularization": -0.5}, ["regularization", "at least 0", "-0.5"]),
    "regularization nan": ({"regularization": math.nan}, ["regularization", "nan"]),
    "alpha": ({"alpha": 3.0}, ["alpha", "3.0", "from 1 to 2"]),
    "start after end": ({"start_percent": 0.8, "end_percent": 0.2}, ["0.8", "0.2", "start"]),
    "schedule": ({"schedule": "now"}, ["schedule", "str"]),
    "model": ({"model": None}, ["model", "NoneType"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_in_one_sentence_and_changes_nothing(case: str) -> None:
    inputs, words = WRONG[case]
    model = host.build_model("sd15")
    before = {key: dict(entry) for key, entry in model.wrappers.items()}
    with pytest.raises((ValueError, TypeError)) as raised:
        host.run_node(NODE, **{"model": model, **inputs})
    message = str(raised.value)
    assert all(word in message for word in words) and "\n" not in message and message.endswith("."), message
    assert {key: dict(entry) for key, entry in model.wrappers.items()} == before


# --- real runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_unets_get_the_reference_output(name: str, settings: dict[str, Any]) -> None:
    model = guided(host.build_model(name), **settings)
    config = dataclasses.replace(DEFAULT, **settings)
    with record_calls(model) as calls:
        host.sample(model, name, size=(4, 4) if name == "sd15" else None, steps=1)
    count = 0
    for call in calls:
        if call.module.endswith(".attn2") and ".middle_block" not in call.module:
            check(call, reference.guided_attention(call.q, call.k, call.v, config), config)
            count += 1
        else:
            call.check_plain()
    assert count


@pytest.mark.parametrize("name", ["flux", "qwen-image", "stable-cascade"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_joint_attention_gets_the_reference_output(settings: dict[str, Any], name: str) -> None:
    tiny = TRANSFORMERS[name]
    model = guided(tiny.build(), **settings)
    config = dataclasses.replace(DEFAULT, **settings)
    with record_calls(model) as calls:
        out = tiny.sample(model, tokens=TOKENS)
    assert torch.isfinite(out).all() and not torch.equal(out, tiny.sample(tiny.build(), tokens=TOKENS))
    count = 0
    for call in calls:
        mask = call.mask.unsqueeze(1) if call.mask is not None and call.mask.ndim == 3 else call.mask
        text = tiny.text(call.k.shape[2], TOKENS)
        check(call, reference.guided_joint_attention(call.q, call.k, call.v, text, config, mask=mask), config)
        count += 1
    assert count == 2 * tiny.guided  # steps


@pytest.mark.parametrize("settings", [{}, {"anderson_depth": 2}], ids=["depth 1", "depth 2"])
def test_the_demo_model_gets_the_reference_output(settings: dict[str, Any]) -> None:
    """The demo model has trained weights and runs in the host's own sampler node with CFG."""
    model, clip, _ = host.run_node("GAGDemoLoader")
    config = dataclasses.replace(DEFAULT, **settings)
    with record_calls(guided(model, **settings)) as calls:
        latent = _sampled(guided(model, **settings), clip, steps=2)
    guided_calls = [call for call in calls if call.module.endswith("attn2") and "middle_block" not in call.module]
    assert len(guided_calls) == 2 * 4  # steps, attentions
    for call in guided_calls:
        check(call, reference.guided_attention(call.q, call.k, call.v, config), config)
    for call in calls:
        if not any(call is other for other in guided_calls):
            call.check_plain()
    assert torch.isfinite(latent).all()


def _sampled(model: Any, clip: Any, steps: int) -> Tensor:
    positive, negative, latent = host.encode(clip, PROMPT), host.encode(clip, ""), host.empty_latent()
    sampler = host.NODES["KSampler"]()
    (out,) = sampler.sample(model, 3, steps, 4.0, "euler", "normal", positive, negative, latent)
    samples: Tensor = out["samples"]
    return samples


def test_the_rules_anderson_and_gag_give_different_pictures() -> None:
    """Otherwise the runs above would not tell the rules apart."""
    model, clip, _ = host.run_node("GAGDemoLoader")
    settings = {"guidance_scale": 3.0, "norm_threshold": 0.5, "norm_mode": "relative", "orthogonal_scale": 1.0}
    (gag,) = host.run_advanced(model=model, **settings)
    outs = [_sampled(m, clip, 4) for m in (model, gag, guided(model), guided(model, anderson_depth=3))]
    for i, one in enumerate(outs):
        assert all((one - other).abs().max() > 1e-2 for other in outs[:i])


# --- off ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_off_gives_the_picture_without_the_node(name: str, depth: int) -> None:
    model = host.build_model(name)
    plain = host.sample(model, name)
    for off in ({"strength": 0.0}, {"start_percent": 1.0}, {"schedule": [0.0]}):
        assert torch.equal(host.sample(guided(model, anderson_depth=depth, **off), name), plain)
    assert not torch.equal(host.sample(guided(model, anderson_depth=depth), name), plain)
    assert torch.equal(host.sample(model, name), plain)


@pytest.mark.parametrize("depth", [1, 4])
def test_alpha_1_is_plain_attention(depth: int) -> None:
    model = guided(host.build_model("sd15"), alpha=1.0, anderson_depth=depth)
    with record_calls(model) as calls:
        host.sample(model, "sd15")
    assert any(call.module.endswith(".attn2") for call in calls)
    for call in calls:
        call.check_plain()


def test_a_schedule_scales_the_strength() -> None:
    model = host.build_model("sd15")
    constant = host.sample(guided(model, schedule=[0.5, 0.5]), "sd15")
    assert torch.equal(constant, host.sample(guided(model, strength=0.5), "sd15"))
    first_only = host.sample(guided(model, schedule=[1.0, 0.0]), "sd15")
    assert not torch.equal(first_only, host.sample(guided(model), "sd15"))


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "uni_pc", "heun"])
def test_guidance_works_with_other_samplers(sampler: str) -> None:
    assert sampler in comfy.samplers.KSampler.SAMPLERS
    model = host.build_model("sd15")
    out = host.sample(guided(model, anderson_depth=2), "sd15", sampler=sampler, steps=3)
    assert torch.isfinite(out).all()
    assert not torch.equal(out, host.sample(model, "sd15", sampler=sampler, steps=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["flux", "wan-t2v"])
def test_guidance_works_in_half_precision(name: str, dtype: torch.dtype) -> None:
    tiny = TRANSFORMERS[name]
    out = tiny.sample(guided(tiny.build(dtype=dtype), anderson_depth=2), tokens=TOKENS)
    assert torch.isfinite(out).all()
    assert not torch.equal(out, tiny.sample(tiny.build(dtype=dtype), tokens=TOKENS))


def test_the_later_of_two_nodes_acts() -> None:
    model = host.build_model("sd15")
    gag = host.guide(model, "paper")
    assert torch.equal(host.sample(guided(gag), "sd15"), host.sample(guided(model), "sd15"))
    gag_last = host.guide(guided(model), "paper")
    assert torch.equal(host.sample(gag_last, "sd15"), host.sample(gag, "sd15"))
