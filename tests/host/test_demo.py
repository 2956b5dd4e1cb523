# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo models: the pack's own nodes make real pictures, and guidance acts on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import comfy.utils
import pytest
import torch
from torch import Tensor

import host_process as host
from recorder import record_calls

demo_model = host.pack_module("nodes.demo.models")
COLOURS = {"red": (0.9, 0.12, 0.12), "green": (0.1, 0.75, 0.2), "blue": (0.15, 0.3, 0.95), "yellow": (0.95, 0.85, 0.1)}
with_each_cfg_model = pytest.mark.parametrize("kind", ["standard", "transformer"])


def pictures(
    model: Any, encoder: Any, vae: Any, prompt: str, count: int = 8, steps: int = 12, cfg: float = 4.0
) -> Tensor:
    """Sample and decode pictures ``[count, 32, 32, 3]`` in 0..1."""
    (positive,) = host.run_node("GAGDemoPrompt", text_encoder=encoder, text=prompt)
    (negative,) = host.run_node("GAGDemoPrompt", text_encoder=encoder, text="")
    (latent,) = host.run_node("GAGDemoEmptyLatent", batch_size=count)
    (out,) = host.NODES["KSampler"]().sample(model, 3, steps, cfg, "euler", "simple", positive, negative, latent)
    (images,) = host.NODES["VAEDecode"]().decode(vae, out)
    return images


def has_colour(images: Tensor, colour: str) -> Tensor:
    """Return True for each picture that has more than a few pixels near a colour, ``[count]``."""
    distance = (images - torch.tensor(COLOURS[colour])).square().sum(-1)
    return (distance < 0.2).flatten(1).sum(1) >= 12


@with_each_cfg_model
def test_pictures_have_the_colours_of_the_prompt(kind: str) -> None:
    model, encoder, vae = host.run_node("GAGDemoLoader", kind=kind)
    images = pictures(model, encoder, vae, "a red circle left of a blue square")
    assert images.shape == (8, 32, 32, 3)
    assert int((has_colour(images, "red") & has_colour(images, "blue")).sum()) >= 6
    others = pictures(model, encoder, vae, "a green circle left of a yellow square")
    assert int((has_colour(others, "green") & has_colour(others, "yellow")).sum()) >= 6
    assert int((has_colour(others, "red") | has_colour(others, "blue")).sum()) <= 2


def test_the_few_step_model_draws_in_four_steps_without_cfg() -> None:
    model, encoder, vae = host.run_node("GAGDemoLoader", kind="few-step")
    prompt = "a red circle left of a blue square"
    images = pictures(model, encoder, vae, prompt, steps=4, cfg=1.0)
    assert int((has_colour(images, "red") & has_colour(images, "blue")).sum()) >= 6


def test_guidance_acts_on_every_joint_attention_of_the_transformer() -> None:
    model, encoder, vae = host.run_node("GAGDemoLoader", kind="transformer")
    family, parts = host.pack_module("nodes.patching.families").family_of(model)
    assert family.name == "flux" and sum(map(len, parts.values())) == 6
    plain, gentle, strong = (
        pictures(guided, encoder, vae, "a red circle left of a blue square")
        for guided in (
            model,
            host.guide(model, "beside CFG"),
            host.guide(model, "beside CFG", strength=4.0, start_percent=0.0),
        )
    )
    assert float((strong - plain).abs().mean()) > float((gentle - plain).abs().mean()) > 0
    (off,) = host.run_node("GAGuidance", model=model, strength=0.0)
    assert torch.equal(pictures(off, encoder, vae, "a red circle left of a blue square"), plain)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of standard, few-step, transformer, got 'turbo'"):
        host.run_node("GAGDemoLoader", kind="turbo")


@with_each_cfg_model
def test_guidance_changes_the_pictures_and_keeps_the_colours(kind: str) -> None:
    model, encoder, vae = host.run_node("GAGDemoLoader", kind=kind)
    prompt = "a red circle left of a blue square"
    plain = pictures(model, encoder, vae, prompt)
    (gentle,) = host.run_node("GAGuidance", model=model)
    out = pictures(gentle, encoder, vae, prompt)
    assert not torch.equal(out, plain)
    assert int((has_colour(out, "red") & has_colour(out, "blue")).sum()) >= 6


def test_the_unet_has_five_text_attentions_of_which_one_is_in_the_middle() -> None:
    model, encoder, vae = host.run_node("GAGDemoLoader")
    (gentle,) = host.run_node("GAGuidance", model=model)
    with record_calls(gentle) as calls:
        pictures(gentle, encoder, vae, "a red circle", 1)
    assert len({c.module for c in calls if c.module.endswith("attn2")}) == 5
    assert len(host.pack_module("nodes.patching.families").family_of(model)[1]["m"]) == 1


def test_a_changed_file_of_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(demo_model.ASSETS / demo_model.CHECKSUMS, tmp_path)
    copy = Path(shutil.copy(demo_model.ASSETS / demo_model.WEIGHTS["standard"], tmp_path))
    monkeypatch.setattr(demo_model, "ASSETS", tmp_path)
    host.run_node("GAGDemoLoader")
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    with pytest.raises(ValueError, match=rf"assets/{copy.name} is not the file that came with the pack .*install the"):
        host.run_node("GAGDemoLoader")


@pytest.mark.parametrize("change", ["missing", "unknown"])
@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_weights_that_do_not_fit_the_hosts_class_are_refused(name: str, change: str) -> None:
    """The host would only log the difference, and sample with uninitialised memory."""
    file = demo_model.WEIGHTS["standard" if name == "unet" else "transformer"]
    weights = comfy.utils.load_torch_file(str(demo_model.ASSETS / file))
    loaded = demo_model.load_in_host(name, weights).model.diffusion_model
    key = next(key for key in weights if key.startswith(f"{name}."))
    if change == "missing":
        del weights[key]
    else:
        weights[f"{name}.unknown"] = weights[key]
    sentence = (
        rf"ComfyUI's {type(loaded).__name__} has other weights than the demo model, 1 of them, as .*: update the GAG"
    )
    with pytest.raises(ValueError, match=sentence):
        demo_model.load_in_host(name, weights)


def test_unknown_words_are_refused_and_named() -> None:
    _, encoder, _ = host.run_node("GAGDemoLoader")
    with pytest.raises(ValueError, match=r"does not know 'pink', 'dog'; it knows these words: , \. a above") as raised:
        host.run_node("GAGDemoPrompt", text_encoder=encoder, text="A pink circle above a dog, a pink one")
    assert all(word in str(raised.value) for word in ("purple", "white", "crosses", "three"))


def test_a_prompt_that_is_too_long_is_refused() -> None:
    _, encoder, _ = host.run_node("GAGDemoLoader")
    with pytest.raises(ValueError, match="reads up to 75 words and marks, got 76"):
        host.run_node("GAGDemoPrompt", text_encoder=encoder, text="red " * 76)


def test_a_context_has_the_shape_of_the_models_input() -> None:
    _, encoder, _ = host.run_node("GAGDemoLoader")
    red, same, blue = (encoder.encode([text]) for text in ("A red circle", "a red  circle", "a blue circle"))
    assert red.shape == (1, 77, 96)
    assert torch.equal(red, same)
    assert not torch.equal(red, blue)
