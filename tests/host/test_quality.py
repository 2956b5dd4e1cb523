# SPDX-License-Identifier: GPL-3.0-or-later
"""Quality benchmark in ComfyUI: batches of captions, the controls, and the command from end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import host_process as host
from benchmarks.quality import evidence, gain, model_files, read_outs, sampling, study
from benchmarks.quality.methods import BASELINE, METHODS, NODE, SPARSE, Method, applied
from benchmarks.quality.records import REPORT, TUNE, Results
from benchmarks.quality.sampling import Model, Task
from training import captions, text

CAPTIONS = 3
STEPS = 1
# Largest difference of a pixel by rounding in another order, which a model with random weights magnifies.
ROUNDING = 1e-3
SHARPER = Method("control", temperature=0.5)


def _weights(folder: Path, name: str) -> Path:
    """Write an export with random weights."""
    diffusion_model = host.pack_module("nodes.demo.models").without_weights(name).diffusion_model
    host.fill(diffusion_model, 3)
    torch.manual_seed(3)
    encoder = text.new_encoder()
    tensors = {f"{name}.{key}": value for key, value in diffusion_model.state_dict().items()}
    tensors.update({f"text.{key}": value for key, value in encoder.state_dict().items()})
    path = folder / f"{name}.safetensors"
    safetensors.torch.save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module", params=["unet", "mmdit"])
def model(request: pytest.FixtureRequest, folder: Path) -> Model:
    return sampling.load(_weights(folder, request.param))


@pytest.fixture(scope="module")
def task() -> Task:
    (only,) = sampling.tasks(TUNE, 0, CAPTIONS, CAPTIONS)
    return only


def _made(
    model: Model,
    task: Task,
    method: Method = BASELINE,
    cfg: float = 1.0,
    softening: float = 1.0,
    steps: int = STEPS,
) -> Tensor:
    empty = sampling.empty_prompt(model) if method.control == read_outs.EMPTY else None
    with applied(model.patcher, method, softening, empty) as patched:
        return sampling.pictures(model, patched, task.captions, task.noise, steps, cfg)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_captions_of_a_batch_do_not_affect_each_other(model: Model, task: Task, cfg: float, guided: bool) -> None:
    """Each picture is the same as when sampled alone, with its own caption and its own noise."""
    inputs = {**host.preset_inputs("paper"), "guidance_scale": 2.0, "norm_mode": "relative", "norm_threshold": 0.1}
    method = Method("GAG", node=NODE, inputs=inputs) if guided else BASELINE
    together = _made(model, task, method, cfg)
    for index in range(CAPTIONS):
        (alone,) = sampling.tasks(TUNE, index, 1, 1)
        assert (together[index] - _made(model, alone, method, cfg)[0]).abs().max() < ROUNDING
    swapped = task._replace(captions=task.captions[::-1])
    assert (together[0] - _made(model, swapped, method, cfg)[0]).abs().max() > 10 * ROUNDING


def test_noise_and_captions_depend_on_the_split_and_the_index_alone(task: Task) -> None:
    parts = list(sampling.tasks(TUNE, 0, CAPTIONS, 2))
    assert [caption for part in parts for caption in part.captions] == task.captions
    assert torch.equal(torch.cat([part.noise for part in parts]), task.noise)
    (later,) = sampling.tasks(TUNE, 2, 1, 64)
    assert later.captions == task.captions[2:] and torch.equal(later.noise, task.noise[2:])
    (others,) = sampling.tasks(REPORT, 0, CAPTIONS, CAPTIONS)
    assert not set(others.captions) & set(task.captions) and not torch.equal(others.noise, task.noise)
    assert sampling.words(TUNE, 1) == [len(captions.words_of(task.captions[0]))]


def test_temperature_1_is_no_change(model: Model, task: Task) -> None:
    assert (_made(model, task, Method("control", temperature=1 + 1e-7)) - _made(model, task)).abs().max() < ROUNDING
    assert torch.equal(_made(model, task, Method("control", temperature=1.0)), _made(model, task))


def test_a_sharper_softmax_undoes_softening(model: Model, task: Task) -> None:
    """Both are the same temperature. Guidance of a softened model acts on the softened attention."""
    plain, soft = _made(model, task), _made(model, task, softening=2.0)
    assert (soft - plain).abs().max() > 10 * ROUNDING
    assert torch.equal(_made(model, task, SHARPER, softening=2.0), plain)
    inputs = {**host.preset_inputs("paper"), "rule": "pladis", "guidance_scale": 1e-5}
    nothing = Method("PLADIS", node=NODE, inputs=inputs)
    assert (_made(model, task, nothing, softening=2.0) - soft).abs().max() < ROUNDING


def test_a_sharper_softmax_scales_the_queries_of_the_guided_layers(folder: Path, task: Task) -> None:
    """The expected picture comes from ComfyUI's own patch of inputs to cross-attention, except in the middle block."""
    model = sampling.load(_weights(folder, "unet"))

    def scaled(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return (n if options["block"][0] == "middle" else n / SHARPER.temperature), context, value

    by_hand = model.patcher.clone()
    by_hand.set_model_attn2_patch(scaled)
    expected = sampling.pictures(model, by_hand, task.captions, task.noise, STEPS, 4.0)
    assert (expected - _made(model, task, cfg=4.0)).abs().max() > 10 * ROUNDING
    assert (_made(model, task, SHARPER, 4.0) - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("method", [m for m in METHODS if m.node], ids=lambda method: method.name)
def test_every_method_changes_the_pictures(method: Method, model: Model, task: Task) -> None:
    assert host.NODES.get(method.node) is not None
    if method.attention not in ("", model.attention):
        return  # the model has no such attention
    # A method that starts later does nothing in a single step.
    steps = 2 if method.inputs.get("start_percent") else STEPS
    assert not torch.equal(_made(model, task, method, steps=steps), _made(model, task, steps=steps))


def test_a_method_that_acts_on_nothing_is_an_error(model: Model, task: Task) -> None:
    idle = Method("idle", node=NODE, inputs={"start_percent": 1.0})
    with pytest.raises(RuntimeError, match="idle acted on no attention"):
        _made(model, task, idle)


def test_a_softened_model_is_softened_in_the_steps_without_guidance_too(model: Model, task: Task) -> None:
    inputs = {**host.preset_inputs("paper"), "guidance_scale": 2.0, "norm_mode": "relative", "strength": 1e-5}
    plain, soft = _made(model, task, steps=2), _made(model, task, softening=2.0, steps=2)
    assert (soft - plain).abs().max() > 10 * ROUNDING
    for part in ({"start_percent": 0.3}, {"end_percent": 0.3}):
        hardly = Method("hardly", node=NODE, inputs={**inputs, **part})
        assert (_made(model, task, hardly, softening=2.0, steps=2) - soft).abs().max() < ROUNDING
    never = Method("never", node=NODE, inputs={**inputs, "start_percent": 1.0})
    with pytest.raises(RuntimeError, match="never acted on no attention"):
        _made(model, task, never, softening=2.0, steps=2)


def test_the_evidence_page_is_written_from_the_results_in_the_repository(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "evidence.md"
    evidence.write(study.RESULTS, page, tmp_path / "assets" / "evidence")
    assert page.read_text("utf-8") == evidence.PAGE.read_text("utf-8"), "run python dev.py quality --report"


def test_the_gain_of_gag_is_measured_in_runs(model: Model) -> None:
    found = gain.measure(model, CAPTIONS)
    # The cap of the setting is 0.1 and its scale 10, so that no gain is above 1.
    assert -1.01 <= found.mean <= 1.01 and found.mean != 0.0
    assert all(0.0 <= deviation <= 2.0 for deviation in found[1:])


def test_nothing_is_left_behind(model: Model, task: Task) -> None:
    before = _made(model, task)
    _made(model, task, SHARPER, softening=2.0)
    assert torch.equal(_made(model, task), before)


def test_true_pictures_are_right(task: Task) -> None:
    samples = [captions.sample(TUNE, 0, index) for index in range(20)]
    pictures = torch.from_numpy(np.stack([one.picture for one in samples]))
    outcome = sampling.outcome(pictures, [one.scene for one in samples])
    assert outcome.right().mean() > 0.9
    assert np.isnan(outcome.rate("relation")) or outcome.rate("relation") > 0.9
    assert outcome.off_palette.max() < 0.01 and 0.5 < outcome.saturation.max() <= 1
    others = sampling.outcome(pictures.flip(0), [one.scene for one in samples])
    assert others.right().mean() < 0.3


def test_files_of_the_repository_hold_the_weights_that_were_measured() -> None:
    """So the commands on the page measure the same models anew."""
    cells = {cell.model: cell.weights for cell in Results(study.RESULTS).cells()}
    files = {model: model_files.file_of(model) for model in cells}
    for name, path in files.items():
        loaded = sampling.load(path)
        assert (loaded.label, loaded.weights) == (name, cells[name])
    everything = [*model_files.SHIPPED.values(), *model_files.KEPT.glob("*")]
    assert sorted(files.values()) == sorted(everything)


def test_by_default_new_exports_are_measured_or_else_the_models_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "EXPORTS", tmp_path)
    assert [model_files.model_of(path) for path in model_files.chosen([])][:3] == list(model_files.SHIPPED)
    export = tmp_path / "new.safetensors"
    export.touch()
    assert model_files.chosen([]) == [export] and model_files.model_of(export) == "new"


FEW = ["--steps", "1", "--captions", "2", "--held-out", "3", "--batch", "2", "--families", SPARSE]


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> Iterator[list[str]]:
    yield ["--weights", str(_weights(folder, "unet")), "--results", str(tmp_path), "--threads", "1", *FEW]


def test_the_command_from_end_to_end(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert study.main(command) == 0
    printed = capsys.readouterr()
    assert "| sparse alone | alpha " in printed.out and "all is measured" in printed.out
    assert "min left" in printed.err
    results = Results(tmp_path)
    (cell,) = results.cells()
    assert cell.title == "unet, 1 steps, CFG 1"
    keys = [(key.split, key.family, key.setting, results.captions(key)) for key in results.measured()]
    assert keys[:3] == [
        (TUNE, "none", "", 2),
        (TUNE, "sparse alone", "alpha 1.5", 2),
        (TUNE, "sparse alone", "alpha 2", 2),
    ]
    best = results.best(cell, "sparse alone")
    assert best is not None and keys[3:] == [(REPORT, "none", "", 3), (REPORT, "sparse alone", best[0], 3)]
    line = results.lines[0]
    assert set(line.versions) == {"torch", "ComfyUI", "data", "code"} and line.versions["ComfyUI"] == host.VERSION

    monkeypatch.setattr(study, "run", lambda *_: pytest.fail("existing results were measured again"))
    assert study.main(command) == 0
    monkeypatch.undo()
    # With more captions only the missing ones are measured.
    assert study.main([*command, "--captions", "4"]) == 0
    written = [json.loads(text) for path in tmp_path.glob("*.jsonl") for text in path.read_text().splitlines()]
    assert [(one["first"], one["captions"]) for one in written[5:8]] == [(2, 2)] * 3


def test_the_command_ends_when_its_time_is_up(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main([*command, "--minutes", "0"]) == 0
    assert "stopped; the same command goes on" in capsys.readouterr().out
    assert not Results(tmp_path).lines


def test_missing_or_wrong_weights_are_reported_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["--weights", str(tmp_path / "none.safetensors")]) == 1
    assert "quality: There is no file" in capsys.readouterr().err
    wrong = tmp_path / "wrong.safetensors"
    safetensors.torch.save_file({"x.y": torch.zeros(1)}, wrong)
    assert study.main(["--weights", str(wrong)]) == 1
    assert "must hold unet.* or mmdit.* and text.*, got x." in capsys.readouterr().err
