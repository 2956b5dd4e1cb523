# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests said, in one run and in all that are kept: what was right in which version of ComfyUI.

``docs/tested.json`` keeps by page, and by the thing that the page has a row for, the versions in which it was right.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "tested.json"
# Of one page: the versions by thing.
Versions = dict[str, list[str]]


@dataclass(frozen=True)
class Results:
    """One run of pytest, of the file it writes for ``--junit-xml``.

    Attributes:
        host: the version of ComfyUI; empty if no test ran in one.
        outcomes: ``"tests/host/test_x.py::test_y[id]"`` to ``"passed"``, ``"failed"`` or ``"skipped"``.
        notes: what else the tests reported, by name.
    """

    host: str
    outcomes: dict[str, str]
    notes: dict[str, str]

    @classmethod
    def of(cls, junit: Path) -> Results:
        """Read the file."""
        tree = ET.parse(junit)
        notes = {entry.get("name", ""): entry.get("value", "") for entry in tree.iter("property")}
        outcomes: dict[str, str] = {}
        for case in tree.iter("testcase"):
            marks = {child.tag for child in case}
            outcome = "failed" if marks & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"
            outcomes[f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '')}"] = outcome
        return cls(notes.get("host", ""), outcomes, notes)

    def in_file(self, path: str) -> dict[str, str]:
        """The outcomes of the tests in one file."""
        return {test: outcome for test, outcome in self.outcomes.items() if test.startswith(f"{path}::")}


def kept(page: str) -> Versions:
    """What is kept for a page."""
    return dict(_record().get(page, {}))


def keep(page: str, host: str, right: Iterable[str]) -> None:
    """Put what was right in a run in the place of what is kept of the same version of ComfyUI."""
    versions = {thing: set(versions) - {host} for thing, versions in kept(page).items()}
    for thing in right:
        versions.setdefault(thing, set()).add(host)
    record = _record()
    record[page] = {thing: sorted(found, key=_number) for thing, found in sorted(versions.items()) if found}
    # One line for each thing.
    lines = (
        f' "{name}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in things.items()) + "\n }"
        for name, things in record.items()
    )
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _record() -> dict[str, Versions]:
    record: dict[str, Versions] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return record


def _number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
