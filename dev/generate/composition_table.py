# SPDX-License-Identifier: GPL-3.0-or-later
"""The page ``docs/composition.md``: guidance beside other nodes, from the tests' list and results."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from comfy_host import ROOT
from generate.junit_results import Results, Versions

NAME = "composition"
TESTS = "tests/host/test_composition.py"

HEAD = """\
# Beside other nodes

This page says what guidance does beside other nodes, in both orders of the nodes. `python dev.py docs` writes it from
the list in `tests/support/companions.py` and from the results of `tests/host/test_composition.py`, which runs in a
real ComfyUI with small random models of its own classes.

The following holds in every row. Each attention that reads the text gives ComfyUI's own result plus the change by
guidance, compared with a plain fp64 reference. Every other attention, also those of the companion, is ComfyUI's own.
With strength 0 the picture is the companion's own, bit for bit. Both orders give the same picture, except where a row
says what the order changes. "Run in" names the versions of ComfyUI in which all of this passed.

| companion | what happens | order | run in |
| --- | --- | --- | --- |
"""


def page(tested: Versions) -> str:
    """Return the page for the versions by row."""
    return HEAD + "".join(
        f"| {companion.name} | {companion.result} | {', '.join(orders)} | {versions} |\n"
        for companion in _companions()
        for versions, orders in _orders(companion, tested).items()
    )


def passed_rows(results: Results) -> set[str]:
    """Return the rows that have passed tests in a run and no failed ones."""
    outcomes = results.in_file(TESTS)
    found = set()
    for companion in _companions():
        for label in companion.labels:
            row_id = re.compile(rf"[\[-]{re.escape(label)}[\]-]")  # the parts of an id are joined by hyphens
            of_row = {outcome for test, outcome in outcomes.items() if row_id.search(test)}
            if "passed" in of_row and "failed" not in of_row:
                found.add(label)
    return found


def _orders(companion: Any, tested: Versions) -> dict[str, list[str]]:
    """Return the orders of the nodes by the versions in which they passed."""
    together: dict[str, list[str]] = {}
    for order, label in zip(companion.orders, companion.labels, strict=True):
        together.setdefault(", ".join(tested.get(label, [])) or "**not run**", []).append(order)
    return together


def _companions() -> tuple[Any, ...]:
    if (support := str(ROOT / "tests" / "support")) not in sys.path:
        sys.path.insert(0, support)
    importlib.import_module("host_process")  # starts ComfyUI, whose modules the list needs
    from companions import COMPANIONS

    return COMPANIONS
