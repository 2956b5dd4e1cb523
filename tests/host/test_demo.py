# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo models: the pack's own nodes make real pictures, and guidance acts on them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import comfy.patcher_extension
import comfy.utils
import pytest
import torch
from comfy.ldm.flux.model import Flux, FluxParams
from einops import rearrange
from torch import Tensor

import host_process as host
from recorder import record_calls
from training import pictures as pictures_of_training

demo_model = host.pack_module("nodes.demo.models")
text_encoder = host.pack_module("nodes.demo.text_encoder")
COLOURS = {"red": (0.9, 0.12, 0.12), "green": (0.1, 0.75, 0.2), "blue": (0.15, 0.3, 0.95), "yellow": (0.95, 0.85, 0.1)}
with_each_cfg_model = pytest.mark.parametrize("kind", ["standard", "transformer"])


def sampled(model: Any, positive: Any, negative: Any, latent: Any, steps: int = 12, cfg: float = 4.0) -> Tensor:
    """Return the latents that ComfyUI's own sampler node makes."""
    (out,) = host.NODES["KSampler"]().sample(model, 3, steps, cfg, "euler", "simple", positive, negative, latent)
    samples: Tensor = out["samples"]
    return samples


def pictures(model: Any, clip: Any, vae: Any, prompt: str, count: int = 8, steps: int = 12, cfg: float = 4.0) -> Tensor:
    """Make pictures ``[count, 256, 256, 3]`` in 0..1 with ComfyUI's own nodes, the usual graph."""
    latent = host.empty_latent(batch_size=count)
    samples = sampled(model, host.encode(clip, prompt), host.encode(clip, ""), latent, steps, cfg)
    images: Tensor = host.NODES["VAEDecode"]().decode(vae, {"samples": samples})[0]
    return images


def has_colour(images: Tensor, colour: str) -> Tensor:
    """Return True for each picture that has more than a few blocks near a colour, ``[count]``."""
    distance = (images[:, ::8, ::8] - torch.tensor(COLOURS[colour])).square().sum(-1)
    return (distance < 0.2).flatten(1).sum(1) >= 12


@with_each_cfg_model
def test_pictures_have_the_colours_of_the_prompt(kind: str) -> None:
    model, clip, vae = host.run_node("GAGDemoLoader", kind=kind)
    images = pictures(model, clip, vae, "a red circle left of a blue square")
    assert images.shape == (8, 256, 256, 3)
    assert int((has_colour(images, "red") & has_colour(images, "blue")).sum()) >= 6
    others = pictures(model, clip, vae, "a green circle left of a yellow square")
    assert int((has_colour(others, "green") & has_colour(others, "yellow")).sum()) >= 6
    assert int((has_colour(others, "red") | has_colour(others, "blue")).sum()) <= 2


def test_the_few_step_model_draws_in_four_steps_without_cfg() -> None:
    model, clip, vae = host.run_node("GAGDemoLoader", kind="few-step")
    prompt = "a red circle left of a blue square"
    images = pictures(model, clip, vae, prompt, steps=4, cfg=1.0)
    assert int((has_colour(images, "red") & has_colour(images, "blue")).sum()) >= 6


def test_guidance_acts_on_every_joint_attention_of_the_transformer() -> None:
    model, clip, vae = host.run_node("GAGDemoLoader", kind="transformer")
    family, parts = host.pack_module("nodes.patching.families").family_of(model)
    assert family.name == "flux" and sum(map(len, parts.values())) == 6
    plain, gentle, strong = (
        pictures(guided, clip, vae, "a red circle left of a blue square")
        for guided in (
            model,
            host.guide(model, "beside CFG"),
            host.guide(model, "beside CFG", strength=4.0, start_percent=0.0),
        )
    )
    assert float((strong - plain).abs().mean()) > float((gentle - plain).abs().mean()) > 0
    (off,) = host.run_node("GAGuidance", model=model, strength=0.0)
    assert torch.equal(pictures(off, clip, vae, "a red circle left of a blue square"), plain)


def as_before_flux_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ComfyUI's Flux join patches as before version 0.3.72, in 2x2 values whatever the patch size."""
    present = Flux._forward

    def joined_as_two_by_two(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = present(self, x, *args, **kwargs)
        if out.shape != x.shape:  # this ComfyUI is one of them
            return out
        return rearrange(out, "b c (h p) (w q r) -> b (c p) (h q) (w r)", p=self.patch_size, q=2, r=2)

    monkeypatch.setattr(Flux, "_forward", joined_as_two_by_two)
    monkeypatch.delitem(FluxParams.__dataclass_fields__, "global_modulation", raising=False)


@pytest.mark.parametrize("host_is_old", [False, True])
def test_the_transformers_output_is_its_last_layers_patches(host_is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the eyes of a wrapper around the diffusion model, such as a cache of another node."""
    if host_is_old:
        as_before_flux_2(monkeypatch)
    model, clip, _ = host.run_node("GAGDemoLoader", kind="transformer")
    patches, outputs = [], []
    model.model.diffusion_model.final_layer.register_forward_hook(lambda _, __, out: patches.append(out))

    def watch(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        outputs.append(executor(x, *args, **kwargs))
        assert outputs[-1].shape == x.shape
        return outputs[-1]

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", watch)
    red = host.encode(clip, "a red circle")
    sampled(model, red, red, host.empty_latent(), 2)
    assert len(outputs) == len(patches) == 2
    for out, patch in zip(outputs, patches, strict=True):
        assert torch.equal(out, rearrange(patch, "b (h w) (c p q) -> b c (h p) (w q)", h=8, p=4, q=4))


def test_the_transformer_draws_the_same_on_older_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, drawn = "a red circle left of a blue square", []
    for host_is_old in (False, True):
        if host_is_old:
            as_before_flux_2(monkeypatch)
        model, clip, vae = host.run_node("GAGDemoLoader", kind="transformer")
        drawn.append([pictures(one, clip, vae, prompt, 1, 4) for one in (model, host.guide(model, strength=4.0))])
    (plain, guided), (old_plain, old_guided) = drawn
    assert not torch.equal(plain, guided)
    assert torch.equal(old_plain, plain) and torch.equal(old_guided, guided)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of standard, few-step, transformer, got 'turbo'"):
        host.run_node("GAGDemoLoader", kind="turbo")


@with_each_cfg_model
def test_guidance_changes_the_pictures_and_keeps_the_colours(kind: str) -> None:
    model, clip, vae = host.run_node("GAGDemoLoader", kind=kind)
    prompt = "a red circle left of a blue square"
    plain = pictures(model, clip, vae, prompt)
    out = pictures(host.guide(model, "beside CFG"), clip, vae, prompt)
    assert not torch.equal(out, plain)
    assert int((has_colour(out, "red") & has_colour(out, "blue")).sum()) >= 6


def test_the_unet_has_five_text_attentions_of_which_one_is_in_the_middle() -> None:
    model, clip, vae = host.run_node("GAGDemoLoader")
    (gentle,) = host.run_node("GAGuidance", model=model)
    with record_calls(gentle) as calls:
        pictures(gentle, clip, vae, "a red circle", 1)
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
    _, clip, _ = host.run_node("GAGDemoLoader")
    with pytest.raises(ValueError, match=r"^The demo model does not know 'pink', 'dog'; describe one to") as raised:
        host.encode(clip, "A pink circle above a dog, a (pink:1.2) one")
    assert "colours: red, green, blue" in str(raised.value) and len(str(raised.value)) < 260
    with pytest.raises(ValueError, match=r"does not know 'b', 'c', 'd', \.\.\.; describe"):
        host.encode(clip, "b c d e f")


def test_the_words_that_the_message_names_are_those_of_the_pictures() -> None:
    """Each of them is known too."""
    groups = text_encoder.WORD_GROUPS
    assert set(groups["colours"]) == set(pictures_of_training.COLOURS)
    assert set(groups["shapes"]) == set(pictures_of_training.SHAPES)
    for place in pictures_of_training.RELATIONS:
        assert any(words.split()[0] == place for words in groups["places"])
    _, clip, _ = host.run_node("GAGDemoLoader")
    host.encode(clip, " ".join(words for group in groups.values() for words in group))


def test_a_prompt_that_is_too_long_is_refused() -> None:
    _, clip, _ = host.run_node("GAGDemoLoader")
    with pytest.raises(ValueError, match="reads up to 75 words and marks, got 76"):
        host.encode(clip, "red " * 76)


@pytest.mark.parametrize("kind", demo_model.WEIGHTS)
def test_clip_text_encode_gives_the_context_of_the_training(kind: str) -> None:
    """Bit by bit, so that pictures and measurements stay as they were."""
    _, clip, _ = host.run_node("GAGDemoLoader", kind=kind)
    weights, metadata = comfy.utils.load_torch_file(
        str(demo_model.ASSETS / demo_model.WEIGHTS[kind]), return_metadata=True
    )
    encoder = text_encoder.DemoTextEncoder(metadata["vocabulary"].split(" "))
    own = comfy.utils.state_dict_prefix_replace(weights, {"text.": ""}, filter_keys=True)
    encoder.load_state_dict({key: value.float() for key, value in own.items()})
    for text in ("A red circle, left of two  blue squares.", ""):
        ((context, values),) = host.encode(clip, text)
        assert context.shape == (1, 77, 96) and context.device.type == "cpu"
        assert torch.equal(context, encoder.encode([text]))
        assert torch.equal(values.pop("pooled_output"), torch.zeros(1, 4)) and not values


def test_weights_in_brackets_scale_the_difference_to_the_empty_prompt() -> None:
    _, clip, _ = host.run_node("GAGDemoLoader")
    plain, weighted, empty = (
        host.encode(clip, text)[0][0][0] for text in ("a red circle", "a (red:1.5) (circle:0.5)", "")
    )
    expected = plain.clone()
    for token, weight in ((2, 1.5), (3, 0.5)):
        expected[token] = empty[token] + weight * (plain[token] - empty[token])
    torch.testing.assert_close(weighted, expected)
    assert float((weighted - plain).abs().max()) > 0.1


def test_tokens_have_their_weights_and_words() -> None:
    _, clip, _ = host.run_node("GAGDemoLoader")
    (tokens,) = clip.tokenize("a (red:1.5) circle", return_word_ids=True)["gag_demo"]
    assert len(tokens) == 77
    assert [token[1:] for token in tokens[:6]] == [(1.0, 0), (1.0, 1), (1.5, 2), (1.0, 3), (1.0, 0), (1.0, 0)]
    assert [token[:2] for token in tokens] == clip.tokenize("a (red:1.5) circle")["gag_demo"][0]


def test_the_tokens_of_another_encoder_are_a_key_that_is_not_there() -> None:
    """Nodes for other models ask for them by name; code that expects a missing name goes on."""
    _, clip, _ = host.run_node("GAGDemoLoader")
    tokens = clip.tokenize("a red circle")
    assert "l" not in tokens and tokens.get("l") is None and list(tokens) == ["gag_demo"]
    sentence = "a single text encoder, got a node that asks for another ('t5xxl'); use CLIP Text Encode instead."
    with pytest.raises(KeyError) as raised:
        tokens["t5xxl"]
    assert str(raised.value) == f"The demo model has {sentence}"
    tokens["l"] = []
    assert torch.equal(clip.encode_from_tokens(tokens), clip.encode_from_tokens(clip.tokenize("a red circle")))


def test_marks_of_other_models_in_a_prompt_are_refused() -> None:
    _, clip, _ = host.run_node("GAGDemoLoader")
    for mark in ("<Prompt Start>", "<|im_start|>"):
        with pytest.raises(ValueError, match=rf"plain words, got '{re.escape(mark)}', which .*; use CLIP Text Encode"):
            host.encode(clip, f"Draw. {mark} a red circle")
    with pytest.raises(ValueError, match="does not know '>', '<'"):
        host.encode(clip, "a red circle > < a blue square")


def test_the_text_encoder_writes_no_text() -> None:
    """ComfyUI's node Generate Text asks this of it in later versions."""
    _, clip, _ = host.run_node("GAGDemoLoader")
    with pytest.raises(ValueError, match=r"writes no text; give this node the clip of a language model\.$"):
        clip.cond_stage_model.generate(clip.tokenize("a red circle"), do_sample=False, max_length=8)


def test_the_clip_object_is_one_for_the_hosts_other_nodes() -> None:
    _, clip, _ = host.run_node("GAGDemoLoader")
    copy = clip.clone()
    copy.clip_layer(-1)
    assert torch.equal(host.encode(copy, "red")[0][0], host.encode(clip, "red")[0][0])
    copy.clip_layer(-2)
    with pytest.raises(ValueError, match=r"has only its last layer \(-1\), got -2; remove CLIP Set Last Layer\.$"):
        host.encode(copy, "red")
    host.encode(clip, "red")
    assert clip.get_sd().keys() == {f"encoder.{key}" for key in clip.cond_stage_model.encoder.state_dict()}


@with_each_cfg_model
def test_the_hosts_nodes_for_conditioning_work(kind: str) -> None:
    model, clip, _ = host.run_node("GAGDemoLoader", kind=kind)
    (guided,) = host.run_node("GAGuidance", model=model)
    red, blue, nothing = (host.encode(clip, text) for text in ("a red circle", "a blue square", ""))
    nodes = host.NODES
    alone = sampled(guided, red, nothing, host.empty_latent(), 2)
    for both in (
        nodes["ConditioningConcat"]().concat(red, blue)[0],
        nodes["ConditioningCombine"]().combine(red, blue)[0],
        nodes["ConditioningAverage"]().addWeighted(red, blue, 0.5)[0],
        nodes["ConditioningSetTimestepRange"]().set_range(red, 0.0, 0.5)[0] + blue,
    ):
        out = sampled(guided, both, nothing, host.empty_latent(), 2)
        assert torch.isfinite(out).all() and not torch.equal(out, alone)


@pytest.mark.parametrize("kind", demo_model.WEIGHTS)
def test_a_latent_of_another_size_is_refused(kind: str) -> None:
    model, clip, _ = host.run_node("GAGDemoLoader", kind=kind)
    red = host.encode(clip, "a red circle")
    with pytest.raises(ValueError, match=r"draws 256x256 pixels, got a latent for 512x384; set .* Latent Image to 256"):
        sampled(model, red, red, host.empty_latent(512, 384), 1)
    with pytest.raises(ValueError, match=r"takes latents of 3x32x32 values, got 4x32x32; begin with Empty Latent"):
        sampled(model, red, red, {"samples": torch.ones(1, 4, 32, 32)}, 1)


def test_the_vae_makes_blocks_of_pixels_and_means_of_blocks() -> None:
    _, _, vae = host.run_node("GAGDemoLoader")
    latent = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    (images,) = host.NODES["VAEDecode"]().decode(vae, {"samples": latent})
    expected = ((latent + 1) / 2).repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)
    assert torch.equal(images, expected)
    (tiled,) = host.NODES["VAEDecodeTiled"]().decode(vae, {"samples": latent}, 64, 16)
    torch.testing.assert_close(tiled, images)
    (encoded,) = host.NODES["VAEEncode"]().encode(vae, images + 0.01 * torch.tensor([1.0, -1.0]).repeat(128)[:, None])
    torch.testing.assert_close(encoded["samples"], latent)
    assert vae.spacial_compression_encode() == vae.spacial_compression_decode() == 8


def test_a_picture_is_changed_with_the_vae() -> None:
    """Image to image: at a small denoise much of the picture stays."""
    model, clip, vae = host.run_node("GAGDemoLoader")
    picture = pictures(model, clip, vae, "a red circle", 1)
    (latent,) = host.NODES["VAEEncode"]().encode(vae, picture)
    red, nothing = host.encode(clip, "a red circle"), host.encode(clip, "")
    (out,) = host.NODES["KSampler"]().sample(model, 5, 12, 4.0, "euler", "simple", red, nothing, latent, 0.2)
    (changed,) = host.NODES["VAEDecode"]().decode(vae, out)
    assert 0 < float((changed - picture).abs().mean()) < 0.1
