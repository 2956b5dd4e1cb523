# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs of the real sampler: what users combine with guidance works, and off is off bit for bit."""

from __future__ import annotations

import gc
import logging
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from torch import Tensor

import host_process as host
import reference
from recorder import recording
from tolerances import assert_close

FAMILIES = ["sd15", "sdxl", "flux", "flux-schnell"]


def guided(model: Any, **settings: Any) -> Any:
    (out,) = host.run_node("GAGuidance", model=model, **settings)
    return out


def check_guided(with_guidance: Tensor, without: Tensor) -> None:
    assert torch.isfinite(with_guidance).all()
    assert not torch.equal(with_guidance, without)


@pytest.mark.parametrize("name", FAMILIES)
def test_off_is_bit_identical_to_no_node(name: str) -> None:
    model = host.build_model(name)
    plain = host.sample(model, name)
    assert torch.equal(host.sample(guided(model, strength=0.0), name), plain)
    late = guided(model, start_percent=1.0)
    assert torch.equal(host.sample(late, name), plain)
    # The model that came in was not touched.
    check_guided(host.sample(guided(model), name), plain)
    assert torch.equal(host.sample(model, name), plain)


@pytest.mark.parametrize("preset", ["gentle", "few-step", "paper"])
def test_every_preset_changes_the_picture(preset: str) -> None:
    model = host.build_model("sd15")
    plain = host.sample(model, "sd15")
    check_guided(host.sample(guided(model, preset=preset), "sd15"), plain)


@pytest.mark.parametrize("tokens", [77, 154, 231])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_batches_cfg_and_prompt_lengths(name: str, batch: int, cfg: float, tokens: int) -> None:
    model = host.build_model(name)
    inputs: dict[str, Any] = {"batch": batch, "cfg": cfg, "positive": host.conditioning(name, 10, tokens)}
    plain = host.sample(model, name, **inputs)
    out = host.sample(guided(model), name, **inputs)
    assert out.shape == plain.shape
    check_guided(out, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """What the model gets is the fp64 reference, rounded once to the model's own dtype."""
    model = guided(host.build(*host.CONFIGS[name], dtype=dtype), preset="paper")
    config = host.pack_module("nodes.presets").PRESETS["paper"]
    with recording(model) as calls:
        out = host.sample(model, name, cfg=1.0, steps=1)
    assert torch.isfinite(out).all()
    text = [c for c in calls if name == "flux" or (c.module.endswith("attn2") and ".middle_block" not in c.module)]
    assert text
    for call in text:
        assert call.out.dtype == dtype
        if name == "flux":
            # The joint output that guidance is added to is itself rounded to the dtype.
            plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
            wide = reference.guided_joint_attention(call.q, call.k, call.v, slice(0, 77), config)
            rounding = torch.finfo(dtype).eps * float(plain.abs().max())
            assert_close(call.out, wide, error=rounding + 3e-4 * float(call.v.abs().max()))
        else:
            call.check(reference.guided_attention(call.q, call.k, call.v, config), config.guidance_scale)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2s_ancestral", "uni_pc", "lcm"])
def test_samplers(sampler: str) -> None:
    model = host.build_model("sd15")
    plain = host.sample(model, "sd15", sampler=sampler, steps=3)
    out = host.sample(guided(model), "sd15", sampler=sampler, steps=3)
    check_guided(out, plain)
    assert torch.equal(out, host.sample(guided(model), "sd15", sampler=sampler, steps=3))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_image_to_image_with_a_noise_mask(name: str) -> None:
    """What the mask protects stays exactly as it was."""
    model = host.build_model(name)
    latent = torch.randn(1, *host.LATENTS[name], generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1.0
    inputs: dict[str, Any] = {"latent": latent, "noise_mask": mask, "denoise": 0.6, "steps": 4}
    plain = host.sample(model, name, **inputs)
    out = host.sample(guided(model), name, **inputs)
    check_guided(out, plain)
    assert torch.allclose(out[..., :4], latent[..., :4], atol=1e-4)


def test_two_area_conditionings_of_different_sizes() -> None:
    model = host.build_model("sd15")
    left = host.conditioning("sd15", 10, 77, area=(8, 4, 0, 0), strength=1.0, set_area_to_bounds=False)
    right = host.conditioning("sd15", 12, 154, area=(6, 6, 2, 2), strength=1.0, set_area_to_bounds=False)
    plain = host.sample(model, "sd15", positive=left + right)
    check_guided(host.sample(guided(model), "sd15", positive=left + right), plain)


def control_net() -> Any:
    """A tiny ControlNet of the host's own class for the tiny SD1.5, with seeded weights."""
    config = dict(host.CONFIGS["sd15"][1])
    for key in ("out_channels", "transformer_depth_output", "use_temporal_attention", "use_temporal_resblock"):
        config.pop(key)
    net = comfy.cldm.cldm.ControlNet(
        **config, num_heads=8, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    host.fill(net, seed=4)
    wrapped = comfy.controlnet.ControlNet(
        net, load_device=torch.device("cpu"), manual_cast_dtype=None, latent_format=None
    )
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    wrapped.set_cond_hint(hint, 1.0, (0.0, 1.0))
    return wrapped


def test_controlnet_works_and_is_not_guided_itself() -> None:
    model = host.build_model("sd15")
    net = control_net()
    positive = host.conditioning("sd15", 10, 77, control=net, control_apply_to_uncond=True)
    without_control = host.sample(guided(model), "sd15")
    plain = host.sample(model, "sd15", positive=positive)
    patched = guided(model)
    with recording(patched, net.control_model) as calls:
        out = host.sample(patched, "sd15", positive=positive)
    check_guided(out, plain)
    assert not torch.equal(out, without_control)
    own = [call for call in calls if call.module.startswith("ControlNet.")]
    assert own
    for call in own:
        call.check_plain()


@pytest.mark.parametrize("guided_first", [True, False])
def test_lora_before_and_after(guided_first: bool) -> None:
    model = host.build_model("sd15")
    keys = comfy.lora.model_lora_keys_unet(model.model)
    weights = model.model.state_dict()
    generator = torch.Generator().manual_seed(6)
    lora = {}
    for name, key in keys.items():
        if isinstance(key, str) and name.startswith("lora_unet_") and key.endswith("attn2.to_k.weight"):
            rows, columns = weights[key].shape
            lora[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
            lora[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.2
    assert lora

    def with_lora(target: Any) -> Any:
        return comfy.sd.load_lora_for_models(target, None, lora, 1.0, 0.0)[0]

    both = with_lora(guided(model)) if guided_first else guided(with_lora(model))
    out = host.sample(both, "sd15")
    check_guided(out, host.sample(with_lora(model), "sd15"))
    assert not torch.equal(out, host.sample(guided(model), "sd15"))
    other = guided(with_lora(model)) if guided_first else with_lora(guided(model))
    assert torch.equal(out, host.sample(other, "sd15"))


def test_two_models_patched_differently_in_one_graph() -> None:
    sd15, flux = host.build_model("sd15"), host.build_model("flux")
    strong, weak = guided(sd15, preset="paper"), guided(sd15, strength=0.3)
    transformer = guided(flux)
    fresh = [host.sample(m, n) for m, n in ((strong, "sd15"), (weak, "sd15"), (transformer, "flux"), (sd15, "sd15"))]
    again = [host.sample(m, n) for m, n in ((sd15, "sd15"), (transformer, "flux"), (weak, "sd15"), (strong, "sd15"))]
    for first, second in zip(fresh, reversed(again), strict=False):
        assert torch.equal(first, second) or first.shape != second.shape
    assert len({float(t.sum()) for t in fresh}) == 4


def test_two_nodes_share_a_run_by_range() -> None:
    """Two ranges on one model: each acts in its own; where they overlap the later node does."""
    model = host.build_model("sd15")
    early = guided(model, preset="paper", end_percent=0.5)
    both = guided(early, preset="gentle", start_percent=0.4)
    run: dict[str, Any] = {"steps": 6}
    everywhere_gentle = guided(guided(model, preset="paper"), preset="gentle")
    assert torch.equal(host.sample(everywhere_gentle, "sd15", **run), host.sample(guided(model), "sd15", **run))
    outs = [host.sample(m, "sd15", **run) for m in (model, early, guided(model, start_percent=0.4), both)]
    assert len({float(out.sum()) for out in outs}) == 4


class StopHereError(Exception):
    """Raised by a test in the middle of a run."""


@pytest.mark.parametrize("error", [StopHereError, comfy.model_management.InterruptProcessingException])
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


def test_an_error_in_the_middle_of_an_attention_leaves_nothing() -> None:
    model = host.build_model("sd15")
    patched = guided(model)
    fresh = host.sample(patched, "sd15")
    broken = patched.clone()
    calls = [0]

    def fails(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        calls[0] += 1
        if calls[0] == 3:
            raise StopHereError
        return query, key, value

    broken.set_model_attn2_patch(fails)
    with pytest.raises(StopHereError):
        host.sample(broken, "sd15")
    assert torch.equal(host.sample(patched, "sd15"), fresh)


def test_nothing_of_a_run_outlives_it() -> None:
    """Neither the model's options nor a cycle of references keeps what a run or a model call made."""
    patched = guided(host.build_model("sd15"))
    gc.collect()
    gc.disable()
    try:
        host.sample(patched, "sd15")
        names = ("Run", "GuidedUNet", "TextCrossAttention", "AttentionCall")
        left = [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in names]
    finally:
        gc.enable()
    assert not left
    assert host.pack_module("nodes.patch").KEY not in patched.model_options.get("transformer_options", {})


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.message for record in caplog.records if record.name == "comfyui-gag")


def test_says_why_nothing_was_guided_outside_the_range(caplog: pytest.LogCaptureFixture) -> None:
    host.sample(guided(host.build_model("sd15"), start_percent=1.0), "sd15")
    assert "GAG guided nothing in this run: no step lies within its start_percent and end_percent" in messages(caplog)
    assert "1 to 1." in messages(caplog)


def test_says_that_a_later_node_acts_instead(caplog: pytest.LogCaptureFixture) -> None:
    host.sample(guided(guided(host.build_model("sd15"))), "sd15")
    assert "a later GAG node on the same model acts in all steps of its range" in messages(caplog)


def test_says_why_nothing_was_guided_without_a_positive_prompt(caplog: pytest.LogCaptureFixture) -> None:
    (model,) = host.run_node("GAGuidanceAdvanced", model=host.build_model("sd15"), apply_to="positive")

    def only_negative(args: dict[str, Any]) -> Tensor:
        args["c"]["transformer_options"]["cond_or_uncond"] = [1] * len(args["cond_or_uncond"])
        return args["apply"](args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(lambda apply, args: only_negative({**args, "apply": apply}))
    host.sample(model, "sd15")
    assert "no model call had a positive prompt" in messages(caplog)


def test_says_why_nothing_was_guided_when_blocks_are_replaced(caplog: pytest.LogCaptureFixture) -> None:
    model = guided(host.build_model("flux"))
    for part, count in (("double_block", 2), ("single_block", 3)):
        for number in range(count):
            model.set_model_patch_replace(lambda args, _: args, "dit", part, number)
    host.sample(model, "flux", cfg=1.0)
    assert "none of the chosen attentions ran" in messages(caplog)


def test_says_that_strength_0_is_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        guided(host.build_model("sd15"), strength=0.0)
    assert "GAG is off: strength is 0" in messages(caplog)


def test_verbose_lists_what_was_guided(caplog: pytest.LogCaptureFixture) -> None:
    (model,) = host.run_node("GAGuidanceAdvanced", model=host.build_model("sd15"), verbose=True, blocks="d1,m")
    with caplog.at_level(logging.INFO, logger="comfyui-gag"):
        host.sample(model, "sd15", steps=3)
    text = messages(caplog)
    assert "Guided 2 of 2 attentions in 3 of 3 calls." in text
    assert "input.3.0: 3, middle.0.0: 3" in text
