# SPDX-License-Identifier: GPL-3.0-or-later
"""Models in the states that users have them in: 16-bit and 8-bit weights, partly offloaded, and several in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import pytest
import torch
from torch import Tensor

import host_process as host
import reference
from recorder import Call, record_calls
from tolerances import ROUNDING, assert_close
from transformers_of_host import TRANSFORMERS

PAPER = host.pack_module("gag_core").GuidanceConfig()
TOKENS = 12
# Dtypes in which weights are stored, and in which the host computes with them (None for the same).
STORED = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "fp16 computed in fp32": (torch.float16, torch.float32),
    "fp8 computed in bf16": (torch.float8_e4m3fn, torch.bfloat16),
    "fp8 computed in fp32": (torch.float8_e5m2, torch.float32),
}
# One model for each way in which the text is found: UNet, wrapped blocks, watched blocks, text cross-attention.
MODELS = ("sd15", "flux", "lumina2", "wan-t2v")


def build(name: str, stored: tuple[torch.dtype, torch.dtype | None] = (torch.float32, None)) -> Any:
    class_name, config = host.CONFIGS[name] if name == "sd15" else _tiny(name)
    return host.build(class_name, config, 0, *stored)


def _tiny(name: str) -> tuple[str, dict[str, Any]]:
    tiny = TRANSFORMERS[name]
    return tiny.class_name, tiny.config


def sample(model: Any, name: str) -> Tensor:
    if name != "sd15":
        return TRANSFORMERS[name].sample(model, tokens=TOKENS)
    prompt = host.conditioning(name, 10, TOKENS)
    return host.sample(model, name, cfg=1.0, positive=prompt, negative=prompt)


def guided(model: Any) -> Any:
    (out,) = host.run_advanced(model=model)
    return out


def expected_output(name: str, call: Call) -> Tensor | None:
    """Return the right output of a call that reads the text, judged by module and shapes; None for other calls."""
    if name == "sd15":
        reads_text = call.module.endswith("attn2") and "middle" not in call.module
    else:
        tiny = TRANSFORMERS[name]
        if tiny.text_first is not None:
            if "refiner" in call.module or call.k.shape[2] <= tiny.image_tokens():
                return None
            text = tiny.text(call.k.shape[2], TOKENS)
            return reference.guided_joint_attention(call.q, call.k, call.v, text, PAPER)
        reads_text = call.module.endswith("cross_attn")
    return reference.guided_attention(call.q, call.k, call.v, PAPER) if reads_text else None


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize("name", MODELS)
def test_guidance_is_right_with_small_weights(name: str, stored: tuple[torch.dtype, torch.dtype | None]) -> None:
    """Guided calls return the reference output for their inputs, in the dtype of these; off is bit-identical."""
    model = build(name, stored)
    weights = {weight.dtype for weight in model.model.diffusion_model.parameters() if weight.ndim >= 2}
    assert stored[0] in weights
    plain = sample(model, name)
    with record_calls(guided(model)) as calls:
        out = sample(guided(model), name)
    assert torch.isfinite(out).all()
    assert not torch.equal(out, plain)
    checked = 0
    for call in calls:
        wanted = expected_output(name, call)
        if wanted is not None:
            assert call.out.dtype == call.v.dtype == (stored[1] or stored[0])
            # In a joint sequence guidance is added to the host's own output, which is rounded too.
            largest = float(call.v.abs().max())
            error = (3e-5 * (1.0 + PAPER.guidance_scale) + ROUNDING[call.v.dtype]) * largest
            assert_close(call.out, wanted, error=error)
            checked += 1
    assert checked >= 4
    (off,) = host.run_node("GAGuidance", model=model, strength=0.0)
    assert torch.equal(sample(off, name), plain)


@pytest.mark.parametrize("name", MODELS)
def test_guidance_is_right_for_partly_offloaded_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the device cannot hold the model, the host patches the weights layer by layer while the model runs."""
    fully_loaded = sample(guided(_with_lora(build(name))), name)
    original: Callable[..., Any] = comfy.model_patcher.ModelPatcher.load

    def load_one_third(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(lowvram_model_memory=self.model_size() // 3, full_load=False)
        return original(self, *args[:1], **kwargs)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load_one_third)
    model = guided(_with_lora(build(name)))
    out = sample(model, name)
    assert model.model.model_lowvram
    assert any(getattr(module, "weight_function", None) for module in model.model.modules())
    assert torch.allclose(out, fully_loaded, rtol=1e-3, atol=1e-3 * float(fully_loaded.abs().max()))
    without_lora = sample(guided(build(name)), name)
    assert not torch.allclose(out, without_lora, rtol=1e-3, atol=1e-3 * float(fully_loaded.abs().max()))


def _with_lora(model: Any) -> Any:
    """Return a model with a patch on every matrix, as a LoRA has them."""
    model = model.clone()
    generator = torch.Generator().manual_seed(7)
    patches = {
        key: (torch.randn(weight.shape, generator=generator) * 0.02,)
        for key, weight in model.model.state_dict().items()
        if key.endswith("weight") and weight.ndim == 2
    }
    assert model.add_patches(patches)
    return model


def test_families_in_turns_give_the_pictures_that_each_gives_alone() -> None:
    """No run depends on the runs before it, guided or not."""
    names = [*MODELS, *(name for name in ("hunyuan-video", "hidream", "sd3") if name in TRANSFORMERS)]
    alone = {name: sample(guided(build(name)), name) for name in names}
    plain = {name: sample(build(name), name) for name in names}
    models = {name: build(name) for name in names}
    patched = {name: guided(model) for name, model in models.items()}
    for name in [*names, *reversed(names), names[0], names[1], names[0]]:
        assert torch.equal(sample(patched[name], name), alone[name]), name
        assert torch.equal(sample(models[name], name), plain[name]), name
