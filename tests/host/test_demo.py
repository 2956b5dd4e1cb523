# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo model: the pack's own nodes give real pictures, and guidance acts on them."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

import host_process as host
from recorder import recording

demo_model = host.pack_module("nodes.demo_model")
SHA256 = "2ef60953871e578b4102fa67667d6a4cc7a05e5037163789f59360b784b22ff0"
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0)}


def pictures(model: Any, encoder: Any, vae: Any, prompt: str, count: int = 8) -> Tensor:
    """Finished pictures ``[count, 32, 32, 3]`` in 0..1."""
    (positive,) = host.run_node("GAGDemoPrompt", text_encoder=encoder, text=prompt)
    (negative,) = host.run_node("GAGDemoPrompt", text_encoder=encoder, text="")
    (latent,) = host.run_node("GAGDemoEmptyLatent", batch_size=count)
    (out,) = host.NODES["KSampler"]().sample(model, 3, 12, 4.0, "euler", "normal", positive, negative, latent)
    (images,) = host.NODES["VAEDecode"]().decode(vae, out)
    return images


def coloured(images: Tensor, colour: str) -> Tensor:
    """Which of the pictures have more than a few pixels near a colour."""
    distance = (images - torch.tensor(COLOURS[colour])).square().sum(-1)
    return (distance < 0.35).flatten(1).sum(1) >= 6


def test_the_weights_are_those_that_were_taken_in() -> None:
    assert hashlib.sha256(demo_model.WEIGHTS.read_bytes()).hexdigest() == SHA256


def test_it_draws_the_colours_it_is_asked_for() -> None:
    model, encoder, vae = host.run_node("GAGDemoLoader")
    images = pictures(model, encoder, vae, "a red circle left of a blue square")
    assert images.shape == (8, 32, 32, 3)
    assert int((coloured(images, "red") & coloured(images, "blue")).sum()) >= 6
    others = pictures(model, encoder, vae, "a green circle left of a yellow square")
    assert int((coloured(others, "green") & coloured(others, "yellow")).sum()) >= 6
    assert int((coloured(others, "red") | coloured(others, "blue")).sum()) <= 2


def test_guidance_acts_on_four_of_its_five_attentions_and_keeps_the_picture() -> None:
    model, encoder, vae = host.run_node("GAGDemoLoader")
    prompt = "a red circle left of a blue square"
    plain = pictures(model, encoder, vae, prompt)
    (gentle,) = host.run_node("GAGuidance", model=model)
    with recording(gentle) as calls:
        out = pictures(gentle, encoder, vae, prompt)
    assert len({c.module for c in calls if c.module.endswith("attn2")}) == 5
    assert len(host.pack_module("nodes.families").family_of(model)[1]["m"]) == 1
    assert not torch.equal(out, plain)
    assert int((coloured(out, "red") & coloured(out, "blue")).sum()) >= 6


def test_words_it_does_not_know_are_named() -> None:
    _, encoder, _ = host.run_node("GAGDemoLoader")
    with pytest.raises(ValueError, match=r"does not know 'purple', 'dog'; it knows a, of, red"):
        host.run_node("GAGDemoPrompt", text_encoder=encoder, text="A purple circle above a dog")


def test_more_words_than_it_reads_are_refused() -> None:
    _, encoder, _ = host.run_node("GAGDemoLoader")
    with pytest.raises(ValueError, match="reads up to 75 words, got 76"):
        host.run_node("GAGDemoPrompt", text_encoder=encoder, text="red " * 76)


def test_a_context_has_the_shape_that_the_unet_reads() -> None:
    _, encoder, _ = host.run_node("GAGDemoLoader")
    assert encoder.encode("").shape == (1, 77, 64)
    assert torch.equal(encoder.encode("A red circle"), encoder.encode("a red  circle"))
    assert not torch.equal(encoder.encode("a red circle"), encoder.encode("a blue circle"))
