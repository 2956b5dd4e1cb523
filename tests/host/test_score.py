# SPDX-License-Identifier: GPL-3.0-or-later
"""GAG Score in the real host, with a tiny CLIP model of the host's own classes, and with the demo model's check."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd1_clip
import comfy.utils
import pytest
import torch
from torch import Tensor

import host_process as host
import tiny_clip

node = host.NODES["GAGScore"]
score = host.pack_module("nodes.score")
clip_score = host.pack_module("nodes.scoring.clip_score")
NOT_TRUSTED = "Do not trust these scores"


class Halves:
    """The two halves of a tiny CLIP model, with random weights or with a text projection that knows plain colours."""

    def __init__(self, folder: Path) -> None:
        self.text_weights = tiny_clip.filled(tiny_clip.text_model(tiny_clip.TEXT), 4)
        self.vision_weights = tiny_clip.filled(tiny_clip.vision_model(), 5)
        self.vision = tiny_clip.load_vision(self.vision_weights, folder)
        self.random = tiny_clip.load_text(self.text_weights)
        self.text = tiny_clip.load_text({**self.text_weights, "text_projection.weight": self._fitting().half()})

    def _fitting(self) -> Tensor:
        """Return the projection by which the texts of plain colours get the embeddings of their pictures."""
        colours = clip_score._COLOURS
        pictures = torch.tensor(list(colours.values())).float()[:, None, None].expand(-1, 28, 28, -1)
        images = clip_score.embed_pictures(self.vision, pictures)
        images = torch.nn.functional.normalize(images - images.mean(0), dim=-1)
        pooled = [
            self.random.encode_from_tokens(
                self.random.tokenize(f"a plain {name} picture"), return_pooled="unprojected"
            )[1]
            for name in colours
        ]
        found: Tensor = torch.linalg.lstsq(torch.cat(pooled).double(), images.double(), driver="gelsd").solution
        return found.T.float()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    return Halves(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def encoder() -> Any:
    return host.run_node("GAGDemoLoader")[1]


def pictures(count: int, side: int = 40, seed: int = 1) -> Tensor:
    return torch.rand(count, side, side + 8, 3, generator=torch.Generator().manual_seed(seed))


def run(**inputs: Any) -> tuple[str, list[str], dict[str, Any]]:
    """Execute the node as the host does, with lists, and return its outputs."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
    summary, labels, data = node.execute(**{"prompt": ["a dog"], **lists}).result
    return summary, labels, json.loads(data)


def run_clip(halves: Halves, **inputs: Any) -> tuple[str, list[str], dict[str, Any]]:
    return run(**{"clip_vision": halves.vision, "clip": halves.text, **inputs})


def test_the_score_is_the_cosine_of_the_projected_embeddings(halves: Halves) -> None:
    """Both halves are computed again, with the projection that ComfyUI's SD1.5 encoder leaves out."""
    text = tiny_clip.text_model(tiny_clip.TEXT)
    text.load_state_dict(
        {key: value.float() for key, value in halves.text.cond_stage_model.clip_l.transformer.state_dict().items()}
    )
    images = pictures(3)
    embedded = torch.cat([halves.vision.encode_image(image[None])["image_embeds"].detach() for image in images])
    for prompt in ("a red circle", "an old house by the sea"):
        tokens = [token for token, *_ in comfy.sd1_clip.SD1Tokenizer().tokenize_with_weights(prompt)["l"][0]]
        with torch.no_grad():
            projected = text(torch.tensor([tokens]))[2][0]
        cosines = torch.nn.functional.cosine_similarity(projected, embedded)
        _, labels, data = run_clip(halves, images=images, prompt=prompt)
        found = data["cells"][0]["scores"]
        assert found == pytest.approx([100 * max(0.0, float(cosine)) for cosine in cosines], abs=0.05)
        assert labels == [f"CLIP score {value:.2f}" for value in found]
        assert data["prompts"] == [prompt]


def test_pairs_are_compared_picture_by_picture(halves: Halves) -> None:
    images, baseline = pictures(6, seed=1), pictures(6, seed=2)
    _, _, data = run_clip(halves, images=images, baseline=baseline)
    (cell,) = data["cells"]
    differences = torch.tensor(cell["scores"]) - torch.tensor(data["baseline"])
    assert cell["difference"]["mean"] == pytest.approx(float(differences.mean()), abs=1e-4)
    assert cell["difference"]["error"] == pytest.approx(float(differences.std() / 6**0.5), abs=1e-4)
    summary, _, data = run_clip(halves, images=images, baseline=images.clone())
    assert "on 6 pairs +0.00 ± 0.00: no difference at all." in summary
    summary, _, _ = run_clip(halves, images=images[:1], baseline=baseline[:1])
    assert "one pair tells nothing" in summary


def test_a_batch_and_a_list_of_pictures_have_the_same_scores(halves: Halves, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(5)
    whole = run_clip(halves, images=images)[2]["cells"][0]["scores"]
    single = run_clip(halves, images=list(images.split(1)))[2]["cells"][0]["scores"]
    monkeypatch.setattr(score, "_AT_ONCE", 2)
    parts = run_clip(halves, images=images)[2]["cells"][0]["scores"]
    assert single == pytest.approx(whole, abs=0.02) and parts == pytest.approx(whole, abs=0.02)


def test_each_setting_of_a_sweep_is_compared_with_the_pictures_without_gag(halves: Halves) -> None:
    batches = [pictures(4, seed=seed) for seed in (1, 2, 3)]
    names = ["without GAG", "alpha 1.5", "alpha 2"]
    summary, labels, data = run_clip(halves, images=batches, labels=names)
    off, *others = data["cells"]
    assert off["difference"] is None and data["baseline"] == off["scores"]
    for cell in others:
        differences = torch.tensor(cell["scores"]) - torch.tensor(off["scores"])
        assert cell["difference"]["mean"] == pytest.approx(float(differences.mean()), abs=1e-4)
    assert [label.splitlines()[0] for label in labels] == names
    assert "corrected for 2 comparisons" in summary and summary.splitlines()[1].startswith("alpha 1.5: CLIP score")
    # GAG Grid takes these labels with the same pictures.
    host.NODES["GAGGrid"].execute(images=batches, columns=[0], labels=labels)
    _, labels, _ = run_clip(halves, images=torch.cat(batches)[:3], labels=names)
    assert len(labels) == 3


def test_each_batch_can_have_a_prompt_of_its_own(halves: Halves) -> None:
    batches = [pictures(2, seed=seed) for seed in (1, 2)]
    _, labels, data = run_clip(halves, images=batches, prompt=["a dog", "a cat"], baseline=batches)
    alone = [
        run_clip(halves, images=batch, prompt=prompt)[2]["cells"][0]["scores"]
        for batch, prompt in zip(batches, ("a dog", "a cat"), strict=True)
    ]
    assert data["cells"][0]["scores"] == pytest.approx(alone[0] + alone[1], abs=0.02)
    assert data["prompts"] == ["a dog", "a cat"] and len(labels) == 2


def test_halves_that_cannot_tell_colours_are_not_trusted(halves: Halves) -> None:
    assert NOT_TRUSTED not in run_clip(halves, images=pictures(2))[0]
    summary, _, data = run_clip(halves, images=pictures(2), clip=halves.random)
    assert NOT_TRUSTED in summary and NOT_TRUSTED in data["notes"][0]


def test_a_long_prompt_is_noted(halves: Halves) -> None:
    assert "75 tokens" not in run_clip(halves, images=pictures(1), prompt="dog " * 75)[0]
    assert "CLIP reads the first 75 tokens" in run_clip(halves, images=pictures(1), prompt="dog " * 76)[0]


def test_a_model_without_the_weights_of_its_projection_is_refused(halves: Halves) -> None:
    """ComfyUI leaves what was in memory in their place: zeros, NaN, or anything."""
    for value in (0.0, math.nan):
        clip = tiny_clip.load_text(
            {**halves.text_weights, "text_projection.weight": torch.full((64, 64), value).half()}
        )
        with pytest.raises(ValueError, match=r"^clip must have the weights of its text projection, .*; use Load CLIP"):
            run_clip(halves, images=pictures(1), clip=clip)


def test_halves_of_different_sizes_are_refused(halves: Halves, tmp_path: Path) -> None:
    config = {**tiny_clip.VISION, "projection_dim": 48}
    vision = tiny_clip.load_vision(tiny_clip.filled(tiny_clip.vision_model(config), 6), tmp_path, config)
    with pytest.raises(ValueError, match=r"halves of one CLIP model, got a projection of the text to 64 .* to 48 \("):
        run_clip(halves, images=pictures(1), clip_vision=vision)


def test_models_without_a_projection_are_refused(halves: Halves) -> None:
    class SigLIP:
        def encode_image(self, image: Tensor) -> dict[str, Tensor]:
            return {"image_embeds": torch.zeros(len(image), 5, 64)}

    with pytest.raises(ValueError, match=r"^clip_vision must be a CLIP vision model with a projection, which SigLIP"):
        run_clip(halves, images=pictures(1), clip_vision=SigLIP())
    language = type("T5", (), {"cond_stage_model": torch.nn.Linear(2, 2)})()
    with pytest.raises(
        ValueError, match=r"^clip must be a CLIP text model with a projection, which T5, .*, got Linear;"
    ):
        run_clip(halves, images=pictures(1), clip=language)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing connected": ({"clip": [], "clip_vision": []}, "connect clip_vision and clip."),
    "half": ({"clip": []}, "GAG Score needs clip_vision and clip, or the clip of GAG Demo; connect clip."),
    "two": ({"clip": [1, 2]}, "clip must be one, got a list of 2."),
    "clip": ({"clip": "a"}, "clip must come from Load CLIP or a checkpoint's loader, got str."),
    "clip_vision": ({"clip_vision": "a"}, "clip_vision must come from Load CLIP Vision, got str."),
    "empty prompt": ({"prompt": " "}, "prompt must be the text that the pictures were made from, got an empty text."),
    "prompts": ({"prompt": ["a", "b"]}, "prompt must be one for all pictures, .* got 2 for 1 batches."),
    "prompt": ({"prompt": [5]}, "prompt must be text, got 5."),
    "no picture": ({"images": [torch.rand(8, 8)]}, r"images must be pictures .* got \[\(8, 8\)\]."),
    "baseline": ({"baseline": ["a"]}, r"baseline must be pictures .* got \['str'\]."),
    "unequal": ({"baseline": pictures(3)}, "images must be as many as the pictures without guidance, .* got 4 and 3."),
    "NaN": ({"baseline": torch.full((4, 8, 8, 3), math.nan)}, "baseline must be finite numbers, .* in picture 1."),
    "labels": ({"labels": ["a", "b"]}, "labels must be one for each of the pictures, got 2 for 4;"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused_in_a_sentence(case: str, halves: Halves) -> None:
    inputs, sentence = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=sentence) as raised:
        run_clip(halves, **{"images": pictures(4), **inputs})
    assert "\n" not in str(raised.value)


def test_unequal_batches_of_a_sweep_are_refused(halves: Halves) -> None:
    with pytest.raises(ValueError, match="got 2 and 3"):
        run_clip(halves, images=[pictures(3), pictures(2)], labels=["without GAG", "alpha 2"])


def test_an_interrupt_ends_between_pictures_and_progress_is_told(
    halves: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(score, "_AT_ONCE", 2)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: told.append((value, total)))
    # Newer hosts leave out what comes within this many seconds of the message before.
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    run_clip(halves, images=pictures(5), baseline=pictures(5))
    assert told == [(2, 11), (4, 11), (5, 11), (7, 11), (9, 11), (10, 11), (11, 11)]

    def interrupt(value: int, *_: Any, **__: Any) -> None:
        if value >= 4:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_clip(halves, images=pictures(5))
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    assert len(run_clip(halves, images=pictures(5))[1]) == 5


# --- the demo model's check ---------------------------------------------------------------------------------------


def drawn(colours: list[str]) -> Tensor:
    """Return pictures of one square each."""
    scenes = host.pack_module("nodes.demo.scenes")
    made = torch.tensor(scenes.BACKGROUND).repeat(len(colours), 32, 32, 1)
    for picture, colour in zip(made, colours, strict=True):
        picture[5:14, 6:15] = torch.tensor(scenes.COLOURS[colour])
    return made.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)  # as the demo's VAE makes them


def test_pictures_of_the_demo_model_are_right_or_wrong(encoder: Any) -> None:
    good, bad = drawn(["red"] * 7), drawn(["red"] + ["blue"] * 6)
    summary, labels, data = run(images=good, baseline=bad, prompt="a red square", clip=encoder)
    assert summary.startswith("7 of 7 pictures right; baseline 1; on 7 pairs 6 turned right and 0 wrong: better.")
    assert labels == ["right"] * 7
    assert data["score"] == "right" and data["cells"][0]["scores"] == [1.0] * 7
    summary, labels, _ = run(images=bad, baseline=good, prompt="a red square", clip=encoder)
    assert "0 turned right and 6 wrong: worse." in summary and labels[:2] == ["right", "wrong"]


def test_every_attribute_of_the_prompt_counts(encoder: Any) -> None:
    picture = drawn(["red"])
    for prompt in ("a red circle", "two red squares", "a blue square", "a red square and a blue cross"):
        assert run(images=picture, prompt=prompt, clip=encoder)[1] == ["wrong"]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            {"images": pictures(1, 64)},
            "images must be the demo model's own pictures of 256 x 256 pixels, got 72 x 64 with 3",
        ),
        ({"prompt": "a dog"}, "The demo model does not know 'dog'"),
        ({"prompt": "a red"}, "prompt must describe one to three kinds of shapes, .* got 'a red'."),
        (
            {"clip_vision": "a"},
            "GAG Score needs no clip_vision with the clip of GAG Demo, got both; disconnect clip_vision.",
        ),
    ],
)
def test_wrong_inputs_of_the_demo_are_refused_in_a_sentence(
    encoder: Any, inputs: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        run(**{"images": drawn(["red"]), "prompt": "a red square", "clip": encoder, **inputs})
