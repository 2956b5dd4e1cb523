# SPDX-License-Identifier: GPL-3.0-or-later
"""The page ``docs/composition.md``: what guidance does beside other nodes, of the tests' own list and results."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from test_results import ROOT, Results, Versions

NAME = "composition"
TESTS = "tests/host/test_composition.py"

HEAD = """\
# Beside other nodes

What guidance does beside other nodes, in both orders of the nodes. This page is written by `python dev.py docs` from
the list in `tests/support/companions.py` and from the results of `tests/host/test_composition.py`, which run in a real
ComfyUI with small random models of its own classes.

What is right in every row: each attention that reads the text gives the host's own result plus what guidance changes,
compared with a plain fp64 reference; every other attention, also those of the companion, is the host's own; with
strength 0 the companion's picture comes out bit for bit; and both orders give the same picture, except where a row says
what the order changes. "Run in" names the releases of ComfyUI in which all of that passed.

| companion | what happens | order | run in |
| --- | --- | --- | --- |
"""


def page(tested: Versions) -> str:
    """The page, of the versions by row."""
    return HEAD + "".join(
        f"| {companion.name} | {companion.result} | {', '.join(orders)} | {versions} |\n"
        for companion in _companions()
        for versions, orders in _orders(companion, tested).items()
    )


def right(results: Results) -> set[str]:
    """The rows of which a run tried something, and none of it failed."""
    outcomes = results.in_file(TESTS)
    found = set()
    for companion in _companions():
        for label in companion.labels:
            is_of_row = re.compile(rf"[\[-]{re.escape(label)}[\]-]")  # the parts of an id are joined by hyphens
            of_row = {outcome for test, outcome in outcomes.items() if is_of_row.search(test)}
            if "passed" in of_row and "failed" not in of_row:
                found.add(label)
    return found


def _orders(companion: Any, tested: Versions) -> dict[str, list[str]]:
    """The orders of the nodes that were right in the same versions."""
    together: dict[str, list[str]] = {}
    for order, label in zip(companion.orders, companion.labels, strict=True):
        together.setdefault(", ".join(tested.get(label, [])) or "**not run**", []).append(order)
    return together


def _companions() -> tuple[Any, ...]:
    if (support := str(ROOT / "tests" / "support")) not in sys.path:
        sys.path.insert(0, support)
    importlib.import_module("host_process")  # brings up the host, whose modules the list needs
    from companions import COMPANIONS

    return COMPANIONS
