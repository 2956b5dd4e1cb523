# SPDX-License-Identifier: GPL-3.0-or-later
"""GAG Check in the real host: picture, text and JSON; progress and interrupts; memory; what happens without a part."""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import pytest
import torch

import host_process as host

node = host.pack_module("nodes.check")
core = host.pack_module("gag_core.check")
attention = host.pack_module("gag_core.attention")


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "output"


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases and one small shape, which take no time."""
    monkeypatch.setattr(core, "CASES", core.CASES[:2])
    monkeypatch.setattr(core, "TIMED_SHAPES", (core.Shape("small", 1, 2, 64, 24, 16),))


def check(**inputs: Any) -> Any:
    return host.NODES["GAGCheck"].execute(**{"quick": False, "filename_prefix": "check", **inputs})


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The output of a real quick check, and the folder of its files."""
    folder = tmp_path_factory.mktemp("check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "output_directory", str(folder / "output"))
        patch.setattr(folder_paths, "temp_directory", str(folder / "temp"))
        return check(quick=True), folder


def test_a_check_gives_a_picture_a_text_and_json(quick: tuple[Any, Path]) -> None:
    out, folder = quick
    picture, text, data = out.result
    assert picture.shape == (1, node.HEIGHT, node.WIDTH, 3) and picture.dtype == torch.float32
    assert 0.0 <= float(picture.min()) < float(picture.max()) <= 1.0
    assert text.startswith("GAG Check: All ") and f"ComfyUI {host.VERSION}" in text
    found = json.loads(data)
    assert found["is_right"] and found["path"] == "eager" and found["environment"]["device"].startswith("CPU, ")
    shown_text, shown_file = out.ui["text"]
    assert shown_text == text and (folder / shown_file).read_text(encoding="utf-8") == data
    [preview] = out.ui["images"]
    assert (folder / "temp" / preview["filename"]).exists()


@pytest.mark.usefixtures("few_cases")
def test_the_node_shows_its_text_and_where_the_numbers_are(node_texts: list[str]) -> None:
    out = check()
    [shown] = node_texts
    assert shown == f"{out.result[1]}\n\nAll numbers: {Path('output', 'check_00001_.json')}"


@pytest.mark.usefixtures("few_cases")
def test_progress_goes_from_0_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: told.append((value, total)))
    check()
    values = [value for value, _ in told]
    assert values == sorted(values) and values[0] == 0 and {total for _, total in told} == {values[-1]}


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_check_can_be_interrupted_and_leaves_nothing_behind(
    after: int, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[bool] = []
    monkeypatch.setattr(management, "soft_empty_cache", lambda: freed.append(True))
    calls = iter(range(after))
    real = management.throw_exception_if_processing_interrupted

    def interrupt() -> None:
        management.interrupt_current_processing(next(calls, None) is None)
        real()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupt)
    before = attention._implementation
    with pytest.raises(management.InterruptProcessingException):
        check()
    assert freed == [True] and attention._implementation is before and not output.exists()


def test_each_run_of_the_queue_measures_anew() -> None:
    fingerprint = host.NODES["GAGCheck"].fingerprint_inputs
    assert math.isnan(fingerprint(quick=True, filename_prefix="check"))


@pytest.mark.usefixtures("few_cases")
def test_what_a_check_allocates_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(item) is torch.Tensor for item in gc.get_objects())

    freed: list[bool] = []
    monkeypatch.setattr(management, "soft_empty_cache", lambda: freed.append(True))
    check()
    before = tensors()
    check()
    assert tensors() == before and len(freed) == 2


@pytest.mark.usefixtures("few_cases")
def test_a_wrong_path_is_said_in_title_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(out: torch.Tensor, *args: Any, **options: Any) -> None:
        core.EAGER.guide(out, *args, **options)
        out.mul_(1.2)

    def failing(*args: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    always = core.EAGER.can_run
    paths = (core.GuidePath("broken", broken, always), core.GuidePath("failing", failing, always), core.EAGER)
    monkeypatch.setattr(core, "PATHS", paths)
    titles: list[str] = []
    draw = node.to_image

    def draw_and_note(figure: Any) -> torch.Tensor:
        titles.append(figure.get_suptitle())
        return draw(figure)

    monkeypatch.setattr(node, "to_image", draw_and_note)
    out = check()
    assert titles == ["GAG Check: WRONG: 6 of 18 results. GAG uses the path eager here."]
    assert "failing, float16, SDXL, 77 tokens: no result (out of memory)" in out.result[1]
    assert json.loads(out.result[2])["is_right"] is False


@pytest.mark.usefixtures("few_cases")
def test_without_matplotlib_everything_else_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = check()
    assert out.result[0].shape == (1, node.HEIGHT, node.WIDTH, 3)
    assert "which is missing here: install it with" in out.ui["text"][0] and len(out.ui["text"]) == 2
    assert json.loads(out.result[2])["comparisons"]


@pytest.mark.usefixtures("few_cases")
def test_a_file_that_cannot_be_saved_loses_no_report(output: Path) -> None:
    out = check(filename_prefix="../check")
    assert "No file was saved: filename_prefix must be" in out.ui["text"][0] and len(out.ui["text"]) == 1
    output.write_text("a file in the place of the folder")
    assert "The JSON file could not be saved in the output folder: " in check().ui["text"][0]


@pytest.mark.parametrize("part", ["nothing", "comparisons", "timings"])
def test_a_report_with_nothing_in_it_is_drawn(part: str) -> None:
    """For example, of a machine that is so busy that no time was left."""
    report = core.Report({"device": "a $card$ with_signs"}, False, torch.float16, "eager")
    if part == "comparisons":
        report.comparisons.append(core.Comparison("eager", core.CASES[0].name, torch.float16, math.inf))
    if part == "timings":
        report.timings.append(core.Timing(core.TIMED_SHAPES[0], "eager", 0.1, None))  # plain attention failed
    assert node._picture(report).shape == (1, node.HEIGHT, node.WIDTH, 3)
    assert "GAG Check: " in report.as_text()
