# SPDX-License-Identifier: GPL-3.0-or-later
"""adapt_to_cfg in the host's samplers: the strength that acts, beside each CFG scale, guider and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import pytest
import torch
from torch import Tensor

import companions
import host_process as host

guidance = host.pack_module("nodes.patching.guidance")
cfg_of, cfg_factor = guidance.cfg_of, guidance.cfg_factor
GUIDED = "Guided 6 of 6 attentions in 2 of 2 calls."


@contextmanager
def strengths() -> Iterator[list[float]]:
    """Record the strength that gag_core gets in each guided attention."""
    found: list[float] = []
    module = host.pack_module("nodes.patching.attention_call")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("guided_attention", "guided_joint_attention"):
            method = getattr(module, name)

            def recorded(*args: Any, method: Callable[..., Tensor] = method, **kwargs: Any) -> Tensor:
                found.extend(arg.strength for arg in args if hasattr(arg, "strength"))
                return method(*args, **kwargs)

            patch.setattr(module, name, recorded)
        yield found


def adapted(model: Any, **settings: Any) -> Any:
    return host.guide(model, "paper", **{"adapt_to_cfg": True, **settings})


def run_guider(guider: Any) -> Tensor:
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 2)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    out: Tensor = guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1
    )
    return out


def cfg_guider(model: Any, cfg: float, kind: type = comfy.samplers.CFGGuider) -> Any:
    guider = kind(model)
    guider.set_conds(host.conditioning("sd15", 10), host.conditioning("sd15", 11))
    guider.set_cfg(cfg)
    return guider


# --- the factor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "factor"),
    [(1.0, 1.0), (1.25, 0.75), (2.0, 0.0), (4.0, 0.0), (0.5, 1.0), (0.0, 1.0), (-3.0, 1.0), (1e200, 0.0)],
)
def test_the_factor_falls_from_1_to_0_between_cfg_1_and_2(cfg: float, factor: float) -> None:
    assert cfg_factor(cfg) == factor


@pytest.mark.parametrize(
    ("attributes", "cfg"),
    [
        ({"cfg": 3.0}, 3.0),
        ({"cfg": 3}, 3.0),
        ({"cfg": 1.0, "cfg1": 5.0, "cfg2": 9.0}, 5.0),
        ({}, 1.0),
        ({"cfg": None}, 1.0),
        ({"cfg": "7"}, 1.0),
        ({"cfg": math.nan}, 1.0),
        ({"cfg": math.inf, "cfg1": 2.0}, 2.0),
    ],
)
def test_the_cfg_scale_of_any_guider_is_a_finite_number(attributes: dict[str, Any], cfg: float) -> None:
    assert cfg_of(SimpleNamespace(**attributes)) == cfg
    assert cfg_of(None) == 1.0


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "factor", "sentence"),
    [
        (1.0, 1.0, ""),
        (0.5, 1.0, ""),
        (1.25, 0.75, " Strength was multiplied by 0.75, because CFG was 1.25."),
        (1.5, 0.5, " Strength was multiplied by 0.5, because CFG was 1.5."),
    ],
)
def test_the_strength_that_acts_and_the_report(cfg: float, factor: float, sentence: str, node_texts: list[str]) -> None:
    model = adapted(host.build_model("sd15"), strength=0.8)
    with strengths() as found:
        picture = host.sample(model, "sd15", cfg=cfg)
    assert len(set(found)) == 1 and found[0] == pytest.approx(0.8 * factor)
    assert node_texts == [GUIDED + sentence]
    by_hand = host.guide(host.build_model("sd15"), "paper", strength=0.8 * cfg_factor(cfg))
    assert torch.equal(picture, host.sample(by_hand, "sd15", cfg=cfg))


@pytest.mark.parametrize("cfg", [2.0, 7.0])
def test_beside_cfg_the_node_rests_and_says_so(
    cfg: float, node_texts: list[str], log_messages: Callable[[], str]
) -> None:
    model = host.build_model("sd15")
    with strengths() as found:
        picture = host.sample(adapted(model), "sd15", cfg=cfg)
    assert not found
    assert torch.equal(picture, host.sample(model, "sd15", cfg=cfg))
    assert node_texts == [f"Nothing guided: it rests beside CFG {cfg:g}."]
    assert (
        f"GAG guided nothing in this run: CFG is {cfg:g}, and the node rests beside CFG of 2 and more;"
        in log_messages()
    )


def test_a_node_that_rests_leaves_the_step_to_an_earlier_one(node_texts: list[str]) -> None:
    model = adapted(adapted(host.build_model("sd15"), adapt_to_cfg=False, strength=0.5))
    with strengths() as found:
        host.sample(model, "sd15", cfg=4.0)
    assert set(found) == {0.5}
    assert node_texts == [GUIDED, "Nothing guided: it rests beside CFG 4."]


def test_a_joint_attention_is_adapted_too(node_texts: list[str]) -> None:
    with strengths() as found:
        host.sample(adapted(host.build_model("flux")), "flux", cfg=1.75)
    assert set(found) == {0.25}
    assert node_texts[0].endswith(" Strength was multiplied by 0.25, because CFG was 1.75.")


def test_the_switch_off_keeps_the_strength(node_texts: list[str]) -> None:
    with strengths() as found:
        host.sample(adapted(host.build_model("sd15"), adapt_to_cfg=False), "sd15", cfg=4.0)
    assert set(found) == {1.0}
    assert node_texts == [GUIDED]


@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_factors_of_cfg_and_of_a_schedule_are_multiplied(cfg: float, node_texts: list[str]) -> None:
    model = adapted(host.build_model("sd15"), strength=0.5, schedule=[1.0, 0.5])
    with strengths() as found:
        host.sample(model, "sd15", cfg=cfg)
    assert sorted(set(found)) == [pytest.approx(0.25 * cfg_factor(cfg)), pytest.approx(0.5 * cfg_factor(cfg))]


def test_a_schedule_of_0_still_leaves_the_step_alone(node_texts: list[str]) -> None:
    host.sample(adapted(host.build_model("sd15"), schedule=[0.0, 1.0]), "sd15", cfg=1.5)
    assert node_texts == [
        "Guided 6 of 6 attentions in 1 of 2 calls. Strength was multiplied by 0.5, because CFG was 1.5."
    ]


def test_each_of_two_nodes_adapts_or_not(node_texts: list[str]) -> None:
    model = adapted(adapted(host.build_model("sd15"), adapt_to_cfg=False, end_percent=0.4), start_percent=0.4)
    with strengths() as found:
        host.sample(model, "sd15", steps=4, cfg=1.75)
    assert set(found) == {1.0, 0.25}
    first, second = node_texts
    assert "multiplied" not in first
    assert second.endswith(" Strength was multiplied by 0.25, because CFG was 1.75.")


# --- guiders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_the_first_scale_of_dual_cfg_counts(style: str, node_texts: list[str]) -> None:
    prompts = {name: host.conditioning("sd15", seed) for seed, name in enumerate(("cond1", "cond2", "negative"))}
    guider = companions.run_host_node(
        "nodes_custom_sampler",
        "DualCFGGuider",
        model=adapted(host.build_model("sd15")),
        cfg_conds=1.75,
        cfg_cond2_negative=5.0,
        style=style,
        **prompts,
    )
    with strengths() as found:
        run_guider(guider)
    assert set(found) == {0.25}
    assert node_texts == [GUIDED + " Strength was multiplied by 0.25, because CFG was 1.75."]


def guider_without_cfg(model: Any) -> Any:
    """Return a guider of one prompt that has no attribute ``cfg``; the host's own has the scale 1."""
    positive = host.conditioning("sd15", 10)
    guider = companions.run_host_node("nodes_custom_sampler", "BasicGuider", model=model, conditioning=positive)
    del guider.cfg

    def predict(x: Tensor, timestep: Tensor, model_options: dict[str, Any] = {}, seed: Any = None) -> Tensor:  # noqa: B006
        (out,) = comfy.samplers.calc_cond_batch(
            guider.inner_model, [guider.conds["positive"]], x, timestep, model_options
        )
        return out

    guider.predict_noise = predict
    return guider


def test_a_guider_without_cfg_counts_as_cfg_1(node_texts: list[str]) -> None:
    model = host.build_model("sd15")
    try:
        run_guider(guider_without_cfg(model))
    except AttributeError:
        # ComfyUI 0.33.0 writes guider.cfg into its log, so no such guider reaches guidance there.
        pytest.skip("this ComfyUI does not sample with a guider that has no cfg")
    with strengths() as found:
        run_guider(guider_without_cfg(adapted(model)))
    assert set(found) == {1.0}
    assert node_texts == [GUIDED]


class Falling(comfy.samplers.CFGGuider):
    """A guider whose CFG scale is 1.75 in the first step and 1 in the others."""

    def predict_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().predict_noise(*args, **kwargs)
        self.cfg = 1.0
        return out


def test_a_guider_that_changes_cfg_between_steps_changes_the_strength(node_texts: list[str]) -> None:
    with strengths() as found:
        run_guider(cfg_guider(adapted(host.build_model("sd15")), 1.75, Falling))
    assert sorted(set(found)) == [0.25, 1.0]
    assert found[0] == 0.25
    assert node_texts == [GUIDED + " Strength was multiplied by 0.25 to 1, because CFG was 1 to 1.75."]


# --- probes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_probe_without_gag_measures_the_default_preset_at_its_own_strength(cfg: float) -> None:
    model, probe = host.run_node("GAGProbe", model=host.build_model("sd15"))
    host.sample(model, "sd15", cfg=cfg)
    assert probe.result.strength == 1.0


def test_a_probe_sees_the_strength_that_acts() -> None:
    model, probe = host.run_node("GAGProbe", model=adapted(host.build_model("sd15")))
    host.sample(model, "sd15", cfg=1.75)
    assert probe.result.strengths == (0.25, 0.25)
