# SPDX-License-Identifier: GPL-3.0-or-later
"""CLIP scores of a checkpoint, from the command to its table, with ComfyUI's loaders on small files of SD1.5's kind.

Only the sizes of CLIP's two halves are passed to the loaders, because ComfyUI has the usual sizes built in.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import comfy.clip_vision
import comfy.sd
import comfy.sd1_clip
import comfy.taesd.taesd
import pytest
import safetensors.torch
import torch

import host_process as host
import tiny_clip
from benchmarks.quality import checkpoint, study
from benchmarks.quality.methods import BASELINE

_UNET = {
    **host.CONFIGS["sd15"][1],
    "model_channels": 320,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "context_dim": 768,
}
_TEXT = {**tiny_clip.LAYERS, "hidden_size": 768}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoint")
    unet = host.build("SD15", _UNET).model.diffusion_model
    checkpoint = {f"model.diffusion_model.{key}": value.half() for key, value in unet.state_dict().items()}
    checkpoint.update(tiny_clip.filled(comfy.taesd.taesd.TAESD(), 2, "first_stage_model."))
    checkpoint.update(tiny_clip.filled(tiny_clip.text_model(_TEXT), 3, "cond_stage_model.transformer."))
    checkpoint.pop("cond_stage_model.transformer.text_projection.weight")  # SD1.5 has none
    clip = {
        **tiny_clip.filled(tiny_clip.text_model(tiny_clip.TEXT), 4),
        **tiny_clip.filled(tiny_clip.vision_model(), 5),
    }
    paths = {name: folder / f"{name}.safetensors" for name in ("checkpoint", "clip", "half_clip")}
    safetensors.torch.save_file(checkpoint, paths["checkpoint"])
    safetensors.torch.save_file(clip, paths["clip"])
    safetensors.torch.save_file({"text_projection.weight": torch.zeros(1)}, paths["half_clip"])
    paths["prompts"] = folder / "prompts.txt"
    paths["prompts"].write_text("a red circle\n\n  a dog on a bicycle\n", encoding="utf-8")
    return paths


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pass the sizes to ComfyUI's loaders."""
    monkeypatch.setattr(comfy.clip_vision, "load_clipvision_from_sd", partial(tiny_clip.load_vision, folder=tmp_path))
    for name, options in (
        ("load_checkpoint_guess_config", {"te_model_options": {"clip_l_model_config": _TEXT}}),
        ("load_text_encoder_state_dicts", {"model_options": {"model_config": tiny_clip.TEXT}}),
    ):
        monkeypatch.setattr(comfy.sd, name, partial(getattr(comfy.sd, name), **options))


def _command(files: dict[str, Path], results: Path, *more: str, clip: str = "clip") -> list[str]:
    given = ["--checkpoint", str(files["checkpoint"]), "--prompts", str(files["prompts"]), "--clip", str(files[clip])]
    return [*given, "--results", str(results), "--steps", "2", "--seeds", "1", "--size", "64", "--threads", "1", *more]


@pytest.mark.usefixtures("small")
def test_from_the_command_to_the_table(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    assert study.main(_command(files, results)) == 0
    table = capsys.readouterr().out
    for method in checkpoint.COMPARED:
        assert f"| {method.name} | 2 |" in table
    (file,) = (results / checkpoint.FOLDER).glob("*.jsonl")
    lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2 * len(checkpoint.COMPARED)
    assert {line["prompt"] for line in lines} == {"a red circle", "a dog on a bicycle"}
    assert lines[0]["sha256"] == checkpoint.sha256_of(files["checkpoint"])
    pictures = {(file.parent / file.stem / line["picture"]).read_bytes() for line in lines}
    assert len(pictures) == len(lines)  # every method changed the picture

    monkeypatch.setattr(checkpoint, "one_picture", lambda *_: pytest.fail("existing results were measured again"))
    assert study.main(_command(files, results)) == 0
    assert capsys.readouterr().out == table
    assert table.strip() in checkpoint.section(results)


@pytest.mark.usefixtures("small")
def test_the_score_is_the_cosine_of_the_two_embeddings(files: dict[str, Path]) -> None:
    scorer = checkpoint.Scorer(files["clip"])
    picture = torch.rand(1, 28, 28, 3, generator=torch.Generator().manual_seed(1))
    weights = safetensors.torch.load_file(files["clip"])
    text = tiny_clip.text_model(tiny_clip.TEXT)
    text.load_state_dict({key: value.float() for key, value in weights.items() if key.startswith("text_")})
    cosines = []
    for prompt in ("a red circle", "a dog", "an old house by the sea"):
        (score,) = scorer.scores(picture, prompt)
        tokens = [token for token, *_ in comfy.sd1_clip.SD1Tokenizer().tokenize_with_weights(prompt)["l"][0]]
        with torch.no_grad():
            embedded = text(torch.tensor([tokens]))[2][0]
            image = scorer.vision.encode_image(picture)["image_embeds"][0]
        cosine = float(embedded @ image / embedded.norm() / image.norm())
        assert score == pytest.approx(100 * max(0.0, cosine), abs=0.05)
        cosines.append(cosine)
    assert len(set(cosines)) == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"clip": "half_clip"}, "has no visual_projection.weight: --clip needs a complete CLIP model"),
        ({"checkpoint": "none"}, "There is no file"),
        ({"prompts": "empty"}, "has no prompts: one per line"),
    ],
    ids=["half a CLIP", "no checkpoint", "no prompts"],
)
@pytest.mark.usefixtures("small")
def test_bad_files_are_reported_in_one_sentence(
    change: dict[str, str], expected: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    given = {**files, "none": tmp_path / "none", "empty": empty}
    given.update({name: given[other] for name, other in change.items()})
    assert study.main(_command(given, tmp_path / "results")) == 1
    (sentence,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("quality: "))
    assert expected in sentence


def test_prompts_and_clip_are_required(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["--checkpoint", str(files["checkpoint"])])
    assert "--checkpoint needs --prompts and --clip as well" in capsys.readouterr().err


def test_differences_are_between_pictures_of_one_prompt_and_seed() -> None:
    preset = next(method for method in checkpoint.COMPARED if method.family == "preset paper")
    scores = {BASELINE: (20.0, 30.0, 40.0), preset: (21.0, 29.0, 44.0)}
    lines = [
        {"family": method.family, "setting": method.setting, "prompt": "a", "seed": seed, "score": score}
        for method, listed in scores.items()
        for seed, score in enumerate(listed)
    ]
    error = torch.tensor([1.0, -1.0, 4.0]).std() / 3**0.5
    assert f"| preset paper, strength 1 | 3 | 31.333 | +1.333 ± {error:.3f} | 2 : 1 |" in checkpoint.table(lines[::-1])
