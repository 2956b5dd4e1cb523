# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev.py docs``: writes docs/models.md and docs/composition.md, of what the tests said.

What is right in one version of ComfyUI is taken from the last full run of the tests in it, or from a file that
``pytest --junit-xml`` wrote; what was right in other versions stays as ``docs/tested.json`` has it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

import composition_table
import model_table
from comfy_host import PINNED, TEST_RESULTS
from test_results import ROOT, Results, keep, kept

TABLES: tuple[ModuleType, ...] = (model_table, composition_table)


def write(results: Results) -> None:
    """Take up what a run said and write the pages."""
    for table in TABLES:
        if results.in_file(table.TESTS):
            keep(table.NAME, results.host, table.right(results))
        page_of(table).write_text(table.page(kept(table.NAME)), encoding="utf-8")
        print(f"docs: wrote {page_of(table).relative_to(ROOT)}")


def wrong(results: Results) -> list[str]:
    """What the pages say that a full run in the version they are checked in did not, in sentences."""
    found = []
    for table in TABLES:
        name, right = page_of(table).relative_to(ROOT).as_posix(), table.right(results)
        said = {thing for thing, versions in kept(table.NAME).items() if results.host in versions}
        found += [f"{name} says of {thing} what did not pass." for thing in sorted(said - right)]
        found += [f"{name} does not say that {thing} passed." for thing in sorted(right - said)]
        if page_of(table).read_text(encoding="utf-8") != table.page(kept(table.NAME)):
            found.append(f"{name} is not what would be written now.")
    return found


def page_of(table: ModuleType) -> Path:
    """Where a table stands."""
    return ROOT / "docs" / f"{table.NAME}.md"


def main() -> int:
    """Write the pages or check them."""
    parser = argparse.ArgumentParser(prog="dev.py docs", description="Write docs/models.md and docs/composition.md.")
    parser.add_argument("results", type=Path, nargs="*", default=[TEST_RESULTS], help="what pytest --junit-xml wrote")
    parser.add_argument("--check", action="store_true", help="only say whether the pages are what the tests said")
    options = parser.parse_args()
    for path in options.results:
        if not path.exists():
            print(f"docs: there is no {path}; run `python dev.py test` first")
            return 1
        results = Results.of(path)
        if not options.check:
            write(results)
        elif results.host != PINNED:
            print(f"docs: not checked, because the pages are of ComfyUI {PINNED} and this is {results.host or 'none'}")
        elif sentences := wrong(results):
            print(*(f"docs: {sentence}" for sentence in sentences), "docs: run `python dev.py docs`", sep="\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
