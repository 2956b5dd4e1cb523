# SPDX-License-Identifier: GPL-3.0-or-later
"""Results of the tests: those of one run, and the versions of ComfyUI in which each row of a page passed.

``docs/tested.json`` has these versions by page and row.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from comfy_host import ROOT

RECORD = ROOT / "docs" / "tested.json"
# Versions of ComfyUI by row of a page.
Versions = dict[str, list[str]]


@dataclass(frozen=True)
class Results:
    """Results of one run of pytest, from the file that it writes for ``--junit-xml``.

    Attributes:
        host: the version of ComfyUI; empty if no test ran in one.
        outcomes: ``"tests/host/test_x.py::test_y[id]"`` to ``"passed"``, ``"failed"`` or ``"skipped"``.
        notes: properties that tests recorded, by name.
    """

    host: str
    outcomes: dict[str, str]
    notes: dict[str, str]

    @classmethod
    def of(cls, junit: Path) -> Results:
        """Read a file."""
        tree = ET.parse(junit)
        notes = {entry.get("name", ""): entry.get("value", "") for entry in tree.iter("property")}
        outcomes: dict[str, str] = {}
        for case in tree.iter("testcase"):
            marks = {child.tag for child in case}
            outcome = "failed" if marks & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"
            outcomes[f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '')}"] = outcome
        return cls(notes.get("host", ""), outcomes, notes)

    def in_file(self, path: str) -> dict[str, str]:
        """Return the outcomes of the tests in one file."""
        return {test: outcome for test, outcome in self.outcomes.items() if test.startswith(f"{path}::")}


def recorded_versions(page: str) -> Versions:
    """Return the recorded versions of a page."""
    return dict(_recorded_pages().get(page, {}))


def record(page: str, host: str, passed: Iterable[str]) -> None:
    """Record the rows that passed in a version of ComfyUI, in place of the recorded rows of that version."""
    versions = {row: set(versions) - {host} for row, versions in recorded_versions(page).items()}
    for row in passed:
        versions.setdefault(row, set()).add(host)
    pages = _recorded_pages()
    pages[page] = {row: sorted(found, key=_release) for row, found in sorted(versions.items()) if found}
    # One line for each row.
    lines = (
        f' "{name}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()) + "\n }"
        for name, rows in pages.items()
    )
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _recorded_pages() -> dict[str, Versions]:
    pages: dict[str, Versions] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return pages


def _release(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
