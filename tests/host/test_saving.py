# SPDX-License-Identifier: GPL-3.0-or-later
"""GAG Report where files cannot be saved or plots cannot be drawn: everything else is given, and nothing is left."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch

import host_process as host

PREFIXES = {
    "nul": "a\0b",
    "long": "x" * 300,
    "parent": "../report",
    "parent inside": "sub/../../report",
    "absolute": "/tmp/gag-report",
    "home of another": "/output-of-another/report",
    "surrogate": "half \ud83d of an emoji",
    "surrogate of a byte": "byte \udc80",
    "newline": "a\nb",
    "nothing": "",
    "folder": "..",
    "number": 7,
}


@pytest.fixture(scope="module")
def result() -> Any:
    model, probe = host.run_node("GAGProbe", model=host.build_model("sd15"))
    host.sample(model, "sd15", steps=2)
    return probe.result


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "output"


@pytest.fixture
def cheap_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two pages that each report has, without the seconds that they take to draw."""
    page = torch.linspace(0.0, 1.0, 1280).view(1, 1, 1280, 1).expand(1, 896, 1280, 3)
    for name in ("_heat_map_page", "_curve_page"):
        monkeypatch.setattr(host.pack_module("nodes.report"), name, lambda result: page)


def report(result: Any, filename_prefix: Any = "report") -> Any:
    probe = host.pack_module("nodes.patching.measurements").Probe(None, {}, result=result)
    return host.NODES["GAGReport"].execute(probe=probe, filename_prefix=filename_prefix, latent={})


def with_words(result: Any, *words: str) -> Any:
    maps = ((torch.rand(1, len(words), 8, 8, generator=torch.Generator().manual_seed(1)), 1),)
    return replace(result, words=words, maps=maps)


def check_report(out: Any, pages: int = 2) -> str:
    """Check that plots and JSON are there, and return the summary."""
    plots, summary, text, *_ = out.result
    assert plots.shape == (pages, 896, 1280, 3) and plots.dtype == torch.float32
    assert 0.0 <= float(plots.min()) < float(plots.max()) <= 1.0
    data = json.loads(text)
    assert summary.startswith(data["summary"]) and len(data["measures"]) > 5
    assert summary.isascii() or summary.encode()
    return str(summary)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can be longer than 64 bytes."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("cheap_pages")
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_a_prefix_that_names_no_file_in_the_output_folder_is_refused(result: Any, output: Path, prefix: Any) -> None:
    output.mkdir()
    before = sorted(path for path in output.parent.rglob("*") if "temp" not in path.parts)
    out = report(result, prefix)
    summary = check_report(out)
    assert (
        "No file was saved: filename_prefix must be a name or a path inside the output folder, of at most 200 "
        "characters, none of them a control character, got "
    ) in summary
    assert len(summary) < 1500 and summary.encode()
    assert len(out.ui["text"]) == 1 and len(out.ui["images"]) == 2
    assert sorted(path for path in output.parent.rglob("*") if path.suffix != ".png" and path.name != "temp") == before


@pytest.mark.usefixtures("cheap_pages")
@pytest.mark.parametrize(
    "prefix", ["図/レポート", "a b", "sub/report", "sub/", "./report", "ä%year%", "報告\u3000書 👩‍🎨"]
)
def test_a_prefix_inside_the_output_folder_is_taken(result: Any, output: Path, prefix: str) -> None:
    for count in (1, 2):
        out = report(result, prefix)
        summary, shown = out.ui["text"]
        assert "saved" not in summary
        assert (output.parent / shown).read_text(encoding="utf-8") == out.result[2]
        assert len(files_in(output)) == count


@pytest.mark.usefixtures("cheap_pages")
def test_an_absolute_prefix_inside_the_output_folder_is_shown_without_folders_above(result: Any, output: Path) -> None:
    out = report(result, str(output / "sub" / "report"))
    assert out.ui["text"][1] == str(Path("output", "sub", "report_00001_.json"))


@pytest.mark.usefixtures("cheap_pages")
@pytest.mark.skipif(sys.platform != "linux", reason="limits the length of files")
def test_a_full_disk_loses_no_report_and_leaves_no_file(result: Any, output: Path) -> None:
    with full_disk():
        out = report(result)
    summary = check_report(out)
    assert "The JSON file could not be saved in the output folder: File too large. " in summary
    assert summary.endswith("The preview of the plots could not be saved in the temporary folder: File too large.")
    assert "images" not in out.ui and out.ui["text"] == (summary,)
    assert files_in(output.parent) == []


@pytest.mark.usefixtures("cheap_pages")
def test_a_folder_that_cannot_be_written_loses_no_report(result: Any, output: Path) -> None:
    output.write_text("a file in the place of the folder")
    (output.parent / "temp").write_text("a file in the place of the folder")
    summary = check_report(report(result))
    assert "The JSON file could not be saved in the output folder: " in summary
    assert "The preview of the plots could not be saved in the temporary folder: " in summary
    assert str(output.parent) not in summary


@pytest.mark.usefixtures("cheap_pages")
def test_a_file_that_cannot_be_renamed_leaves_nothing(
    result: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    assert "could not be saved in the output folder: Permission denied." in check_report(report(result))
    assert files_in(output) == []


@pytest.mark.usefixtures("cheap_pages")
def test_an_earlier_file_is_never_overwritten(result: Any, output: Path) -> None:
    output.mkdir()
    (output / "report_00001_.json").write_text("earlier")
    report(result, "report/")  # after a prefix with a slash at its end ComfyUI counts from 1 each time
    assert (output / "report_00001_.json").read_text() == "earlier"
    assert len(files_in(output)) == 2


def test_without_matplotlib_the_report_has_its_numbers_and_says_how_to_get_plots(
    result: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = report(with_words(result, "red"))
    summary = check_report(out, pages=1)
    assert summary.count('which is missing here: install it with "python -m pip install matplotlib"') == 1
    assert [path.name for path in files_in(output)] == ["report_00001_.json"]


def test_a_plot_that_fails_leaves_the_others(
    result: Any, output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("half \ud83d " + 1000 * "x")

    module = host.pack_module("nodes.report")
    heat_map = module._heat_map_page(result)
    monkeypatch.setattr(module, "_heat_map_page", lambda result: heat_map)
    monkeypatch.setattr(module, "_curve_page", fail)
    out = report(result)
    summary = check_report(out)
    assert "A plot could not be drawn: ZeroDivisionError: half \\ud83d xxx" in summary and len(summary) < 1500
    assert torch.equal(out.result[0][0], heat_map[0])
    assert b"ZeroDivisionError" in caplog.text.encode("utf-8"), "a log line that cannot be encoded"
    assert [path.name for path in files_in(output)] == ["report_00001_.json"]


@pytest.mark.usefixtures("cheap_pages")
@pytest.mark.parametrize(
    "word",
    [
        "$x^2$",
        r"$\frac{1}{$",
        r"$\notacommand$",
        "$$$$",
        "half \ud83d",
        "nul \0",
        "\n\n\t",
        "語🦊👩‍🎨",
        "x" * 10**6,
        "\u202eabc",
    ],
    ids=lambda word: ascii(word)[:20],
)
def test_words_are_drawn_as_they_are(result: Any, output: Path, word: str, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = report(with_words(result, word))
    summary = check_report(out, pages=1)
    assert "could not" not in summary and caplog.text == ""


@pytest.mark.usefixtures("cheap_pages")
def test_no_text_on_the_node_has_markup(result: Any, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "<img src=x onerror=alert(1)>"
    out = report(replace(result, notes=(f"The word {script}.",)), script)
    assert not any("<" in text or ">" in text for text in out.ui["text"])
    # The output keeps the text, for nodes that save it.
    assert script in out.result[1]


@pytest.mark.usefixtures("cheap_pages", "output")
def test_the_file_has_no_more_than_the_report(result: Any) -> None:
    data = json.loads(report(with_words(result, "red")).result[2])
    about_the_run = {"model", "layers", "step_sigmas", "model_calls", "branches", "settings", "strengths", "guided"}
    assert set(data) == {"format", "summary", "measures", "words", "notes"} | about_the_run
    assert data["model"] == result.model and data["words"] == ["red"]
