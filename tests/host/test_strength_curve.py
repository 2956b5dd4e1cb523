# SPDX-License-Identifier: GPL-3.0-or-later
"""Schedules: their mathematics against a plain reference, and the factor of every step in real runs."""

from __future__ import annotations

import dataclasses
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
from recorder import record_calls
from tolerances import assert_close

strength_curve = host.pack_module("nodes.patching.strength_curve")
Curve, Factors, schedule_of = strength_curve.Curve, strength_curve.Factors, strength_curve.schedule_of
PRESETS = host.pack_module("nodes.presets").PRESETS
Steps = host.pack_module("nodes.patching.steps").Steps
sigma_range = host.pack_module("nodes.patching.steps").sigma_range
SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
# Relative error of a step's factor in fp64.
ROUNDING = 1e-12

VALUES = st.floats(0.0, 10.0)
SHARES = st.floats(0.0, 1.0)


# --- the mathematics ----------------------------------------------------------------------------------------------


def reference_factor(kind: str, start_value: float, end_value: float, start: float, end: float, at: float) -> float:
    """Compute the factor as docs and tooltips describe it; ``at`` grows during a run, as ``start`` and ``end`` do."""
    if kind == "constant":
        return end_value
    if kind == "interval":
        return end_value if start <= at <= end else start_value
    if at < start:
        return start_value
    if at >= end:
        return start_value if kind == "bump" else end_value
    x = (at - start) / (end - start)
    share = {"linear": x, "cosine": math.sin(math.pi * x / 2) ** 2, "bump": math.sin(math.pi * x) ** 2}[kind]
    return (1.0 - share) * start_value + share * end_value


@examples(400)
@hypothesis.given(kind=st.sampled_from(strength_curve.KINDS), values=st.tuples(VALUES, VALUES), data=st.data())
def test_every_kind_follows_its_formula_over_steps_and_over_sigma(
    kind: str, values: tuple[float, float], data: st.DataObject
) -> None:
    start, end = sorted(data.draw(st.tuples(SHARES, SHARES)))
    at = data.draw(SHARES | st.sampled_from([0.0, 1.0, start, end]))
    curve = Curve(kind, *values, start, end)
    expected = reference_factor(kind, *values, start, end, at)
    assert curve.factor(at, math.nan) == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
    # Noise falls during a run, so the same curve over noise is its mirror image.
    mirrored = Curve(kind, *values, 15.0 * (1.0 - start), 15.0 * (1.0 - end), "sigma")
    level = 15.0 * (1.0 - at)
    expected = reference_factor(kind, *values, -mirrored.start, -mirrored.end, -level)
    assert mirrored.factor(math.nan, level) == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)


@examples(200)
@hypothesis.given(kind=st.sampled_from(strength_curve.KINDS), values=st.tuples(VALUES, VALUES), at=SHARES)
def test_curves_stay_between_their_values_and_meet_them_exactly_at_the_ends(
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
def test_a_list_has_one_factor_per_step_and_is_stretched_over_other_numbers_of_steps(
    values: list[float], steps: int, data: st.DataObject
) -> None:
    factors = schedule_of(values)
    for step, value in enumerate(values):
        assert factors.factor(step / max(1, len(values) - 1), math.nan) == value
    step = data.draw(st.integers(0, steps - 1))
    share = step / max(1, steps - 1)
    expected = np.interp(share, np.linspace(0.0, 1.0, len(values)), values) if len(values) > 1 else values[0]
    assert factors.factor(share, math.nan) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_sigmas_become_shares_of_the_largest() -> None:
    sigmas = torch.tensor([8.0, 4.0, 1.0, 0.0])
    assert schedule_of(sigmas).values == (1.0, 0.5, 0.125)
    # In the first half of a split run the last level is not 0.
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
def test_a_wrong_schedule_is_refused_in_a_sentence(case: str, node_id: str) -> None:
    given, sentence = WRONG_SCHEDULES[case]
    model = host.build_model("sd15")
    before = {key: dict(entry) for key, entry in model.wrappers.items()}
    with pytest.raises((ValueError, TypeError), match=sentence) as raised:
        host.run_node(node_id, model=model, schedule=given)
    assert str(raised.value).startswith("schedule") and "\n" not in str(raised.value)
    assert {key: dict(entry) for key, entry in model.wrappers.items()} == before


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
def test_a_wrong_curve_is_refused_in_a_sentence(case: str) -> None:
    settings, sentence = WRONG_CURVES[case]
    with pytest.raises((ValueError, TypeError), match=sentence) as raised:
        host.run_node("GAGSchedule", **settings)
    assert "\n" not in str(raised.value)


# --- the node -----------------------------------------------------------------------------------------------------


@pytest.fixture
def previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", strength_curve.KINDS)
@pytest.mark.parametrize(("over", "start", "end"), [("steps", 0.2, 0.7), ("sigma", 9.0, 0.5), ("sigma", 0.0, 0.0)])
def test_the_node_returns_the_curve_and_shows_its_picture(
    kind: str, over: str, start: float, end: float, previews: Path
) -> None:
    settings = {"kind": kind, "over": over, "start_value": 0.5, "end_value": 2.0, "start": start, "end": end}
    answer = host.NODES["GAGSchedule"].execute(**settings)
    assert answer.result == (Curve(**settings),)
    (shown,) = answer.ui["images"]
    assert (previews / shown["subfolder"] / shown["filename"]).stat().st_size > 1000


@pytest.mark.usefixtures("previews")
def test_pictures_of_different_curves_differ() -> None:
    picture_of = host.pack_module("nodes.schedule").picture_of
    pictures = [picture_of(Curve(kind, 0.2, 1.0, 0.2, 0.8)) for kind in strength_curve.KINDS]
    assert all(picture.shape == (1, 300, 480, 3) for picture in pictures)
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(pictures)


def test_without_matplotlib_the_node_returns_the_schedule_without_a_picture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    answer = host.NODES["GAGSchedule"].execute(**vars(Curve()))
    assert answer.result == (Curve(),) and answer.ui is None
    assert "pip install matplotlib" in caplog.text


def test_where_no_preview_can_be_saved_the_node_returns_the_schedule(
    previews: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import folder_paths

    previews.mkdir(parents=True, exist_ok=True)
    (previews / "file").touch()
    monkeypatch.setattr(folder_paths, "temp_directory", str(previews / "file" / "temp"))
    answer = host.NODES["GAGSchedule"].execute(**vars(Curve()))
    assert answer.result == (Curve(),) and answer.ui is None
    assert "The preview of the plots could not be saved in the temporary folder: Not a directory." in caplog.text


# --- runs ---------------------------------------------------------------------------------------------------------


def demo() -> Any:
    return host.run_node("GAGDemoLoader")[0]


def guided(model: Any, schedule: Any = None, **settings: Any) -> Any:
    return host.guide(model, schedule=schedule, **{"preset": "paper", **settings})


def run(model: Any, sampler: str = "euler", steps: int = 6, **settings: Any) -> Tensor:
    """Run the demo model in the host's sampler."""
    clip = host.run_node("GAGDemoLoader")[1]
    positive, negative = (host.encode(clip, text) for text in ("a red circle", ""))
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
    """Record the noise level and the strength of each model call; the strength is None if nothing was guided.

    The noise level is the one that the model gets, and the strength the one that gag_core gets.
    """
    calls: list[tuple[float, float | None]] = []
    module = host.pack_module("nodes.patching.attention_call")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("guided_attention", "guided_joint_attention"):
            method = getattr(module, name)

            def recorded(*args: Any, method: Callable[..., Tensor] = method, **kwargs: Any) -> Tensor:
                (config,) = (arg for arg in args if hasattr(arg, "strength"))
                level, strength = calls[-1]
                assert strength in (None, config.strength), "one model call with two strengths"
                calls[-1] = level, config.strength
                return method(*args, **kwargs)

            patch.setattr(module, name, recorded)
        patched = host.pack_module("nodes.patching.patch").GAGPatch
        active = patched._active

        def called(self: Any, run: Any, t: Tensor, model_sampling: Any) -> Any:
            calls.append((float(t.max()), None))
            return active(self, run, t, model_sampling)

        patch.setattr(patched, "_active", called)
        yield calls


def strengths_of(model: Any, **settings: Any) -> list[float | None]:
    with strengths() as calls:
        run(model, **settings)
    return [strength for _, strength in calls]


CURVES = {
    "linear": Curve("linear", 1.0, 0.25),
    "cosine": Curve("cosine", 0.5, 1.5, 0.2, 0.8),
    "interval": Curve("interval", 0.0, 1.0, 0.25, 0.75),
    "bump": Curve("bump", 0.0, 2.0),
    "over sigma": Curve("linear", 2.0, 0.5, 9.0, 0.2, "sigma"),
}


@pytest.mark.parametrize("name", CURVES)
def test_each_step_has_the_factor_of_its_position(name: str) -> None:
    curve = CURVES[name]
    steps = 7
    with strengths() as calls:
        run(guided(demo(), curve, strength=0.8), steps=steps)
    assert len(calls) == steps
    for step, (level, strength) in enumerate(calls):
        if curve.over == "steps":
            factor = reference_factor(
                curve.kind, curve.start_value, curve.end_value, curve.start, curve.end, step / (steps - 1)
            )
        else:
            factor = reference_factor(curve.kind, curve.start_value, curve.end_value, -curve.start, -curve.end, -level)
        if factor == 0.0:
            assert strength is None
        else:
            assert strength == pytest.approx(0.8 * factor, rel=ROUNDING)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_model_gets_the_reference_output_at_each_steps_strength(name: str) -> None:
    factors = [1.0, 0.0, 0.3, 1.7]
    model = guided(host.build_model(name), factors)
    step_ends = [0]
    with record_calls(model) as calls:
        host.sample(model, name, steps=4, cfg=1.0, callback=lambda *_: step_ends.append(len(calls)))
    for step, factor in enumerate(factors):
        config = dataclasses.replace(PRESETS["paper"].config, strength=factor)
        part = calls[step_ends[step] : step_ends[step + 1]]
        text = [c for c in part if name == "flux" or (c.module.endswith("attn2") and ".middle_block" not in c.module)]
        assert text
        for call in text:
            if name == "flux":
                call.check(reference.guided_joint_attention(call.q, call.k, call.v, slice(0, 77), config), 20.0)
            else:
                call.check(reference.guided_attention(call.q, call.k, call.v, config), 20.0)


def test_floats_and_sigmas_can_be_schedules() -> None:
    model = demo()
    factors = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert strengths_of(guided(model, factors)) == factors
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 6)
    expected = [float(level / sigmas.max()) for level in sigmas[:-1].double()]
    assert strengths_of(guided(model, sigmas)) == pytest.approx(expected, rel=ROUNDING)


def test_another_number_of_factors_is_stretched_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = guided(demo(), [0.0, 1.0])
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        assert strengths_of(model, steps=5) == pytest.approx([None, 0.25, 0.5, 0.75, 1.0])
        assert "the schedule has 2 factors and this run 5 steps, so it is stretched over them" in caplog.text
        caplog.clear()
        assert strengths_of(model, steps=2) == [None, 1.0]
        assert strengths_of(guided(demo(), [0.5]), steps=3) == [0.5] * 3
    assert "stretched" not in caplog.text


def test_a_single_step_has_the_first_factor() -> None:
    assert strengths_of(guided(demo(), Curve("linear", 0.5, 1.0)), steps=1) == [0.5]


def test_factor_1_changes_nothing_and_factor_0_is_off_bit_for_bit() -> None:
    model = demo()
    assert torch.equal(run(guided(model, Curve("constant", 0.0, 1.0))), run(guided(model)))
    assert torch.equal(run(guided(model, [2.0])), run(guided(model, strength=2.0)))
    assert torch.equal(run(guided(model, [0.0])), run(model))
    assert not torch.equal(run(guided(model)), run(model))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_steps_with_factor_0_are_the_hosts_own_bit_for_bit(name: str) -> None:
    """With factor 0 in the second half, the plain model makes the same predictions there from the same latents."""
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

    plain_model = model.clone()
    plain_model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", replaced)
    host.sample(plain_model, name, steps=4)
    is_same = [torch.equal(denoised, own) for (_, denoised), own in zip(states, plain, strict=True)]
    assert is_same == [False, False, True, True]


# --- every sampler ------------------------------------------------------------------------------------------------

# A model of diffusion, and a model of flow matching.
MODELS: dict[str, Callable[[], Any]] = {"demo": demo, "flux-schnell": lambda: host.build_model("flux-schnell")}


def run_model(name: str, model: Any, **settings: Any) -> Tensor:
    return run(model, **settings) if name == "demo" else host.sample(model, name, cfg=1.0, **settings)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_call_belongs_to_the_last_step_that_begins_at_its_noise_level_or_above(
    name: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds for every sampler of the host. Counted steps and levels read from the device give the same picture."""
    steps = 5
    factors = [1.0 + step / 8 for step in range(steps)]
    model = guided(MODELS[name](), factors, preset="no CFG", strength=2.0)
    sigmas: list[float] = []

    def outer(executor: Any, noise: Tensor, latent: Tensor, sampler: Any, levels: Tensor, *args: Any, **kw: Any) -> Any:
        sigmas[:] = levels.tolist()
        return executor(noise, latent, sampler, levels, *args, **kw)

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", outer)
    with strengths() as calls:
        out = run_model(name, model, sampler=sampler, steps=steps)
    assert len(sigmas) == steps + 1
    assert len(calls) >= steps or sampler == "dpm_fast"
    for level, strength in calls:
        begun = [step for step in range(steps) if sigmas[step] >= level * (1.0 - 1e-4)]
        assert strength == factors[max(begun, default=0)], f"at {level} of {sigmas}"
    monkeypatch.setattr(host.pack_module("nodes.patching.steps"), "_SAMPLERS_ON_STEPS", set())
    out_by_levels = run_model(name, model, sampler=sampler, steps=steps)
    assert torch.equal(out, out_by_levels)


def test_only_the_hosts_own_samplers_are_counted() -> None:
    def sample_euler() -> None:
        """A sampler of another pack with the name of a host sampler."""

    assert Steps(comfy.samplers.sampler_object("euler")).is_counted
    assert Steps(comfy.samplers.sampler_object("uni_pc")).is_counted
    assert not Steps(comfy.samplers.sampler_object("dpm_adaptive")).is_counted
    assert not Steps(comfy.samplers.KSAMPLER(sample_euler)).is_counted
    assert not Steps(object()).is_counted


@contextmanager
def record_waits(lines: list[str]) -> Iterator[None]:
    """Record the lines of the pack that read a tensor's values, which waits for the device on a GPU."""
    pack = str(Path(str(host.PACK.__file__)).parent)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "cpu"):
            original = getattr(Tensor, name)

            def recorded(self: Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                frame = sys._getframe(1)
                if frame.f_code.co_filename.startswith(f"{pack}/nodes"):
                    lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                return original(self, *args, **kwargs)

            patch.setattr(Tensor, name, recorded)
        yield


@pytest.mark.parametrize(("sampler", "waits_in_each_step"), [("euler", False), ("heun", False), ("dpm_2", True)])
def test_no_step_waits_for_the_device(sampler: str, waits_in_each_step: bool) -> None:
    """Holds after the first step, with samplers whose steps can be counted. With others the noise level is read."""
    model = guided(guided(demo(), Curve("linear", 1.0, 0.5), end_percent=0.6), Curve("bump"), start_percent=0.3)
    lines: list[str] = []
    waits_so_far: list[int] = []
    with record_waits(lines):
        run(model, sampler, steps=8, callback=lambda *_: waits_so_far.append(len(lines)))
    assert waits_so_far[0] > 0, "the run's noise levels are read at its beginning"
    later = waits_so_far[-1] - waits_so_far[0]
    assert (later >= 7) if waits_in_each_step else (later == 0), lines


def test_rising_noise_levels_are_steps_too() -> None:
    """Noise rises in unsampling, which turns a picture back into noise."""
    model = guided(demo(), [0.1, 0.2, 0.3])
    sigmas = torch.tensor([0.1, 1.0, 3.0, 9.0])
    for sampler in ("euler", "dpm_2"):
        with strengths() as calls:
            run(model, sampler, sigmas=sigmas, steps=3)
        assert calls[0][1] == 0.1
        assert calls[-1][1] == 0.3
        assert {strength for _, strength in calls} == {0.1, 0.2, 0.3}


# --- runs that are parts of others --------------------------------------------------------------------------------


def test_a_schedule_covers_the_steps_of_its_own_run() -> None:
    """With denoise below 1, with first and last step, and with split sigmas the schedule covers the steps that run."""
    model = guided(demo(), Curve("linear", 1.0, 0.0))
    latent = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = [1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), None]
    assert strengths_of(model, steps=4, denoise=0.5, latent=latent) == expected
    assert strengths_of(model, steps=8, start_step=2, last_step=6) == expected
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 8)
    high, low = (
        companions.run_host_node("nodes_custom_sampler", "SplitSigmas", sigmas=sigmas, step=4) for _ in range(2)
    )
    assert torch.equal(high, sigmas[:5]) and torch.equal(low, high)
    for part in (sigmas[:5], sigmas[4:]):
        with strengths() as calls:
            sample_custom(model, part)
        assert [strength for _, strength in calls] == expected
        assert [level for level, _ in calls] == pytest.approx(part[:-1].tolist())


def sample_custom(model: Any, sigmas: Tensor, sampler: str = "euler") -> Tensor:
    """Sample with the host's nodes for custom sampling."""
    positive = host.encode(host.run_node("GAGDemoLoader")[1], "a red circle")
    nodes = "nodes_custom_sampler"
    guider = companions.run_host_node(nodes, "BasicGuider", model=model, conditioning=positive)
    out: dict[str, Tensor] = companions.run_host_node(
        nodes,
        "SamplerCustomAdvanced",
        noise=companions.run_host_node(nodes, "RandomNoise", noise_seed=3),
        guider=guider,
        sampler=companions.run_host_node(nodes, "KSamplerSelect", sampler_name=sampler),
        sigmas=sigmas,
        latent_image={"samples": torch.zeros(1, 3, 32, 32)},
    )
    return out["samples"]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpm_adaptive"])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_ranges_are_positions_in_the_models_whole_range_of_noise(sampler: str, denoise: float) -> None:
    """A run over a part of the noise does not change that. The host's nodes use start_percent and end_percent alike."""
    model = guided(demo(), start_percent=0.3, end_percent=0.7)
    sampling = model.get_model_object("model_sampling")
    highest, lowest = (float(sampling.percent_to_sigma(percent)) for percent in (0.3, 0.7))
    with strengths() as calls:
        run(model, sampler, steps=9, denoise=denoise)
    guided_calls = [strength is not None for _, strength in calls]
    assert guided_calls == [lowest <= level <= highest for level, _ in calls]
    assert any(guided_calls) and not all(guided_calls)


@pytest.mark.parametrize("shift", [1.0, 1.15, 1.73, 3.0, 3.1, 5.0, 8.0])
@pytest.mark.parametrize("sampling_class", ["ModelSamplingDiscreteFlow", "ModelSamplingFlux"])
def test_steps_at_the_ends_of_a_range_are_in_it_despite_rounding(sampling_class: str, shift: float) -> None:
    """Steps of flow models lie at round percents. The steps at both ends of the range count, however rounded."""
    sampling = getattr(comfy.model_sampling, sampling_class)()
    sampling.set_parameters(shift=shift)
    levels = comfy.samplers.calculate_sigmas(sampling, "simple", 20)[:-1].tolist()
    for first in range(1, 19):
        highest, lowest = sigma_range(sampling, first / 20, 19 / 20)
        assert [lowest <= level <= highest for level in levels] == [first <= step for step in range(20)]


def test_outside_a_sampler_the_position_comes_from_the_noise_level() -> None:
    """Without steps, a share of the steps is a share of the model's whole range of noise."""
    model = guided(demo(), Curve("linear", 1.0, 2.0))
    sampling = model.get_model_object("model_sampling")
    context = host.encode(host.run_node("GAGDemoLoader")[1], "a red circle")[0][0]
    for percent in (0.25, 0.5, 0.9):
        sigma = float(sampling.percent_to_sigma(percent))
        with strengths() as calls, torch.no_grad():
            model.model.current_patcher = model
            model.model.apply_model(
                torch.zeros(1, 3, 32, 32),
                torch.tensor([sigma]),
                c_crossattn=context,
                transformer_options={"wrappers": model.wrappers},
            )
        ((_, strength),) = calls
        assert strength == pytest.approx(1.0 + percent, abs=2e-3)


# --- several nodes ------------------------------------------------------------------------------------------------


def test_the_earlier_node_acts_in_steps_in_which_the_later_schedule_is_0() -> None:
    first = guided(demo(), strength=0.4)
    both = guided(first, [1.0, 0.0, 1.0, 0.0], strength=0.9, end_percent=0.7)
    # The schedule stretched over six steps is 0 in the last one; the range ends before it.
    levels = noise_levels(both)
    lowest = float(both.get_model_object("model_sampling").percent_to_sigma(0.7))
    factors = [1.0, 0.4, 0.2, 0.8, 0.6, 0.0]
    expected = [
        pytest.approx(0.9 * factor) if factor and level >= lowest else 0.4
        for factor, level in zip(factors, levels, strict=True)
    ]
    actual = strengths_of(both)
    assert actual == expected
    assert 0.4 in actual and actual[0] == 0.9


def noise_levels(model: Any) -> list[float]:
    with strengths() as calls:
        run(model)
    return [level for level, _ in calls]


def test_the_counts_leave_out_steps_with_factor_0(node_texts: list[str]) -> None:
    run(guided(demo(), Curve("interval", 0.0, 1.0, 0.0, 0.5)))
    assert node_texts == ["Guided 4 of 4 attentions in 3 of 6 calls."]


@pytest.mark.parametrize(
    ("settings", "stretch"), [({}, "of the run"), ({"start_percent": 0.2, "end_percent": 0.9}, "from 0.2 to 0.9")]
)
def test_the_node_and_the_log_say_that_the_schedule_is_0(
    settings: dict[str, Any], stretch: str, node_texts: list[str], log_messages: Callable[[], str]
) -> None:
    run(guided(demo(), [0.0], **settings))
    assert node_texts == ["Nothing guided: its schedule is 0."]
    assert f"GAG guided nothing in this run: its schedule is 0 in all steps {stretch}." in log_messages()


def test_the_log_says_that_a_later_node_acts_except_where_its_schedule_is_0(
    node_texts: list[str], caplog: pytest.LogCaptureFixture, log_messages: Callable[[], str]
) -> None:
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        run(guided(guided(demo(), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), [1.0]))
    assert node_texts == ["Nothing guided: a later GAG node acts.", "Guided 4 of 4 attentions in 6 of 6 calls."]
    assert "acts in all steps of its range in which its schedule is not 0." in log_messages()
    assert "from 0 to 1 of the run the later one acts, except where its schedule is 0." in log_messages()


def test_verbose_logs_the_schedule(caplog: pytest.LogCaptureFixture, log_messages: Callable[[], str]) -> None:
    (model,) = host.run_advanced(model=demo(), verbose=True, schedule=Curve("bump"))
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        run(model)
    assert "Schedule: Curve(kind='bump'" in log_messages()


# --- compiled models ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("traceable_attention")
def test_a_model_is_not_compiled_again_for_every_strength() -> None:
    """Torch makes a changing number a variable: one graph for the first strength, and one for all others."""
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
