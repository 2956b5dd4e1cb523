# SPDX-License-Identifier: GPL-3.0-or-later
"""Schedules: their mathematics against plain twins, and in every step of real runs the factor that they say."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import folder_paths
import hypothesis
import numpy as np
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from hypothesis import strategies as st
from torch import Tensor

import companions
import host_process as host
import reference
from properties import examples
from recorder import recording
from tolerances import assert_close

schedules = host.pack_module("nodes.schedules")
Curve, Factors, schedule_of = schedules.Curve, schedules.Factors, schedules.schedule_of
PRESETS = host.pack_module("nodes.presets").PRESETS
Steps = host.pack_module("nodes.host").Steps
sigma_range = host.pack_module("nodes.host").sigma_range
SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
# What a step's factor may be in fp64, beside the exact formula.
ROUNDING = 1e-12

VALUES = st.floats(0.0, 10.0)
SHARES = st.floats(0.0, 1.0)


# --- the mathematics ----------------------------------------------------------------------------------------------


def twin(kind: str, start_value: float, end_value: float, start: float, end: float, at: float) -> float:
    """The factor as docs and tooltips say it, in words of its own; ``at`` grows during a run, as start and end do."""
    if kind == "constant":
        return end_value
    if kind == "interval":
        return end_value if start <= at <= end else start_value
    if at < start:
        return start_value
    if at >= end:
        return start_value if kind == "bump" else end_value
    way = (at - start) / (end - start)
    share = {"linear": way, "cosine": math.sin(math.pi * way / 2) ** 2, "bump": math.sin(math.pi * way) ** 2}[kind]
    return (1.0 - share) * start_value + share * end_value


@examples(400)
@hypothesis.given(kind=st.sampled_from(schedules.KINDS), values=st.tuples(VALUES, VALUES), data=st.data())
def test_every_kind_is_its_formula_over_steps_and_over_sigma(
    kind: str, values: tuple[float, float], data: st.DataObject
) -> None:
    start, end = sorted(data.draw(st.tuples(SHARES, SHARES)))
    at = data.draw(SHARES | st.sampled_from([0.0, 1.0, start, end]))
    curve = Curve(kind, *values, start, end)
    expected = twin(kind, *values, start, end, at)
    assert curve.factor(at, math.nan) == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
    # Noise falls as a run goes on, so the same curve over noise is its mirror image.
    mirrored = Curve(kind, *values, 15.0 * (1.0 - start), 15.0 * (1.0 - end), "sigma")
    level = 15.0 * (1.0 - at)
    expected = twin(kind, *values, -mirrored.start, -mirrored.end, -level)
    assert mirrored.factor(math.nan, level) == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)


@examples(200)
@hypothesis.given(kind=st.sampled_from(schedules.KINDS), values=st.tuples(VALUES, VALUES), at=SHARES)
def test_curves_stay_between_their_values_and_end_exactly_on_them(
    kind: str, values: tuple[float, float], at: float
) -> None:
    curve = Curve(kind, *values)
    low, high = sorted(values)
    assert low * (1 - ROUNDING) <= curve.factor(at, 0.0) <= high * (1 + ROUNDING)
    ends = curve.factor(0.0, 0.0), curve.factor(1.0, 0.0)
    first, last = values
    assert (
        ends
        == {
            "constant": (last, last),
            "linear": (first, last),
            "cosine": (first, last),
            "interval": (last, last),
            "bump": (first, first),
        }[kind]
    )


@examples(200)
@hypothesis.given(
    values=st.lists(st.floats(-100.0, 100.0), min_size=1, max_size=60), steps=st.integers(1, 120), data=st.data()
)
def test_factors_are_taken_one_per_step_and_stretched_over_other_numbers_of_steps(
    values: list[float], steps: int, data: st.DataObject
) -> None:
    factors = schedule_of(values)
    for step, value in enumerate(values):
        assert factors.factor(step / max(1, len(values) - 1), math.nan) == value
    step = data.draw(st.integers(0, steps - 1))
    share = step / max(1, steps - 1)
    expected = np.interp(share, np.linspace(0.0, 1.0, len(values)), values) if len(values) > 1 else values[0]
    assert factors.factor(share, math.nan) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_sigmas_are_shares_of_the_largest() -> None:
    sigmas = torch.tensor([8.0, 4.0, 1.0, 0.0])
    assert schedule_of(sigmas).values == (1.0, 0.5, 0.125)
    # The second half of a run, whose last level is not 0 either.
    assert schedule_of(torch.tensor([4.0, 1.0])).values == (1.0,)
    assert schedule_of(None) is None
    curve = Curve()
    assert schedule_of(curve) is curve


WRONG_SCHEDULES: dict[str, tuple[Any, str]] = {
    "text": ("soft", r"schedule must come from GAG Schedule, or be FLOATS .* or SIGMAS, got str\."),
    "nothing": ([], r"schedule must have at least one factor, got none\."),
    "words": ([1.0, "a"], r"schedule: factor 1 \(counted from 0\) must be a number, got 'a'\."),
    "switch": ([True], r"factor 0 .* must be a number, got True\."),
    "not a number": ([math.nan], r"factor 0 .* must be a number from -100 to 100, got nan\."),
    "too large": ([1.0, 101.0], r"factor 1 .* from -100 to 100, got 101\.0\."),
    "one level": (torch.tensor([3.0]), r"SIGMAS, a row of two or more noise levels .*, got \[3\.0\]\."),
    "no level": (torch.tensor([]), r"SIGMAS, .* got a tensor of shape \(0,\) in torch\.float32\."),
    "picture": (torch.zeros(2, 2), r"SIGMAS, .* got a tensor of shape \(2, 2\)"),
    "all zero": (torch.zeros(3), r"not all 0, got \[0\.0, 0\.0, 0\.0\]\."),
    "below zero": (torch.tensor([1.0, -1.0, 0.0]), r"at least 0"),
    "infinite": (torch.tensor([math.inf, 1.0]), r"got \[inf, 1\.0\]\."),
}


@pytest.mark.parametrize("node_id", ["GAGuidance", "GAGuidanceAdvanced"])
@pytest.mark.parametrize("case", WRONG_SCHEDULES)
def test_what_is_no_schedule_is_refused_in_a_sentence(case: str, node_id: str) -> None:
    given, sentence = WRONG_SCHEDULES[case]
    model = host.build_model("sd15")
    before = {kind: dict(entry) for kind, entry in model.wrappers.items()}
    with pytest.raises((ValueError, TypeError), match=sentence) as raised:
        host.run_node(node_id, model=model, schedule=given)
    assert str(raised.value).startswith("schedule") and "\n" not in str(raised.value)
    assert {kind: dict(entry) for kind, entry in model.wrappers.items()} == before


WRONG_CURVES: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "spline"}, r"kind must be one of constant, .*, bump, got 'spline'\."),
    "over": ({"over": "time"}, r"over must be one of steps, sigma, got 'time'\."),
    "value": ({"start_value": math.inf}, r"start_value must be a number from -100 to 100, got inf\."),
    "text": ({"end_value": "1"}, r"end_value must be a number, got '1'\."),
    "order": ({"start": 0.8, "end": 0.2}, r"between 0 and 1 over steps, the start not after the end, got 0\.8 and 0"),
    "beyond": ({"end": 1.5}, r"between 0 and 1 over steps, .* got 0\.0 and 1\.5\."),
    "no end": ({"end": None}, r"got 0\.0 and None\."),
    "rising": ({"over": "sigma", "start": 0.0, "end": 1.0}, r"not below the end because noise falls .* got 0\.0 and 1"),
    "endless": ({"over": "sigma", "start": math.inf, "end": 1.0}, r"got inf and 1\.0\."),
    "nan": ({"over": "sigma", "start": math.nan, "end": 0.0}, r"got nan and 0\.0\."),
}


@pytest.mark.parametrize("case", WRONG_CURVES)
def test_what_is_no_curve_is_refused_in_a_sentence(case: str) -> None:
    settings, sentence = WRONG_CURVES[case]
    with pytest.raises((ValueError, TypeError), match=sentence) as raised:
        host.run_node("GAGSchedule", **settings)
    assert "\n" not in str(raised.value)


# --- the node -----------------------------------------------------------------------------------------------------


@pytest.fixture
def previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", schedules.KINDS)
@pytest.mark.parametrize(("over", "start", "end"), [("steps", 0.2, 0.7), ("sigma", 9.0, 0.5), ("sigma", 0.0, 0.0)])
def test_the_node_gives_the_curve_and_a_picture_of_it(
    kind: str, over: str, start: float, end: float, previews: Path
) -> None:
    settings = {"kind": kind, "over": over, "start_value": 0.5, "end_value": 2.0, "start": start, "end": end}
    answer = host.NODES["GAGSchedule"].execute(**settings)
    assert answer.result == (Curve(**settings),)
    (shown,) = answer.ui.as_dict()["images"]
    assert (previews / shown["subfolder"] / shown["filename"]).stat().st_size > 1000


@pytest.mark.usefixtures("previews")
def test_pictures_of_different_curves_differ() -> None:
    picture_of = host.pack_module("nodes.schedule").picture_of
    pictures = [picture_of(Curve(kind, 0.2, 1.0, 0.2, 0.8)) for kind in schedules.KINDS]
    assert all(picture.shape == (1, 300, 480, 3) for picture in pictures)
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(pictures)


def test_without_matplotlib_there_is_a_schedule_and_no_picture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    answer = host.NODES["GAGSchedule"].execute(**vars(Curve()))
    assert answer.result == (Curve(),) and answer.ui is None
    assert "pip install matplotlib" in caplog.text


# --- runs ---------------------------------------------------------------------------------------------------------


def demo() -> Any:
    return host.run_node("GAGDemoLoader")[0]


def guided(model: Any, schedule: Any = None, **settings: Any) -> Any:
    (out,) = host.run_node(
        "GAGuidance", model=model, schedule=schedule, **{"preset": "paper", "strength": 1.0, **settings}
    )
    return out


def run(model: Any, sampler: str = "euler", steps: int = 6, **settings: Any) -> Tensor:
    """The demo model in the host's sampler."""
    encoder = host.run_node("GAGDemoLoader")[1]
    positive, negative = (
        host.run_node("GAGDemoPrompt", text_encoder=encoder, text=text)[0] for text in ("a red circle", "")
    )
    latent = settings.pop("latent", torch.zeros(1, 3, 32, 32))
    out: Tensor = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, 1),
        steps,
        4.0,
        sampler,
        "normal",
        positive,
        negative,
        latent,
        disable_pbar=True,
        seed=1,
        **settings,
    )
    return out


@contextmanager
def strengths() -> Iterator[list[tuple[float, float | None]]]:
    """Noise level and strength of each model call, None where nothing was guided, as they reach model and method."""
    seen: list[tuple[float, float | None]] = []
    modules = [host.pack_module(f"nodes.{name}") for name in ("cross_attention", "block_attention")]
    calls = {"cross_attention": "guided_attention", "block_attention": "guided_joint_attention"}
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            name = calls[module.__name__.rsplit(".", 1)[1]]
            method = getattr(module, name)

            def watched(*args: Any, method: Callable[..., Tensor] = method, **kwargs: Any) -> Tensor:
                (config,) = (arg for arg in args if hasattr(arg, "strength"))
                level, strength = seen[-1]
                assert strength in (None, config.strength), "one model call with two strengths"
                seen[-1] = level, config.strength
                return method(*args, **kwargs)

            patch.setattr(module, name, watched)
        patched = host.pack_module("nodes.patch").GAGPatch
        active = patched._active

        def called(self: Any, run: Any, t: Tensor, model_sampling: Any) -> Any:
            seen.append((float(t.max()), None))
            return active(self, run, t, model_sampling)

        patch.setattr(patched, "_active", called)
        yield seen


def strengths_of(model: Any, **settings: Any) -> list[float | None]:
    with strengths() as seen:
        run(model, **settings)
    return [strength for _, strength in seen]


CURVES = {
    "linear": Curve("linear", 1.0, 0.25),
    "cosine": Curve("cosine", 0.5, 1.5, 0.2, 0.8),
    "interval": Curve("interval", 0.0, 1.0, 0.25, 0.75),
    "bump": Curve("bump", 0.0, 2.0),
    "over sigma": Curve("linear", 2.0, 0.5, 9.0, 0.2, "sigma"),
}


@pytest.mark.parametrize("name", CURVES)
def test_each_step_has_the_factor_of_its_place(name: str) -> None:
    curve = CURVES[name]
    steps = 7
    with strengths() as seen:
        run(guided(demo(), curve, strength=0.8), steps=steps)
    assert len(seen) == steps
    for step, (level, strength) in enumerate(seen):
        if curve.over == "steps":
            factor = twin(curve.kind, curve.start_value, curve.end_value, curve.start, curve.end, step / (steps - 1))
        else:
            factor = twin(curve.kind, curve.start_value, curve.end_value, -curve.start, -curve.end, -level)
        if factor == 0.0:
            assert strength is None
        else:
            assert strength == pytest.approx(0.8 * factor, rel=ROUNDING)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_what_the_model_gets_is_the_reference_at_each_steps_strength(name: str) -> None:
    factors = [1.0, 0.0, 0.3, 1.7]
    model = guided(host.build_model(name), factors)
    bounds = [0]
    with recording(model) as calls:
        host.sample(model, name, steps=4, cfg=1.0, callback=lambda *_: bounds.append(len(calls)))
    for step, factor in enumerate(factors):
        config = type(PRESETS["paper"])(**{**vars(PRESETS["paper"]), "strength": factor})
        part = calls[bounds[step] : bounds[step + 1]]
        text = [c for c in part if name == "flux" or (c.module.endswith("attn2") and ".middle_block" not in c.module)]
        assert text
        for call in text:
            if name == "flux":
                call.check(reference.guided_joint_attention(call.q, call.k, call.v, slice(0, 77), config), 20.0)
            else:
                call.check(reference.guided_attention(call.q, call.k, call.v, config), 20.0)


def test_floats_and_sigmas_are_schedules() -> None:
    model = demo()
    factors = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert strengths_of(guided(model, factors)) == factors
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 6)
    expected = [float(level / sigmas.max()) for level in sigmas[:-1].double()]
    assert strengths_of(guided(model, sigmas)) == pytest.approx(expected, rel=ROUNDING)


def test_other_numbers_of_factors_are_stretched_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = guided(demo(), [0.0, 1.0])
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        assert strengths_of(model, steps=5) == pytest.approx([None, 0.25, 0.5, 0.75, 1.0])
        assert "the schedule has 2 factors and this run 5 steps, so it is stretched over them" in caplog.text
        caplog.clear()
        assert strengths_of(model, steps=2) == [None, 1.0]
        assert strengths_of(guided(demo(), [0.5]), steps=3) == [0.5] * 3
    assert "stretched" not in caplog.text


def test_one_step_is_the_first_one() -> None:
    assert strengths_of(guided(demo(), Curve("linear", 0.5, 1.0)), steps=1) == [0.5]


def test_factors_of_1_change_nothing_and_of_0_are_off_bit_for_bit() -> None:
    model = demo()
    assert torch.equal(run(guided(model, Curve("constant", 0.0, 1.0))), run(guided(model)))
    assert torch.equal(run(guided(model, [2.0])), run(guided(model, strength=2.0)))
    assert torch.equal(run(guided(model, [0.0])), run(model))
    assert not torch.equal(run(guided(model)), run(model))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_steps_of_0_are_the_hosts_own_bit_for_bit(name: str) -> None:
    """The second half of a run with factor 0 is that of the plain model, from the same latent on."""
    model = host.build_model(name)
    states: list[tuple[Tensor, Tensor]] = []

    def keep(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        states.append((x.clone(), denoised.clone()))

    host.sample(guided(model, [1.0, 1.0, 0.0, 0.0]), name, steps=4, callback=keep)
    plain: list[Tensor] = []

    def replaced(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = executor(states[len(plain)][0], *args, **kwargs)
        plain.append(out)
        return out

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", replaced)
    host.sample(watched, name, steps=4)
    same = [torch.equal(denoised, own) for (_, denoised), own in zip(states, plain, strict=True)]
    assert same == [False, False, True, True]


# --- every sampler ------------------------------------------------------------------------------------------------

# A model whose noise is that of diffusion, and one of flow matching.
MODELS: dict[str, Callable[[], Any]] = {"demo": demo, "flux-schnell": lambda: host.build_model("flux-schnell")}


def run_of(name: str, model: Any, **settings: Any) -> Tensor:
    return run(model, **settings) if name == "demo" else host.sample(model, name, cfg=1.0, **settings)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_call_belongs_to_the_last_step_that_begins_at_its_noise_level_or_above(
    name: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every sampler of the host, whether its steps are counted or its levels read; and both give one picture."""
    steps = 5
    factors = [1.0 + step / 8 for step in range(steps)]
    model = guided(MODELS[name](), factors, preset="gentle")
    sigmas: list[float] = []

    def outer(executor: Any, noise: Tensor, latent: Tensor, sampler: Any, levels: Tensor, *args: Any, **kw: Any) -> Any:
        sigmas[:] = levels.tolist()
        return executor(noise, latent, sampler, levels, *args, **kw)

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", outer)
    with strengths() as seen:
        out = run_of(name, model, sampler=sampler, steps=steps)
    assert len(sigmas) == steps + 1
    assert len(seen) >= steps or sampler == "dpm_fast"
    for level, strength in seen:
        begun = [step for step in range(steps) if sigmas[step] >= level * (1.0 - 1e-4)]
        assert strength == factors[max(begun, default=0)], f"at {level} of {sigmas}"
    monkeypatch.setattr(host.pack_module("nodes.host"), "_ON_THE_STEPS", set())
    read = run_of(name, model, sampler=sampler, steps=steps)
    assert torch.equal(out, read)


def test_samplers_that_are_counted_are_those_of_the_host_alone() -> None:
    def sample_euler() -> None:
        """Somebody else's."""

    assert Steps(comfy.samplers.sampler_object("euler")).counted
    assert Steps(comfy.samplers.sampler_object("uni_pc")).counted
    assert not Steps(comfy.samplers.sampler_object("dpm_adaptive")).counted
    assert not Steps(comfy.samplers.KSAMPLER(sample_euler)).counted
    assert not Steps(object()).counted


@contextmanager
def waits(places: list[str]) -> Iterator[None]:
    """Note where the pack asks a tensor for its numbers, which on a GPU waits for all that it has to do."""
    pack = str(Path(str(host.PACK.__file__)).parent)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "cpu"):
            original = getattr(Tensor, name)

            def watched(self: Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                frame = sys._getframe(1)
                if frame.f_code.co_filename.startswith(f"{pack}/nodes"):
                    places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                return original(self, *args, **kwargs)

            patch.setattr(Tensor, name, watched)
        yield


@pytest.mark.parametrize(("sampler", "waits_in_each_step"), [("euler", False), ("heun", False), ("dpm_2", True)])
def test_no_step_waits_for_the_device(sampler: str, waits_in_each_step: bool) -> None:
    """Once a run is under way, with samplers whose steps can be counted; the others have their levels read."""
    model = guided(guided(demo(), Curve("linear", 1.0, 0.5), end_percent=0.6), Curve("bump"), start_percent=0.3)
    places: list[str] = []
    in_step: list[int] = []
    with waits(places):
        run(model, sampler, steps=8, callback=lambda *_: in_step.append(len(places)))
    assert in_step[0] > 0, "the run's noise levels are read at its beginning"
    later = in_step[-1] - in_step[0]
    assert (later >= 7) if waits_in_each_step else (later == 0), places


def test_levels_that_rise_are_steps_too() -> None:
    """As in unsampling: a picture's way back to noise."""
    model = guided(demo(), [0.1, 0.2, 0.3])
    sigmas = torch.tensor([0.1, 1.0, 3.0, 9.0])
    for sampler in ("euler", "dpm_2"):
        with strengths() as seen:
            run(model, sampler, sigmas=sigmas, steps=3)
        assert seen[0][1] == 0.1
        assert seen[-1][1] == 0.3
        assert {strength for _, strength in seen} == {0.1, 0.2, 0.3}


# --- runs that are parts of others --------------------------------------------------------------------------------


def test_steps_are_those_of_this_run() -> None:
    """With less denoising, between two steps, and with split sigmas the schedule is that of the steps that are run."""
    model = guided(demo(), Curve("linear", 1.0, 0.0))
    latent = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = [1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), None]
    assert strengths_of(model, steps=4, denoise=0.5, latent=latent) == expected
    assert strengths_of(model, steps=8, start_step=2, last_step=6) == expected
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 8)
    high, low = (companions.extra("nodes_custom_sampler", "SplitSigmas", sigmas=sigmas, step=4) for _ in range(2))
    assert torch.equal(high, sigmas[:5]) and torch.equal(low, high)
    for part in (sigmas[:5], sigmas[4:]):
        with strengths() as seen:
            sample_custom(model, part)
        assert [strength for _, strength in seen] == expected
        assert [level for level, _ in seen] == pytest.approx(part[:-1].tolist())


def sample_custom(model: Any, sigmas: Tensor, sampler: str = "euler") -> Tensor:
    """By the nodes for custom sampling."""
    encoder = host.run_node("GAGDemoLoader")[1]
    (positive,) = host.run_node("GAGDemoPrompt", text_encoder=encoder, text="a red circle")
    nodes = "nodes_custom_sampler"
    guider = companions.extra(nodes, "BasicGuider", model=model, conditioning=positive)
    out: dict[str, Tensor] = companions.extra(
        nodes,
        "SamplerCustomAdvanced",
        noise=companions.extra(nodes, "RandomNoise", noise_seed=3),
        guider=guider,
        sampler=companions.extra(nodes, "KSamplerSelect", sampler_name=sampler),
        sigmas=sigmas,
        latent_image={"samples": torch.zeros(1, 3, 32, 32)},
    )
    return out["samples"]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpm_adaptive"])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_ranges_stay_positions_in_the_models_noise(sampler: str, denoise: float) -> None:
    """Whatever part of it a run goes through: start_percent and end_percent mean what they do in the host's nodes."""
    model = guided(demo(), start_percent=0.3, end_percent=0.7)
    sampling = model.get_model_object("model_sampling")
    highest, lowest = (float(sampling.percent_to_sigma(percent)) for percent in (0.3, 0.7))
    with strengths() as seen:
        run(model, sampler, steps=9, denoise=denoise)
    guided_calls = [strength is not None for _, strength in seen]
    assert guided_calls == [lowest <= level <= highest for level, _ in seen]
    assert any(guided_calls) and not all(guided_calls)


@pytest.mark.parametrize("shift", [1.0, 1.15, 1.73, 3.0, 3.1, 5.0, 8.0])
@pytest.mark.parametrize("sampling_class", ["ModelSamplingDiscreteFlow", "ModelSamplingFlux"])
def test_rounding_does_not_decide_whether_a_step_is_in_range(sampling_class: str, shift: float) -> None:
    """Steps of flow models lie on round percents: with either rounding the step at the beginning or the end counts."""
    sampling = getattr(comfy.model_sampling, sampling_class)()
    sampling.set_parameters(shift=shift)
    levels = comfy.samplers.calculate_sigmas(sampling, "simple", 20)[:-1].tolist()
    for first in range(1, 19):
        highest, lowest = sigma_range(sampling, first / 20, 19 / 20)
        assert [lowest <= level <= highest for level in levels] == [first <= step for step in range(20)]


def test_a_model_called_outside_a_sampler_goes_by_its_noise() -> None:
    """There are no steps there: a share of the steps is then one of the model's whole range of noise."""
    model = guided(demo(), Curve("linear", 1.0, 2.0))
    sampling = model.get_model_object("model_sampling")
    encoder = host.run_node("GAGDemoLoader")[1]
    for percent in (0.25, 0.5, 0.9):
        sigma = float(sampling.percent_to_sigma(percent))
        with strengths() as seen, torch.no_grad():
            model.model.current_patcher = model
            model.model.apply_model(
                torch.zeros(1, 3, 32, 32),
                torch.tensor([sigma]),
                c_crossattn=encoder.encode(["a red circle"]),
                transformer_options={"wrappers": model.wrappers},
            )
        ((_, strength),) = seen
        assert strength == pytest.approx(1.0 + percent, abs=2e-3)


# --- several nodes ------------------------------------------------------------------------------------------------


def test_where_a_later_nodes_schedule_is_0_the_earlier_one_acts() -> None:
    first = guided(demo(), strength=0.4)
    both = guided(first, [1.0, 0.0, 1.0, 0.0], strength=0.9, end_percent=0.7)
    # The schedule stretched over six steps is 0 in the last one; the range ends before it.
    levels = run_levels(both)
    lowest = float(both.get_model_object("model_sampling").percent_to_sigma(0.7))
    factors = [1.0, 0.4, 0.2, 0.8, 0.6, 0.0]
    expected = [
        pytest.approx(0.9 * factor) if factor and level >= lowest else 0.4
        for factor, level in zip(factors, levels, strict=True)
    ]
    found = strengths_of(both)
    assert found == expected
    assert 0.4 in found and found[0] == 0.9


def run_levels(model: Any) -> list[float]:
    with strengths() as seen:
        run(model)
    return [level for level, _ in seen]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(host.pack_module("nodes.run"), "show_on_node", lambda text, _: texts.append(text))
    return texts


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.message for record in caplog.records if record.name == "comfyui-gag")


def test_the_counts_leave_out_steps_of_0(said: list[str]) -> None:
    run(guided(demo(), Curve("interval", 0.0, 1.0, 0.0, 0.5)))
    assert said == ["Guided 4 of 4 attentions in 3 of 6 calls."]


@pytest.mark.parametrize(
    ("settings", "where"), [({}, "of the run"), ({"start_percent": 0.2, "end_percent": 0.9}, "from 0.2 to 0.9")]
)
def test_says_that_the_schedule_is_0(
    settings: dict[str, Any], where: str, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run(guided(demo(), [0.0], **settings))
    assert said == ["Nothing guided: its schedule is 0."]
    assert f"GAG guided nothing in this run: its schedule is 0 in all steps {where}." in messages(caplog)


def test_says_that_a_later_node_acts_where_the_schedule_is_not_0(said: list[str], caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        run(guided(guided(demo(), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), [1.0]))
    assert said == ["Nothing guided: a later GAG node acts.", "Guided 4 of 4 attentions in 6 of 6 calls."]
    assert "acts in all steps of its range in which its schedule is not 0." in messages(caplog)
    assert "from 0 to 1 of the run the later one acts, except where its schedule is 0." in messages(caplog)


def test_verbose_tells_the_schedule(caplog: pytest.LogCaptureFixture) -> None:
    (model,) = host.run_advanced(model=demo(), verbose=True, schedule=Curve("bump"))
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        run(model)
    assert "Schedule: Curve(kind='bump'" in messages(caplog)


# --- compiled models ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("traceable_attention")
def test_a_compiled_model_is_not_compiled_anew_for_every_strength() -> None:
    """Torch takes a number that changes for a variable: one graph for the first strength, one for all others."""
    class_name, config = host.CONFIGS["flux"]

    def shallow() -> Any:
        return guided(
            host.build(class_name, {**config, "depth": 1, "depth_single_blocks": 1}), Curve("linear", 0.2, 1.5)
        )

    compiled = shallow()
    set_torch_compile_wrapper(compiled, backend="eager")
    out = host.sample(compiled, "flux", steps=5, cfg=1.0)
    assert_close(out, host.sample(shallow(), "flux", steps=5, cfg=1.0), error=1e-5)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
