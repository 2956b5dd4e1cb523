# SPDX-License-Identifier: GPL-3.0-or-later
"""Facts with a single source: no page lists the model families, and the front end does not know the chart's series.

So a new family needs its entry and its tiny model only, and a new series of the chart its declaration and two texts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import host_process as host
from comfy_host import ROOT
from generate import texts

FAMILIES = host.pack_module("nodes.patching.families").FAMILIES
MEASURES = host.pack_module("gag_core.measures").MEASURES
SERIES = host.pack_module("nodes.panel.chart").SERIES
# docs/models.md is generated from the families and the test results.
PAGES = [
    ROOT / "README.md",
    ROOT / "pyproject.toml",
    *(page for page in sorted(ROOT.glob("docs/*.md")) if page.name != "models.md"),
    *sorted(ROOT.glob("web/docs/**/*.md")),
]
# Families that a page names as an example, or because of a limitation. A new family does not change these pages.
MENTIONS = {
    ("docs/guide.md", "LTX-Video"),
    ("docs/guide.md", "Mochi"),
    ("docs/troubleshooting.md", "Mochi"),
    ("docs/when-nothing-is-guided.md", "LTX-Video"),
    ("web/docs/GAGuidance.md", "Mochi"),
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
every_series = pytest.mark.parametrize("series", SERIES, ids=lambda series: series.name)


def names_of(family: Any) -> set[str]:
    """Return the title of a family, and its class names unless users know the models by that word (Flux)."""
    path = family.model_class
    class_name = path.rpartition(".")[2]
    return {family.title, path, *([] if has_word(family.title, class_name) else [class_name])}


def has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", text) is not None


@every_page
def test_a_page_does_not_list_families(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    named = {(name, word) for family in FAMILIES for word in names_of(family) if has_word(text, word)}
    assert named <= MENTIONS


def test_families_are_recognised_in_a_page() -> None:
    """The generated page has all titles, so the test above would find them."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(has_word(text, family.title) for family in FAMILIES)


@every_series
def test_a_series_has_a_measure_and_two_texts(series: Any) -> None:
    assert series.name in MEASURES
    panel_texts = texts.panel_texts()
    assert panel_texts[series.name] and panel_texts[f"{series.name}_tip"]


@every_series
@pytest.mark.parametrize("file", ["chart.js", "gag.css"])
def test_the_front_end_does_not_name_a_series(series: Any, file: str) -> None:
    assert not has_word((ROOT / "web" / file).read_text(encoding="utf-8"), series.name)
