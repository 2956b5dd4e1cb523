# SPDX-License-Identifier: GPL-3.0-or-later
"""The probe in real runs: its measures equal a plain fp64 reference, and pictures do not change."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy import sd1_clip, sdxl_clip
from comfy.text_encoders import flux as flux_text
from comfy.text_encoders import sd3_clip
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import companions
import host_process as host
import measures_reference
import reference
from recorder import Call, record_calls
from transformers_of_host import TRANSFORMERS

probe_module = host.pack_module("nodes.probe")
recorder_module = host.pack_module("nodes.patching.recorder")
measurements = host.pack_module("nodes.patching.measurements")
measures = host.pack_module("gag_core.measures")
GuidanceConfig = host.pack_module("gag_core").GuidanceConfig
DEFAULT = host.pack_module("nodes.presets").DEFAULT.config
NAMES = list(measures.MEASURES)
# One model for each way in which the text is found: attn2, wrapped blocks, a watched module, a measured stream, and the
# inputs of the model call.
MODELS = ["sd15", "sdxl", "flux", "wan-t2v", "mochi", "stable-cascade"]
LATER = ["minimax-h3-reference", "hidream-o1-edit", "qwen-image-2.1-edit", "sensenova", "ming-image-edit"]
MODELS += [name for name in LATER if name in TRANSFORMERS]


def probed(model: Any, **inputs: Any) -> tuple[Any, Any]:
    out: tuple[Any, Any] = host.run_node("GAGProbe", model=model, **inputs)
    return out


def guided(model: Any, **inputs: Any) -> Any:
    (out,) = host.run_advanced(model=model, **inputs)
    return out


def sample(model: Any, name: str, **settings: Any) -> Tensor:
    if name in TRANSFORMERS and name not in host.CONFIGS:
        return TRANSFORMERS[name].sample(model, **settings)
    return host.sample(model, name, **settings)


def measures_at(result: Any, branch: int, layer: int, step: int) -> dict[str, float]:
    """Return the measures of one branch, layer and step, by name."""
    return dict(zip(NAMES, result.values[branch, layer, step].tolist(), strict=True))


# --- values -------------------------------------------------------------------------------------------------------


def reads_text(name: str, call: Call) -> bool:
    """Return True for a call of a text attention."""
    if name in ("sd15", "sdxl"):
        return call.module.endswith("attn2")
    return name in host.CONFIGS or TRANSFORMERS[name].reads_text(call, 12)


def expected_measures(name: str, call: Call, config: Any, tokens: int) -> dict[str, list[float]]:
    """Compute the measures of a call in fp64: for each measure, the value of each row."""
    if name in ("sd15", "sdxl", "wan-t2v"):
        picked = measures.sample_queries(call.q.shape[2], recorder_module.sample_size(call.q.shape[1]))
        return measures_reference.measures(call.q[:, :, picked], call.k, call.v, config)
    tiny, keys = TRANSFORMERS[name], call.k.shape[2]
    text = tiny.text(keys, tokens)
    words, image = reference.text_indices(text, keys), reference.image_queries(text, call.q.shape[2], keys)
    if tiny.sound is not None:  # the video's tokens are the last
        image = image[-math.prod(tiny.latent[1:]) // tiny.patch**2 :]
    q = call.q[:, :, image[measures.sample_queries(len(image), recorder_module.sample_size(call.q.shape[1]))]]
    mass = reference.text_mass(q, call.k, text, mask=call.mask)
    return measures_reference.measures(q, call.k[:, :, words], call.v[:, :, words], config, mass=mass)


def check_run(name: str, model: Any, probe: Any, config: Any, **settings: Any) -> int:
    """Assert that the measures of a run equal the reference in every layer, step and branch; return their number."""
    order: list[list[int]] = []

    def watch(apply: Any, args: dict[str, Any]) -> Tensor:
        order.append(args["cond_or_uncond"])
        out: Tensor = apply(args["input"], args["timestep"], **args["c"])
        return out

    clone = model.clone()
    clone.set_model_unet_function_wrapper(watch)
    with record_calls(clone) as calls:
        sample(clone, name, **settings)
    result = probe.result
    texts = [call for call in calls if reads_text(name, call)]
    layers = len(result.layers)
    assert len(texts) == layers * len(order) > 0
    checked = 0
    for index, call in enumerate(texts):
        model_call, layer = divmod(index, layers)
        expected = expected_measures(name, call, config, 77 if name in host.CONFIGS else 12)
        kinds = order[model_call]
        size = call.q.shape[0] // len(kinds)
        for branch in set(kinds):
            rows = [p * size + i for p, kind in enumerate(kinds) if kind == branch for i in range(size)]
            step = sum(branch in earlier for earlier in order[:model_call])
            actual = measures_at(result, branch, layer, step)
            for measure, values in expected.items():
                mean = sum(values[row] for row in rows) / len(rows)
                assert actual[measure] == pytest.approx(mean, rel=1e-3, abs=1e-3), (measure, layer, step, branch)
            checked += 1
    assert checked == int((~result.values[..., 0].isnan()).sum())
    return checked


@pytest.mark.parametrize("name", MODELS)
def test_all_measures_of_a_guided_run_are_right(name: str) -> None:
    model, probe = probed(guided(companions.build(name), norm_threshold=0.7, guidance_scale=2.0))
    config = GuidanceConfig(norm_threshold=0.7, guidance_scale=2.0)
    checked = check_run(name, model, probe, config, cfg=4.0)
    assert checked == 2 * 2 * len(probe.result.layers)
    assert probe.result.guided[0].any()


@pytest.mark.parametrize("name", MODELS)
def test_all_measures_without_guidance_are_for_the_default_preset(name: str) -> None:
    model, probe = probed(companions.build(name))
    check_run(name, model, probe, DEFAULT, cfg=1.0)
    assert not probe.result.guided.any()
    assert probe.result.values[1].isnan().all()


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_measures_of_a_larger_picture_are_from_a_sample(name: str) -> None:
    model, probe = probed(host.build_model(name))
    check_run(name, model, probe, DEFAULT, size=(26, 34), steps=1, cfg=1.0)


def test_measures_of_a_batch_are_averaged() -> None:
    model, probe = probed(guided(host.build_model("sd15"), merge_heads=True, norm_mode="relative", norm_threshold=0.2))
    config = GuidanceConfig(merge_heads=True, norm_mode="relative", norm_threshold=0.2)
    check_run("sd15", model, probe, config, batch=2, steps=1)


def test_prompts_of_different_lengths_are_measured_in_their_own_length() -> None:
    """The host repeats the shorter prompt to batch both; its tokens count once."""
    prompts: dict[str, Any] = {
        "positive": host.conditioning("sd15", 10, 154),
        "negative": host.conditioning("sd15", 11, 77),
    }
    together, probe = probed(guided(host.build_model("sd15"), norm_threshold=0.7, guidance_scale=2.0))
    host.sample(together, "sd15", steps=1, **prompts)
    alone, probe_alone = probed(guided(host.build_model("sd15"), norm_threshold=0.7, guidance_scale=2.0))
    host.sample(alone, "sd15", steps=1, cfg=1.0, positive=prompts["negative"])
    # Rounding may put a single token on the other side of the cap.
    torch.testing.assert_close(probe.result.values[1], probe_alone.result.values[0], rtol=1e-3, atol=0.01)
    assert not torch.allclose(probe.result.values[0], probe.result.values[1], rtol=1e-2)


def test_layers_have_the_names_of_the_blocks_syntax() -> None:
    for name in ("sdxl", "flux", "wan-t2v"):
        model, probe = probed(companions.build(name))
        sample(model, name, cfg=1.0)
        assert len(set(probe.result.layers)) == len(probe.result.layers)
        for index, layer in enumerate(probe.result.layers):
            only, check = probed(guided(companions.build(name), blocks=layer))
            if index in (0, len(probe.result.layers) - 1):
                sample(only, name, cfg=1.0)
                assert check.result.guided.any(dim=2)[0].nonzero().flatten().tolist() == [index]


# --- nothing else changes -----------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "off": {},
    "paper": {"guidance_scale": 10.0},
    "in a range": {"start_percent": 0.0, "end_percent": 0.3},
    "positive only": {"apply_to": "positive"},
    "one block": {"blocks": "1"},
    "strength 0": {"strength": 0.0},
}


@pytest.mark.parametrize("words", [False, True], ids=["numbers", "words"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["sd15", "flux", "wan-t2v", "mochi", "stable-cascade"])
def test_the_picture_does_not_change_by_a_bit(
    name: str, setting: str, words: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(SETTINGS[setting])
    if name == "sd15" and "blocks" in settings:
        settings["blocks"] = "d1"
    monkeypatch.setattr(probe_module, "find_words", lambda *_: (measurements.Word("red", (1, 2)),) if words else ())
    model = companions.build(name)
    plain = guided(model, **settings) if settings else model
    out = sample(plain, name, cfg=4.0)
    first, before = probed(plain)
    assert torch.equal(sample(first, name, cfg=4.0), out)
    last, after = probed(model)
    last = guided(last, **settings) if settings else last
    assert torch.equal(sample(last, name, cfg=4.0), out)
    assert before.result.guided.any() == (setting not in ("off", "strength 0"))
    if setting != "strength 0":  # strength 0 leaves no patch, so a probe after it measures for the defaults
        assert torch.equal(before.result.values.nan_to_num(-1.0), after.result.values.nan_to_num(-1.0))
    assert torch.equal(before.result.guided, after.result.guided)
    assert torch.equal(sample(plain, name, cfg=4.0), out)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_each_step_is_measured_with_the_settings_of_the_node_that_acts(name: str) -> None:
    """The model has two nodes with ranges, and two probes with the same measures."""
    model = host.build_model(name)
    model, first = probed(guided(model, end_percent=0.4, guidance_scale=1.0))
    model, last = probed(guided(model, start_percent=0.6, guidance_scale=9.0, apply_to="positive"))
    host.sample(model, name, steps=6)
    assert torch.equal(first.result.values, last.result.values)
    result = last.result
    acted = result.guided.any(dim=1)
    positive, negative = acted.tolist()
    assert positive[0] and positive[-1] and not all(positive)
    assert negative[0] and not negative[-1]
    assert {settings.guidance_scale for settings in result.settings} == {1.0, 9.0}
    assert [bool(strength) for strength in result.strengths] == positive
    assert not result.values.isnan().any()


def test_the_factors_of_a_schedule_are_measured_step_by_step() -> None:
    (schedule,) = host.run_node("GAGSchedule", kind="linear", start_value=1.0, end_value=0.0)[:1]
    (model,) = host.run_advanced(model=host.build_model("sd15"), schedule=schedule)
    model, probe = probed(model)
    host.sample(model, "sd15", steps=5)
    assert probe.result.strengths == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))
    assert probe.result.guided[0].any(dim=0).tolist() == [True, True, True, True, False]
    assert len(probe.result.settings) == 1


@pytest.mark.parametrize(
    "levels", [(0.1, 1.0, 3.0, 6.0, 9.0), (9.0, 2.0, 0.5, 2.0, 0.5, 0.0)], ids=["rising", "restart"]
)
def test_steps_stay_in_order_if_the_noise_does_not_fall(levels: tuple[float, ...]) -> None:
    """Noise rises with FlipSigmas, and in schedules that return to more noise and continue from there."""
    factors = [1.0, 0.75, 0.5, 0.25, 0.125][: len(levels) - 1]
    (model,) = host.run_advanced(model=host.build_model("sd15"), strength=1.0, schedule=factors)
    model, probe = probed(model)
    host.sample(model, "sd15", sigmas=torch.tensor(levels))
    assert probe.result.sigmas == pytest.approx(levels[:-1])
    assert probe.result.strengths == pytest.approx(factors)
    assert not probe.result.values[..., 0].isnan().any()


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s_ancestral", "uni_pc", "dpm_fast", "lcm"])
def test_measuring_works_with_other_samplers(sampler: str) -> None:
    model, probe = probed(host.build_model("sd15"))
    plain = host.sample(host.build_model("sd15"), "sd15", steps=4, sampler=sampler)
    assert torch.equal(host.sample(model, "sd15", steps=4, sampler=sampler), plain)
    empty = probe.result.values[..., 0].isnan().all(dim=(0, 1))
    assert not empty.all()
    assert not empty.any() or sampler == "dpm_fast"  # dpm_fast chooses its own steps


@pytest.mark.parametrize("is_adapter", [True, False], ids=["image adapter", "attention override"])
def test_adapters_and_attention_of_other_nodes_are_measured_and_do_not_change(is_adapter: bool) -> None:
    """Their output stays the same, and the text attention is measured."""
    plain, alone = probed(host.build_model("sd15"))
    host.sample(plain, "sd15", steps=1)
    model = host.build_model("sd15")
    if is_adapter:
        beside = companions.ImageAdapter().on(model, "input", 1)
    else:
        beside = companions.ForeignAttention().on_the_model(model)
    out = host.sample(beside, "sd15", steps=1)
    measured, probe = probed(beside)
    assert torch.equal(host.sample(measured, "sd15", steps=1), out)
    assert probe.result.layers == alone.result.layers
    # An adapter does not change the first text attention. An override does: it halves the self-attention before it.
    first, first_alone = probe.result.values[:, 0], alone.result.values[:, 0]
    assert torch.allclose(first, first_alone, rtol=1e-4, atol=1e-5) == is_adapter
    assert not torch.allclose(probe.result.values, alone.result.values, rtol=1e-4, atol=1e-5)


# --- results after a run --------------------------------------------------------------------------------


class StopHereError(Exception):
    """Raised by a test in the middle of a run."""


@pytest.mark.parametrize("error", [StopHereError, comfy.model_management.InterruptProcessingException])
def test_a_failed_run_keeps_the_earlier_result(error: type[BaseException]) -> None:
    model, probe = probed(host.build_model("sd15"))
    out = host.sample(model, "sd15")
    before = probe.result

    def stop(step: int, *_: Any) -> None:
        raise error

    with pytest.raises(error):
        host.sample(model, "sd15", callback=stop)
    assert probe.result is before
    assert torch.equal(host.sample(model, "sd15"), out)
    assert probe.result is not before
    assert torch.equal(probe.result.values, before.values)


def test_the_next_run_replaces_the_result() -> None:
    model, probe = probed(host.build_model("sd15"))
    before: Any = probe.result
    assert before is None
    host.sample(model, "sd15", seed=1)
    first = probe.result
    host.sample(model, "sd15", seed=2, steps=3)
    assert probe.result.values.shape[2] == 3
    assert first.values.shape[2] == 2
    assert not torch.equal(first.values[:, :, 0], probe.result.values[:, :, 0])


def test_only_the_measures_of_a_run_outlive_it() -> None:
    model, probe = probed(guided(host.build_model("sd15")))
    gc.collect()
    gc.disable()
    try:
        host.sample(model, "sd15")
        names = ("Run", "Recording", "CallRecording", "_Sample", "Measured", "GuidedUNet", "TextLayers")
        left = [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in names]
    finally:
        gc.enable()
    assert not left
    result = probe.result
    assert sum(t.numel() * t.element_size() for t in (result.values, result.guided)) < 4096


def test_the_node_says_how_much_it_measured(node_texts: list[str]) -> None:
    model, probe = probed(host.build_model("sd15"))
    host.sample(model, "sd15", steps=3)
    empty = host.conditioning("sd15", 10, tokens=0)
    host.sample(model, "sd15", positive=empty, negative=empty)
    assert node_texts == ["Measured 7 attentions in 3 model calls.", "Nothing measured: no text attention ran."]
    assert probe.result.layers == ()


def test_an_input_that_is_not_a_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^GAG needs a diffusion model, got \w+; connect the output MODEL of a model loader\.$"
    ):
        host.run_node("GAGProbe", model=None)


# --- other processes and copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_pickled_patch_works_and_has_no_results(name: str) -> None:
    model, probe = probed(guided(host.build_model(name)))
    installed = model.wrappers, model.model_options
    before = pickle.dumps(installed)
    out = host.sample(model, name)
    assert pickle.dumps(installed) == before, "a run left something on the model"
    assert probe.result is not None
    there = host.build_model(name)
    there.wrappers, there.model_options = pickle.loads(before)
    assert torch.equal(host.sample(there, name), out)
    (wrapper,) = there.get_wrappers("apply_model", "comfyui-gag")
    (copied,) = wrapper.__self__.probes
    assert copied is not probe
    assert torch.equal(copied.result.values, probe.result.values)
    assert copy.deepcopy(probe).result is None


# --- on the device ------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses operations that wait for a device: reading values, and shapes that depend on values."""

    waits = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sd15", "flux", "wan-t2v"])
def test_measuring_does_not_wait_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    def without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            entered.append(function.__name__)
            with NoWaiting():  # type: ignore[no-untyped-call]
                return function(*args, **kwargs)

        return inner

    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():  # type: ignore[no-untyped-call]
        float(torch.ones(1))
    call, run = recorder_module.CallRecording, recorder_module.Recording
    methods = (
        (call, "__init__"),
        (call, "cross"),
        (call, "joint"),
        (run, "add"),
        (recorder_module, "_measure_together"),
    )
    for owner, method in methods:
        monkeypatch.setattr(owner, method, without_waiting(getattr(owner, method)))
    monkeypatch.setattr(probe_module, "find_words", lambda *_: (measurements.Word("red", (1, 2)),))
    model, probe = probed(companions.build(name))
    sample(model, name, cfg=4.0)
    assert {"__init__", "add", "_measure_together"} < set(entered)
    assert ("cross" if name != "flux" else "joint") in entered
    assert probe.result.layers


@pytest.mark.parametrize("limit", [0, 100_000])
def test_the_size_of_samples_that_wait_is_limited(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small limit, samples are measured at once or after some steps, with the same result."""
    model, probe = probed(host.build_model("sdxl"))
    host.sample(model, "sdxl", steps=4)
    together = probe.result.values
    sizes: list[list[int]] = []
    measure_together = recorder_module._measure_together

    def recorded(waiting: list[Any]) -> Any:
        sizes.append([sample.nbytes for sample in waiting])
        return measure_together(waiting)

    monkeypatch.setattr(recorder_module, "_measure_together", recorded)
    monkeypatch.setattr(recorder_module, "_MAX_WAITING_BYTES", limit)
    host.sample(model, "sdxl", steps=4)
    # Samples that waited before, those of one model call, and the attention that exceeded the limit.
    assert max(map(sum, sizes)) <= 2 * limit + max(size for waited in sizes for size in waited)
    assert len(sizes) > 3 if limit else max(map(len, sizes)) == 1
    torch.testing.assert_close(probe.result.values, together, rtol=1e-5, atol=1e-6)


def test_measures_of_prompts_that_run_one_by_one_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = probed(guided(host.build_model("sd15"), guidance_scale=1.0, norm_threshold=0.1))
    host.sample(model, "sd15", steps=1, batch=2)
    together = probe.result
    monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 2**60)
    host.sample(model, "sd15", steps=1, batch=2)
    assert (together.calls, probe.result.calls) == (1, 2)
    torch.testing.assert_close(probe.result.values, together.values, rtol=1e-3, atol=0.01)
    assert torch.equal(probe.result.guided, together.guided)


@pytest.mark.usefixtures("traceable_attention")
@pytest.mark.parametrize("words", [False, True], ids=["numbers", "words"])
@pytest.mark.parametrize("name", ["sd15", "flux", "wan-t2v"])
def test_a_compiled_model_gives_the_same_picture_and_measures(
    name: str, words: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is compiled once, or runs uncompiled if the host compiles without guards."""
    monkeypatch.setattr(probe_module, "find_words", lambda *_: (measurements.Word("red", (1, 2)),) if words else ())
    compiled = companions.host_patch("nodes_torch_compile", "TorchCompileModel", backend="eager")
    shallow: dict[str, Any] = {
        "sd15": {
            "channel_mult": [1],
            "num_res_blocks": [1],
            "transformer_depth": [1],
            "transformer_depth_output": [1, 0],
        },
        "flux": {"depth": 1, "depth_single_blocks": 1},
    }

    def build() -> Any:
        if name not in shallow:
            return companions.build(name)
        class_name, config = host.CONFIGS[name]
        return host.build(class_name, {**config, **shallow[name]})

    eager, expected_probe = probed(guided(build(), end_percent=0.1))
    expected_out = sample(eager, name)
    model, probe = probed(guided(compiled(build()), end_percent=0.1))
    assert torch.equal(sample(model, name), expected_out)
    graph_count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (graph_count == 0) == ("in which GAG acts or GAG Probe measures run uncompiled" in caplog.text)
    assert torch.equal(sample(model, name), expected_out)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graph_count, "compiled anew in the second run"
    torch.testing.assert_close(probe.result.values, expected_probe.result.values, equal_nan=True)
    assert torch.equal(probe.result.guided, expected_probe.result.guided)
    assert bool(probe.result.maps) == words
    for (maps, count), (expected_maps, expected_count) in zip(
        probe.result.maps, expected_probe.result.maps, strict=True
    ):
        assert count == expected_count
        torch.testing.assert_close(maps, expected_maps)


# --- words --------------------------------------------------------------------------------------------------------


class Clip:
    """A loaded text encoder without weights: the host's own tokenizer, and the names of the encoders."""

    def __init__(self, tokenizer: Any, *parts: str) -> None:
        self.tokenizer = tokenizer
        self.cond_stage_model = type("Parts", (), {name: object() for name in parts})()

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)


def words_of(clip: Clip, name: str, word: Any) -> str:
    """Return the text of the tokens of a word in an encoder."""
    stream = [token for chunk in clip.tokenize(PROMPT)[name] for token, _ in chunk]
    inner = getattr(clip.tokenizer, f"clip_{name}" if len(name) == 1 else name)
    pieces = [inner.inv_vocab[stream[index]] for index in word]
    return "".join(pieces).replace("</w>", " ").replace("▁", " ").strip()


PROMPT = "A (red:1.3) strawberry, left of a \\(rare\\) counterrevolutionary berry and A RED hat"
CLIPS: dict[str, Callable[[], tuple[Clip, str]]] = {
    "sd15": lambda: (Clip(sd1_clip.SD1Tokenizer()), "l"),
    "sdxl": lambda: (Clip(sdxl_clip.SDXLTokenizer(), "clip_l", "clip_g"), "l"),
    "flux": lambda: (Clip(flux_text.FluxTokenizer(), "clip_l", "t5xxl"), "t5xxl"),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_the_tokens_of_words_are_found(kind: str) -> None:
    clip, name = CLIPS[kind]()
    found = probe_module.find_words("red, berry, counterrevolutionary, left of, rare", PROMPT, clip)
    assert [word.text for word in found] == ["red", "berry", "counterrevolutionary", "left of", "rare"]
    texts = {word.text: words_of(clip, name, word.tokens) for word in found}
    assert texts["red"].lower().split() == ["red", "red"]
    assert {text: texts[text] for text in texts if text != "red"} == {
        "berry": "berry", "counterrevolutionary": "counterrevolutionary", "left of": "left of", "rare": "rare",
    }  # fmt: skip
    first = 1 if name == "l" else 0
    assert found[0].tokens[0] == first + 1  # after "A", and after a start token if the encoder has one


def test_words_are_found_in_both_encoders_of_sd3() -> None:
    tokenizer = sd3_clip.SD3Tokenizer()
    (both,) = probe_module.find_words("berry", PROMPT, Clip(tokenizer, "clip_l", "clip_g", "t5xxl"))
    (clip,) = probe_module.find_words("berry", PROMPT, Clip(tokenizer, "clip_l", "clip_g"))
    (t5,) = probe_module.find_words("berry", PROMPT, Clip(tokenizer, "t5xxl"))
    assert both.tokens == (*clip.tokens, *(77 + token for token in t5.tokens))


def test_words_after_the_first_75_tokens_are_found() -> None:
    prompt = "a blue square, " * 20 + "a red circle"
    clip = Clip(sd1_clip.SD1Tokenizer())
    (word,) = probe_module.find_words("circle", prompt, clip)
    stream = [token for chunk in clip.tokenize(prompt)["l"] for token, _ in chunk]
    assert len(stream) == 2 * 77 and len(word.tokens) == 1 and word.tokens[0] > 77
    assert clip.tokenizer.clip_l.inv_vocab[stream[word.tokens[0]]] == "circle</w>"


def test_wrong_words_are_refused_in_a_sentence() -> None:
    _, clip, _ = host.run_node("GAGDemoLoader")
    model = host.build_model("sd15")
    with pytest.raises(ValueError, match=r'^words: "dog" is not in the prompt; write words as they stand there'):
        probed(model, words="red, dog", prompt="a red circle", text_encoder=clip)
    with pytest.raises(ValueError, match=r'^words: "berry" is not in the prompt;'):
        probed(model, words="berry", prompt="a strawberry", text_encoder=Clip(sd1_clip.SD1Tokenizer()))
    with pytest.raises(ValueError, match=r"^GAG Probe needs the text_encoder to find the words red; or leave"):
        probed(model, words="red", prompt="a red circle")
    with pytest.raises(ValueError, match=r"^GAG Probe needs the prompt to find the words red; or leave words empty\.$"):
        probed(model, words="red", text_encoder=clip)
    other = type("Tokenizer", (), {"tokenize_with_weights": lambda *_: {"qwen25_7b": [[(5, 1.0, 1)]]}})()
    with pytest.raises(ValueError, match=r"^GAG Probe can find words for CLIP and T5, not for this .* \(qwen25_7b\)"):
        probed(model, words="red", prompt="a red circle", text_encoder=Clip(other))
    assert probed(model, words=" , ")[1].words == ()


def demo(prompt: str) -> tuple[Any, Any, dict[str, Any]]:
    model, clip, _ = host.run_node("GAGDemoLoader")
    prompts = {"positive": host.encode(clip, prompt), "negative": host.encode(clip, "")}
    return model, clip, {**prompts, "latent": torch.zeros(2, 3, 32, 32)}


def test_words_with_weights_are_found_in_the_demos_prompt() -> None:
    (word,) = probe_module.find_words("red circle", "a (red:1.3) circle, a (red (circle:0.7))", demo("")[1])
    assert word.tokens == (2, 3, 6, 7)


def test_maps_are_the_mean_attention_share_of_each_word() -> None:
    prompt = "a red circle above a blue circle"
    model, clip, run = demo(prompt)
    model, probe = probed(guided(model), words="red, circle", prompt=prompt, text_encoder=clip)
    assert [word.tokens for word in probe.words] == [(2,), (3, 7)]
    with record_calls(model) as calls:
        host.sample(model, "sd15", **run, cfg=4.0)
    texts = [call for call in calls if call.module.endswith("attn2")]
    by_size: dict[int, list[Tensor]] = {}
    for call in texts:
        # The host puts the rows of the negative prompt first or last.
        share = measures_reference.word_shares(call.q, call.k, [(2,), (3, 7)])
        halves = share[:2], share[2:]
        positive = torch.equal(call.k[0], call.k[1]) and positive_first(call, texts[0])
        by_size.setdefault(call.q.shape[2], []).append(halves[0] if positive else halves[1])
    assert {m.shape[-1] ** 2: count for m, count in probe.result.maps} == {n: len(by_size[n]) for n in by_size}
    for share, _ in probe.result.maps:
        expected = torch.stack(by_size[share.shape[-1] ** 2]).mean(0).unflatten(2, share.shape[-2:])
        torch.testing.assert_close(share.double(), expected, atol=1e-5, rtol=0)
    assert probe.result.notes == ()


def positive_first(call: Call, first: Call) -> bool:
    """Return True if the first rows belong to the positive prompt, whose keys differ more than those of padding."""
    keys = call.k[0, 0]
    return bool((keys[3:] - keys[3]).norm() > (call.k[-1, 0, 3:] - call.k[-1, 0, 3]).norm())


@pytest.mark.parametrize(
    ("name", "image", "text", "size"),
    [("flux", slice(19, None), slice(0, 19), (4, 4)), ("stable-cascade", slice(None), slice(24, 43), (4, 6))],
)
def test_maps_of_a_joint_attention_are_right(name: str, image: slice, text: slice, size: tuple[int, int]) -> None:
    words = ((0, 4), (18,))
    tiny = TRANSFORMERS[name]
    model, probe = probed(tiny.build())
    probe.words = tuple(measurements.Word(str(word), word) for word in words)
    with record_calls(model) as calls:
        tiny.sample(model, tokens=19)
    expected = torch.stack(
        [measures_reference.word_shares(call.q[:, :, image], call.k[:, :, text], list(words)) for call in calls]
    ).mean(0)
    ((share, count),) = probe.result.maps
    assert count == len(calls)
    torch.testing.assert_close(share.double().flatten(2), expected, atol=1e-5, rtol=0)
    assert share.shape == (1, 2, *size)


def test_a_note_says_that_the_text_is_shorter_than_the_prompt() -> None:
    model, probe = probed(host.build_model("sd15"))
    probe.words = (measurements.Word("far", (80,)), measurements.Word("near", (3,)))
    host.sample(model, "sd15", steps=1)
    assert probe.result.notes == ("The text that the model read is shorter than the prompt given to GAG Probe: far.",)


def layouts() -> Iterator[tuple[tuple[int, ...], int, tuple[int, int, int] | None]]:
    for height, width in itertools.product((8, 13, 64), (8, 22, 96)):
        rows, columns = height, width
        for _ in range(3):
            yield (height, width), rows * columns, (1, rows, columns)
            rows, columns = -(-rows // 2), -(-columns // 2)
    yield (5, 8, 12), 5 * 4 * 6, (5, 4, 6)
    yield (8, 8), 17, None


@pytest.mark.parametrize(("grid", "tokens", "layout"), layouts())
def test_tokens_have_the_layout_of_the_picture(
    grid: tuple[int, ...], tokens: int, layout: tuple[int, int, int] | None
) -> None:
    assert recorder_module.layout_of(grid, tokens) == layout


# --- the report ---------------------------------------------------------------------------------------------------


@pytest.fixture
def output_folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "output"


def report(probe: Any, **inputs: Any) -> Any:
    return host.NODES["GAGReport"].execute(probe=probe, **{"filename_prefix": "sub/report", **inputs})


def test_the_report_has_all_measures_in_a_file_and_as_text(output_folder: Any) -> None:
    prompt = "a red circle above a blue square"
    model, encoder, run = demo(prompt)
    model, probe = probed(guided(model, end_percent=0.5), words="red, square", prompt=prompt, text_encoder=encoder)
    host.sample(model, "sd15", **run, steps=4, cfg=4.0)
    latent = {"samples": torch.zeros(1)}
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    out = report(probe, images=images, latent=latent, pages="all")
    plots, summary, text, same_images, same_latent = out.result
    assert same_images is images and same_latent is latent
    assert plots.shape == (3, 896, 1280, 3) and plots.dtype == torch.float32
    assert 0.0 <= float(plots.min()) < float(plots.max()) <= 1.0
    data = json.loads(text)
    assert (output_folder / "sub" / "report_00001_.json").read_text(encoding="utf-8") == text
    assert len(out.ui["images"]) == 3
    assert "report_00001_.json" in out.ui["text"][1]
    assert data["summary"] == summary
    assert summary.startswith("Guidance acted in 4 of the model's 5 attentions and in ")
    assert data["layers"] == list(probe.result.layers)
    assert list(data["measures"]) == NAMES
    for index, name in enumerate(NAMES):
        for branch, key in enumerate(("positive", "negative")):
            listed = torch.tensor(data["measures"][name][key], dtype=torch.float64)
            torch.testing.assert_close(listed, probe.result.values[branch, ..., index], rtol=1e-5, atol=1e-12)
    assert data["guided"]["positive"] == probe.result.guided[0].tolist()
    words_alone = report(probe, images=images)
    assert torch.equal(words_alone.result[0], plots[:1]), "the words come first, and alone if not all is asked for"
    assert (output_folder / "sub" / "report_00002_.json").exists()
    with pytest.raises(ValueError, match=r"^pages must be one of"):
        report(probe, images=images, pages="curves")


def test_the_summary_has_the_right_numbers(output_folder: Any) -> None:
    model, probe = probed(guided(host.build_model("sd15"), norm_threshold=0.05, norm_mode="relative"))
    host.sample(model, "sd15", steps=2)
    _, summary, *_ = report(probe, latent={}).result
    result = probe.result
    gain, capped = (result.values[0, ..., NAMES.index(name)][result.guided[0]] for name in ("gain", "capped"))
    assert f"Guidance changed the attention output by {100 * float(gain.mean()):.0f} % on average" in summary
    assert f"The cap held it back in {100 * float(capped.mean()):.0f} % of the picture: " in summary
    assert "Guidance acted in 6 of the model's 7 attentions and in 2 of 2 steps." in summary


def test_the_report_works_without_guidance_and_with_one_prompt_and_one_step(output_folder: Any) -> None:
    model, probe = probed(host.build_model("flux"))
    host.sample(model, "flux", steps=1, cfg=1.0)
    plots, summary, text, *_ = report(probe, latent={}).result
    assert plots.shape[0] == 2
    assert summary.startswith(
        "No guidance acted; the numbers are for the preset auto at strength 1. Guidance would change the attention"
    )
    assert "of the attention falls on the text." in summary
    data = json.loads(text)
    assert data["branches"] == ["positive"]
    assert data["strengths"] == [0.0]


def test_a_report_without_measures_says_so(output_folder: Any) -> None:
    model, probe = probed(host.build_model("sd15"))
    with pytest.raises(ValueError, match=r"^GAG Report needs images or latent, so that it comes after the sampler"):
        report(probe)
    with pytest.raises(
        ValueError, match=r"^GAG Report has nothing to show: no run with GAG Probe's model has finished"
    ):
        report(probe, latent={})
    empty = host.conditioning("sd15", 10, tokens=0)
    host.sample(model, "sd15", positive=empty, negative=empty)
    with pytest.raises(ValueError, match=r"^GAG Report has nothing to show: in the last run .* no text attention ran"):
        report(probe, latent={})
    assert not output_folder.exists()
