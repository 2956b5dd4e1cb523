# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs of the real sampler: guidance works with other settings that users combine it with, and off changes no bit."""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

import companions
import host_process as host
import packs
import reference
from recorder import record_calls
from tolerances import assert_close
from transformers_of_host import TRANSFORMERS

FAMILIES = ["sd15", "sdxl", "flux", "flux-schnell"]


def guided(model: Any, **settings: Any) -> Any:
    return host.guide(model, **settings)


def check_guided(with_guidance: Tensor, without: Tensor) -> None:
    """Assert that guidance changed the picture, and that it is finite."""
    assert torch.isfinite(with_guidance).all()
    assert not torch.equal(with_guidance, without)


@pytest.mark.parametrize("name", FAMILIES)
def test_off_is_bit_identical_to_no_node(name: str) -> None:
    model = host.build_model(name)
    plain = host.sample(model, name)
    assert torch.equal(host.sample(guided(model, strength=0.0), name), plain)
    late = guided(model, start_percent=1.0)
    assert torch.equal(host.sample(late, name), plain)
    # The input model was not changed.
    check_guided(host.sample(guided(model), name), plain)
    assert torch.equal(host.sample(model, name), plain)


@pytest.mark.parametrize("preset", host.pack_module("nodes.presets").PRESETS)
def test_every_preset_changes_the_picture(preset: str) -> None:
    model = host.build_model("sd15")
    plain = host.sample(model, "sd15", cfg=1.0)
    check_guided(host.sample(guided(model, preset=preset), "sd15", cfg=1.0), plain)


@pytest.mark.parametrize("tokens", [77, 154, 231])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_guidance_works_with_all_batches_cfg_scales_and_prompt_lengths(
    name: str, batch: int, cfg: float, tokens: int
) -> None:
    model = host.build_model(name)
    inputs: dict[str, Any] = {"batch": batch, "cfg": cfg, "positive": host.conditioning(name, 10, tokens)}
    plain = host.sample(model, name, **inputs)
    out = host.sample(guided(model), name, **inputs)
    assert out.shape == plain.shape
    check_guided(out, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_half_precision_gives_the_rounded_reference_output(name: str, dtype: torch.dtype) -> None:
    """The model gets the fp64 reference output, rounded once to the model's own dtype."""
    model = guided(host.build(*host.CONFIGS[name], dtype=dtype), preset="paper")
    config = host.pack_module("nodes.presets").PRESETS["paper"].config
    with record_calls(model) as calls:
        out = host.sample(model, name, cfg=1.0, steps=1)
    assert torch.isfinite(out).all()
    text = [c for c in calls if name == "flux" or (c.module.endswith("attn2") and ".middle_block" not in c.module)]
    assert text
    for call in text:
        assert call.out.dtype == dtype
        if name == "flux":
            # The joint output that guidance is added to is itself rounded to the dtype.
            plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
            expected = reference.guided_joint_attention(call.q, call.k, call.v, slice(0, 77), config)
            rounding = torch.finfo(dtype).eps * float(plain.abs().max())
            assert_close(call.out, expected, error=rounding + 3e-4 * float(call.v.abs().max()))
        else:
            call.check(reference.guided_attention(call.q, call.k, call.v, config), config.guidance_scale)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2s_ancestral", "uni_pc", "lcm"])
def test_guidance_works_with_other_samplers(sampler: str) -> None:
    model = host.build_model("sd15")
    plain = host.sample(model, "sd15", sampler=sampler, steps=3)
    out = host.sample(guided(model), "sd15", sampler=sampler, steps=3)
    check_guided(out, plain)
    assert torch.equal(out, host.sample(guided(model), "sd15", sampler=sampler, steps=3))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_guidance_leaves_the_masked_part_of_a_picture_alone(name: str) -> None:
    """Image to image with a noise mask: the part that the mask protects does not change."""
    model = host.build_model(name)
    latent = torch.randn(1, *host.LATENTS[name], generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1.0
    inputs: dict[str, Any] = {"latent": latent, "noise_mask": mask, "denoise": 0.6, "steps": 4}
    plain = host.sample(model, name, **inputs)
    out = host.sample(guided(model), name, **inputs)
    check_guided(out, plain)
    assert torch.allclose(out[..., :4], latent[..., :4], atol=1e-4)


def test_models_patched_differently_in_one_graph_do_not_affect_each_other() -> None:
    sd15, flux = host.build_model("sd15"), host.build_model("flux")
    strong, weak = guided(sd15, preset="paper"), guided(sd15, strength=0.3)
    transformer = guided(flux)
    first_outs = [
        host.sample(m, n) for m, n in ((strong, "sd15"), (weak, "sd15"), (transformer, "flux"), (sd15, "sd15"))
    ]
    second_outs = [
        host.sample(m, n) for m, n in ((sd15, "sd15"), (transformer, "flux"), (weak, "sd15"), (strong, "sd15"))
    ]
    for first, second in zip(first_outs, reversed(second_outs), strict=False):
        assert torch.equal(first, second) or first.shape != second.shape
    assert len({float(t.sum()) for t in first_outs}) == 4


def test_each_of_two_nodes_acts_in_its_own_range() -> None:
    """In the overlap of the ranges of two nodes on one model, the later node acts."""
    model = host.build_model("sd15")
    early = guided(model, preset="paper", end_percent=0.5)
    both = guided(early, start_percent=0.4)
    run: dict[str, Any] = {"steps": 6}
    over_paper = guided(guided(model, preset="paper"))
    assert torch.equal(host.sample(over_paper, "sd15", **run), host.sample(guided(model), "sd15", **run))
    outs = [host.sample(m, "sd15", **run) for m in (model, early, guided(model, start_percent=0.4), both)]
    assert len({float(out.sum()) for out in outs}) == 4


class StopHereError(Exception):
    """Raised by a test in the middle of a run."""


ERRORS = [StopHereError, comfy.model_management.InterruptProcessingException]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_run_after_an_error_or_interrupt_equals_a_fresh_one(name: str, error: type[BaseException]) -> None:
    model = host.build_model(name)
    plain = host.sample(model, name, steps=3)
    patched = guided(model)
    fresh = host.sample(patched, name, steps=3)

    def stop(step: int, *_: Any) -> None:
        if step == 1:
            raise error

    with pytest.raises(error):
        host.sample(patched, name, steps=3, callback=stop)
    assert torch.equal(host.sample(patched, name, steps=3), fresh)
    assert torch.equal(host.sample(model, name, steps=3), plain)


# One model for each way in which the text is found: attn2, wrapped blocks, a watched module, a measured stream.
MODELS = ["sd15", "flux", "wan-t2v", "mochi"]


def hook_count(model: Any) -> int:
    """Return the number of forward hooks on the modules of a model."""
    modules = model.model.diffusion_model.modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", MODELS)
def test_an_error_in_the_middle_of_a_model_call_leaves_nothing_behind(name: str, error: type[BaseException]) -> None:
    patched = guided(companions.build(name))
    fresh = companions.sample(patched, name)
    hooks_at_calls = []

    def failing_attention(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        hooks_at_calls.append(hook_count(patched))
        if len(hooks_at_calls) == 3:
            raise error
        out: Tensor = function(*args, **kwargs)
        return out

    broken = patched.clone()
    broken.model_options["transformer_options"]["optimized_attention_override"] = failing_attention
    with pytest.raises(error):
        companions.sample(broken, name)
    assert bool(hooks_at_calls[-1]) == (name in ("wan-t2v", "mochi"))
    assert hook_count(patched) == 0
    assert torch.equal(companions.sample(patched, name), fresh)


def test_no_hook_is_left_if_one_cannot_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    patched = guided(companions.build("wan-t2v"))

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no hook here")

    monkeypatch.setattr(patched.model.diffusion_model.blocks[1].cross_attn, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hook here"):
        companions.sample(patched, "wan-t2v")
    assert hook_count(patched) == 0


def test_a_block_that_another_node_removed_is_not_counted(node_texts: list[str]) -> None:
    patched = guided(companions.build("wan-t2v"))
    network = patched.model.diffusion_model
    network.blocks = network.blocks[:1]
    companions.sample(patched, "wan-t2v")
    assert node_texts == ["Guided 1 of 2 attentions in 2 of 2 calls."]
    assert hook_count(patched) == 0


@pytest.mark.parametrize("name", MODELS)
def test_two_copies_of_a_model_run_at_once(name: str, node_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's multi-GPU sampling sends the prompts of a step to copies of the model, each in its own thread."""
    model, other = guided(companions.build(name), schedule=[1.5, 0.5]), companions.build(name)
    other.wrappers, other.model_options, other.model.current_patcher = model.wrappers, model.model_options, other
    run = TRANSFORMERS[name].sample if name in TRANSFORMERS else partial(host.sample, name=name)
    both_started = Barrier(2, timeout=60)

    def by_prompt(apply_model: Any, args: dict[str, Any]) -> Tensor:
        assert len(args["cond_or_uncond"]) == 2

        def run_prompt(index: int) -> Tensor:
            rows = slice(index, index + 1)
            inputs = {key: value[rows] if torch.is_tensor(value) else value for key, value in args["c"].items()}
            options = dict(args["c"]["transformer_options"])
            for key in ("cond_or_uncond", "uuids"):
                options[key] = options[key][rows]
            inputs["transformer_options"] = options
            both_started.wait()
            with torch.no_grad():
                out: Tensor = (apply_model, other.model.apply_model)[index](
                    args["input"][rows], args["timestep"][rows], **inputs
                )
            return out

        with ThreadPoolExecutor(2) as pool:
            return torch.cat(list(pool.map(run_prompt, range(2))))

    spread = model.clone()
    spread.set_model_unet_function_wrapper(by_prompt)
    out = run(model=spread, cfg=4.0)
    monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 2**60)  # one prompt at a time
    assert torch.equal(out, run(model=model, cfg=4.0))
    assert node_texts[0] == node_texts[1]
    assert node_texts[0].endswith(" in 4 of 4 calls.")


THREADS, CALLS = 4, 200


def in_threads(call: Callable[[], Any]) -> None:
    """Run a function CALLS times in each of THREADS threads."""
    all_started = Barrier(THREADS, timeout=60)

    def repeat(_: int) -> None:
        all_started.wait()
        for _ in range(CALLS):
            call()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(repeat, range(THREADS)))


def interrupted(value: Any) -> Any:
    """Return a value that was just read, after other threads have had a turn.

    That can happen anywhere in a Python without a global lock, and in other Pythons wherever they run Python code.
    """
    time.sleep(1e-6)
    return value


class InterruptedCounter(Counter[Any]):
    def __getitem__(self, key: Any) -> int:
        return int(interrupted(super().__getitem__(key)))


def test_no_count_is_lost_where_model_calls_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI can send the prompts of a step to several devices, whose threads share one run."""
    model = guided(guided(host.build_model("sd15")))
    patch = host.pack_module("nodes.patching.guided_model")._patch_of(model)
    run_class = host.pack_module("nodes.patching.run").Run
    run = run_class(patch.observer, patch.observer.new_chart())
    for name, value in list(vars(run).items()):
        if isinstance(value, Counter):
            setattr(run, name, InterruptedCounter())
    counts = {"model_calls": 0}
    calls = property(lambda _: interrupted(counts["model_calls"]), lambda _, n: counts.update(model_calls=n))
    monkeypatch.setattr(run_class, "model_calls", calls)
    earlier, later = patch.guidances
    run.guided[later] = InterruptedCounter()
    layer = later.order[0]
    layers = SimpleNamespace(reached=[layer], has_unknown_rows=True, other_text={layer})

    class Executor:
        class_obj = SimpleNamespace(model_sampling=model.model.model_sampling)

        def __call__(self, *_: Any) -> None:
            run.count_layers(later, layers)

    noise = torch.zeros(1, 4, 8, 8), torch.ones(1)
    in_threads(lambda: patch.apply_model(Executor(), *noise, transformer_options={"comfyui-gag": run}))
    counts |= {
        "in range": run.in_range[later],
        "overruled": run.overruled[earlier],
        "without text": run.no_context[later],
        "guided": run.guided[later][layer],
        "unknown rows": run.unknown_rows[later],
    }
    assert counts == dict.fromkeys(counts, THREADS * CALLS)
    assert run.other_text == {later: {layer}}


def test_no_sample_is_lost_where_model_calls_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sample:
        nbytes = property(lambda _: interrupted(16 << 20))  # five of them are measured together

    recorder = host.pack_module("nodes.patching.recorder")
    monkeypatch.setattr(recorder, "_measure_together", list)
    recording = recorder.Recording()

    def add() -> None:
        call = SimpleNamespace(level=torch.zeros(1))
        recording.add(SimpleNamespace(call=call, measured=[], waiting=[Sample()]), [], 0)

    in_threads(add)
    assert len(recording.calls) == THREADS * CALLS
    assert len(recording.measured) + sum(map(len, recording.waiting.values())) == THREADS * CALLS


def test_model_calls_that_set_the_stance_of_torch_take_turns() -> None:
    """Torch has one stance for all threads: without turns, one thread would end that of another."""
    compiled = host.pack_module("nodes.patching.compile").UnguardedCompile({}, "GAG acts")

    def stances(_: int) -> list[str]:
        found = []
        for _ in range(20):
            with compiled.bypass_host_graph():
                for _ in range(20):
                    found.append(torch._dynamo.eval_frame._stance.stance)
                    time.sleep(0)
        return found

    with ThreadPoolExecutor(2) as pool:
        found = [stance for one in pool.map(stances, range(2)) for stance in one]
    assert set(found) == {"force_eager"}
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_each_copy_of_a_model_is_hooked_in_its_own_blocks(node_texts: list[str]) -> None:
    """ComfyUI has a copy of the model for each further device. A block cache replaces the blocks of all copies."""
    model, other = guided(companions.build("sd3")), companions.build("sd3")
    expected = companions.sample(model, "sd3")
    other.model.current_patcher = other
    model.set_additional_models("multigpu", [other])

    def on_the_copy(_: Any, args: dict[str, Any]) -> Tensor:
        with (
            packs.blocks_in_one_module(model.model.diffusion_model, "sd3"),
            packs.blocks_in_one_module(other.model.diffusion_model, "sd3"),
        ):
            out: Tensor = other.model.apply_model(args["input"], args["timestep"], **args["c"])
        return out

    model.set_model_unet_function_wrapper(on_the_copy)
    assert torch.equal(companions.sample(model, "sd3"), expected)
    assert node_texts[0] == node_texts[1]


@pytest.mark.parametrize("name", MODELS)
def test_no_object_of_a_run_outlives_it(name: str) -> None:
    """Neither the model's options nor a cycle of references keeps objects of a run or of a model call."""
    patched = guided(companions.build(name))
    gc.collect()
    gc.disable()
    try:
        companions.sample(patched, name)
        names = ("Run", "GuidedUNet", "GuidedTransformer", "TextLayers", "AttentionCall")
        left = [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in names]
    finally:
        gc.enable()
    assert not left
    assert host.pack_module("nodes.patching.patch").KEY not in patched.model_options.get("transformer_options", {})


def test_the_log_says_that_no_step_lies_within_the_range(log_messages: Callable[[], str]) -> None:
    host.sample(guided(host.build_model("sd15"), start_percent=1.0), "sd15")
    assert "GAG guided nothing in this run: no step lies within its start_percent and end_percent" in log_messages()
    assert ", 1 to 1; where a run has so few steps, set start_percent to 0." in log_messages()


def with_anderson(model: Any) -> Any:
    start = next(i.default for i in host.NODES["GAGAnderson"].GET_SCHEMA().inputs if i.id == "start_percent")
    return host.run_node("GAGAnderson", model=model, start_percent=start)[0]


@pytest.mark.parametrize("guide", [partial(host.guide, preset="beside CFG"), with_anderson], ids=["preset", "anderson"])
def test_a_later_start_leaves_the_first_steps_alone_and_a_run_of_one_step_says_so(
    guide: Callable[..., Any], log_messages: Callable[[], str], node_texts: list[str]
) -> None:
    plain = host.build_model("sd15")
    model = guide(model=plain)
    host.sample(model, "sd15", steps=10)
    assert torch.equal(host.sample(model, "sd15", steps=1), host.sample(plain, "sd15", steps=1))
    assert node_texts == ["Guided 6 of 6 attentions in 7 of 10 calls.", "Nothing guided: no step within 0.3 to 1."]
    assert ", 0.3 to 1; where a run has so few steps, set start_percent to 0." in log_messages()


def test_the_log_says_that_a_later_node_acts(log_messages: Callable[[], str]) -> None:
    host.sample(guided(guided(host.build_model("sd15"))), "sd15")
    assert "a later GAG node on the same model acts in all steps of its range" in log_messages()


def test_the_log_says_that_no_model_call_had_a_positive_prompt(log_messages: Callable[[], str]) -> None:
    (model,) = host.run_advanced(model=host.build_model("sd15"), apply_to="positive")

    def only_negative(args: dict[str, Any]) -> Tensor:
        args["c"]["transformer_options"]["cond_or_uncond"] = [1] * len(args["cond_or_uncond"])
        return args["apply"](args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(lambda apply, args: only_negative({**args, "apply": apply}))
    # Both prompts have one text, so that the host's list decides.
    host.sample(model, "sd15", positive=host.conditioning("sd15", 10), negative=host.conditioning("sd15", 10))
    assert "no model call had a positive prompt" in log_messages()


def test_the_log_says_that_no_chosen_attention_ran(log_messages: Callable[[], str]) -> None:
    """Another node replaces the blocks with functions that have no attention."""
    model = guided(host.build_model("flux"))
    for part, count in (("double_block", 2), ("single_block", 3)):
        for index in range(count):
            model.set_model_patch_replace(lambda args, _: args, "dit", part, index)
    host.sample(model, "flux", cfg=1.0)
    assert "none of the chosen attentions ran" in log_messages()


def test_the_log_says_that_the_prompts_have_no_tokens(log_messages: Callable[[], str]) -> None:
    prompt = host.conditioning("sd15", 10, tokens=0)
    host.sample(guided(host.build_model("sd15")), "sd15", positive=prompt, negative=prompt)
    assert "GAG guided nothing in this run: no model call had a single token of text." in log_messages()


def test_the_node_says_that_the_prompts_are_empty(node_texts: list[str]) -> None:
    prompt = host.conditioning("sd15", 10, tokens=0)
    host.sample(guided(host.build_model("sd15")), "sd15", positive=prompt, negative=prompt)
    assert node_texts == ["Nothing guided: the prompts are empty."]


def test_text_that_does_not_come_in_c_crossattn_is_not_called_empty(
    node_texts: list[str], log_messages: Callable[[], str]
) -> None:
    """Some models get their text by other inputs of a model call. Two wrappers around GAG's make a model behave so."""
    contexts: list[Tensor] = []

    def hide(executor: Any, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Tensor, *args: Any, **kwargs: Any) -> Any:
        contexts.append(c_crossattn)
        return executor(x, t, c_concat, None, *args, **kwargs)

    def restore(executor: Any, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: None, *args: Any, **kw: Any) -> Any:
        assert c_crossattn is None
        return executor(x, t, c_concat, contexts.pop(), *args, **kw)

    model = host.build_model("sd15")
    plain = host.sample(model, "sd15")
    # The host calls wrappers in the order in which their keys were added.
    hidden = model.clone()
    hidden.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "before GAG", hide)
    patched = guided(hidden)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "after GAG", restore)
    assert torch.equal(host.sample(patched, "sd15"), plain)
    assert not contexts
    assert node_texts == ["Nothing guided: its text comes another way."]
    assert "GAG guided nothing in this run: no model call had the input c_crossattn" in log_messages()
    assert "empty" not in log_messages() and "a single token" not in log_messages()


def test_the_log_says_that_strength_0_is_off(caplog: pytest.LogCaptureFixture, log_messages: Callable[[], str]) -> None:
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        guided(host.build_model("sd15"), strength=0.0)
    assert "GAG is off: strength is 0" in log_messages()


def test_verbose_lists_the_guided_attentions(caplog: pytest.LogCaptureFixture, log_messages: Callable[[], str]) -> None:
    (model,) = host.run_advanced(model=host.build_model("sd15"), verbose=True, blocks="d1,m")
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        host.sample(model, "sd15", steps=3)
    text = log_messages()
    assert "Guided 2 of 2 attentions in 3 of 3 calls." in text
    assert "input.3.0: 3, middle.0.0: 3" in text
