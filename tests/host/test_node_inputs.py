# SPDX-License-Identifier: GPL-3.0-or-later
"""Guidance nodes with random inputs: refused in a sentence that leaves the model unchanged, or the run is finite."""

from __future__ import annotations

import math
import pickle
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import host_process as host
from properties import examples

FAMILIES = st.sampled_from(["sd15", "sdxl", "flux"])
NODES = ["GAGuidance", "GAGuidanceAdvanced", "GAGAnderson"]
KINDS, Curve = (
    host.pack_module("nodes.patching.strength_curve").KINDS,
    host.pack_module("nodes.patching.strength_curve").Curve,
)
INPUTS: dict[str, dict[str, Any]] = {
    node: {item.id: item for item in host.NODES[node].GET_SCHEMA().inputs if item.id != "model"} for node in NODES
}

# Values that are not a ModelPatcher.
NOT_MODELS = [None, 5, "model", object(), [], SimpleNamespace(model=None)]
FLOATS = st.floats() | st.floats(-3, 3) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 1e30, 5e-324])
JUNK = FLOATS | st.integers(-3, 3) | st.none() | st.booleans() | st.text(max_size=4) | st.just(10**400) | st.just([1.0])
SCHEDULES = (
    st.none()
    | st.lists(FLOATS | st.integers(-3, 3), max_size=4)
    | st.lists(st.floats(0.0, 20.0), max_size=4).map(torch.tensor)
    | st.builds(Curve, st.sampled_from(KINDS), st.floats(0.0, 10.0), st.floats(0.0, 10.0))
)
BLOCKS = (
    st.sampled_from(["", "  ", "d", "m,u", "d1.0", "double 0-1, single 1", "0,1,3-4", "d" + "9" * 5000, "d," * 3000])
    | st.text(alphabet="dmu0123456789.,- ", max_size=12)
    | st.lists(st.sampled_from(["d", "u", "m", "double", "single", "0", "1-2", ".0", "-1", ""]), max_size=4).map(
        ",".join
    )
    | st.text(max_size=20)
)
# Allowed lists of factors and curves.
VALID_SCHEDULES = (
    st.none()
    | st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=4)
    | st.builds(Curve, st.sampled_from(KINDS), st.floats(0.0, 10.0), st.floats(0.0, 10.0))
)
SENTENCE = re.compile(r"[\w, ]+( must|:) .+(got .+\.|leave it empty for the default\.)", re.DOTALL)


@cache
def built(name: str) -> Any:
    return host.build_model(name)


def state_of(model: Any) -> bytes:
    """Return everything that a node could change on a model."""
    return pickle.dumps(
        (model.model_options, model.wrappers, model.callbacks, model.attachments, model.object_patches, model.patches)
    )


def valid(item: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that an input allows."""
    if item.id == "blocks":
        return st.just("")
    if item.id == "schedule":
        return VALID_SCHEDULES
    if hasattr(item, "options"):
        return st.sampled_from(item.options)
    if isinstance(item.default, bool):
        return st.booleans()
    if isinstance(item.default, int):
        return st.integers(item.min, item.max)
    return st.sampled_from([item.min, item.max, item.default]) | st.floats(item.min, item.max)


@st.composite
def settings(draw: st.DrawFn, node: str, *, wrong: bool = True) -> dict[str, Any]:
    """Draw every input of a node; if ``wrong``, some inputs have any value."""
    chosen: dict[str, Any] = {}
    for name, item in INPUTS[node].items():
        if wrong and draw(st.integers(0, 5)) == 0:
            # The host passes inputs with options as one of the options or as another text.
            chosen[name] = draw(st.text(max_size=5) if hasattr(item, "options") else JUNK)
        else:
            chosen[name] = draw(valid(item))
    if "schedule" in chosen and wrong:
        chosen["schedule"] = draw(SCHEDULES | JUNK)
    if "blocks" in chosen and wrong:
        chosen["blocks"] = draw(BLOCKS)
    if not wrong and "start_percent" in chosen:
        ends = sorted((chosen["start_percent"], chosen["end_percent"]))
        chosen["start_percent"], chosen["end_percent"] = ends
    return chosen


def guided(node: str, model: Any, **inputs: Any) -> Any:
    """Return the guided model, or None if the inputs were refused in a sentence. The input model must not change."""
    before = state_of(model)
    try:
        (out,) = host.run_node(node, model=model, **inputs)
    except (ValueError, TypeError) as error:
        assert SENTENCE.fullmatch(str(error)), f"not an error sentence of the pack: {error}"
        assert len(str(error)) < 700
        return None
    finally:
        assert state_of(model) == before
    return out


def check_finite(model: Any, name: str, **inputs: Any) -> None:
    assert torch.isfinite(host.sample(model, name, steps=1, **inputs)).all()


@examples(600)
@hypothesis.given(node=st.sampled_from(NODES), name=FAMILIES, data=st.data())
def test_any_inputs_are_accepted_or_refused_in_a_sentence(node: str, name: str, data: st.DataObject) -> None:
    model = built(name)
    out = guided(node, model, **data.draw(settings(node)))
    assert out is not model


@examples(500)
@hypothesis.given(name=FAMILIES, blocks=BLOCKS)
def test_any_blocks_are_accepted_or_refused_in_a_sentence(name: str, blocks: str) -> None:
    out = guided("GAGuidanceAdvanced", built(name), blocks=blocks)
    if out is not None:
        (wrapper,) = out.get_wrappers("apply_model", "comfyui-gag")
        (guidance,) = wrapper.__self__.guidances
        assert guidance.layers <= set(guidance.order) and guidance.layers


@examples(60)
@hypothesis.given(node=st.sampled_from(NODES), name=FAMILIES, cfg=st.sampled_from([1.0, 7.0]), data=st.data())
def test_all_allowed_inputs_give_finite_pictures(node: str, name: str, cfg: float, data: st.DataObject) -> None:
    out = guided(node, built(name), **data.draw(settings(node, wrong=False)))
    assert out is not None
    check_finite(out, name, cfg=cfg)


@examples(40)
@hypothesis.given(
    name=FAMILIES,
    positive=st.sampled_from([1, 2, 77, 154, 231, 500]),
    negative=st.sampled_from([1, 3, 77, 154, 231]),
    batch=st.integers(1, 3),
    cfg=st.sampled_from([1.0, 7.0]),
    apply_to=st.sampled_from(["both", "positive"]),
)
def test_prompts_of_any_length_give_finite_pictures(
    name: str, positive: int, negative: int, batch: int, cfg: float, apply_to: str
) -> None:
    model = guided("GAGuidanceAdvanced", built(name), apply_to=apply_to, guidance_scale=2.0)
    prompts: dict[str, Any] = {
        "positive": host.conditioning(name, 1, positive),
        "negative": host.conditioning(name, 2, negative),
    }
    check_finite(model, name, cfg=cfg, batch=batch, **prompts)


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_empty_prompts_give_the_picture_without_the_node(name: str, cfg: float) -> None:
    empty_prompts: dict[str, Any] = {
        "positive": host.conditioning(name, 1, 0),
        "negative": host.conditioning(name, 2, 0),
    }
    model = built(name)
    plain = host.sample(model, name, steps=1, cfg=cfg, **empty_prompts)
    assert torch.equal(host.sample(guided("GAGuidance", model), name, steps=1, cfg=cfg, **empty_prompts), plain)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("wrong", NOT_MODELS, ids=lambda wrong: type(wrong).__name__)
def test_an_input_that_is_not_a_model_is_refused_in_a_sentence(node: str, wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^GAG needs a diffusion model, got \w+; connect the output MODEL of a model loader\.$"
    ):
        host.run_node(node, model=wrong)


def test_the_patcher_of_a_text_encoder_is_refused_in_a_sentence() -> None:
    patcher = built("sd15").clone()
    patcher.model = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"^GAG needs a diffusion model, got Linear; connect the output MODEL of a model loader\.$"
    ):
        host.run_node("GAGuidance", model=patcher)
