# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev.py docs``: write docs/models.md and docs/composition.md from the results of tests.

Results for one version of ComfyUI come from the last full run of the tests in it, or from a file that
``pytest --junit-xml`` wrote. Results for other versions stay as they are in ``docs/tested.json``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

from comfy_host import PINNED, ROOT, TEST_RESULTS
from generate import composition_table, model_table
from generate.junit_results import Results, record, recorded_versions

TABLES: tuple[ModuleType, ...] = (model_table, composition_table)


def write(results: Results) -> None:
    """Record the results of a run and write the pages."""
    for table in TABLES:
        if results.in_file(table.TESTS):
            record(table.NAME, results.host, table.passed_rows(results))
        page_of(table).write_text(table.page(recorded_versions(table.NAME)), encoding="utf-8")
        print(f"docs: wrote {page_of(table).relative_to(ROOT)}")


def differences(results: Results) -> list[str]:
    """Return the differences between the pages and a full run in the same version, in sentences."""
    found = []
    for table in TABLES:
        name, passed = page_of(table).relative_to(ROOT).as_posix(), table.passed_rows(results)
        recorded = {row for row, versions in recorded_versions(table.NAME).items() if results.host in versions}
        found += [f"{name} says that {row} passed, but it did not." for row in sorted(recorded - passed)]
        found += [f"{name} does not say that {row} passed." for row in sorted(passed - recorded)]
        if page_of(table).read_text(encoding="utf-8") != table.page(recorded_versions(table.NAME)):
            found.append(f"{name} differs from the page that would be written now.")
    return found


def page_of(table: ModuleType) -> Path:
    """Return the path of a table's page."""
    return ROOT / "docs" / f"{table.NAME}.md"


def main() -> int:
    """Write the pages or check them."""
    parser = argparse.ArgumentParser(prog="dev.py docs", description="Write docs/models.md and docs/composition.md.")
    parser.add_argument(
        "results", type=Path, nargs="*", default=[TEST_RESULTS], help="files that pytest --junit-xml wrote"
    )
    parser.add_argument("--check", action="store_true", help="only check the pages against the results")
    options = parser.parse_args()
    for path in options.results:
        if not path.exists():
            print(f"docs: there is no {path}; run `python dev.py test` first")
            return 1
        results = Results.of(path)
        if not options.check:
            write(results)
        elif results.host != PINNED:
            print(f"docs: not checked, because the pages are for ComfyUI {PINNED} and this is {results.host or 'none'}")
        elif sentences := differences(results):
            print(*(f"docs: {sentence}" for sentence in sentences), "docs: run `python dev.py docs`", sep="\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
