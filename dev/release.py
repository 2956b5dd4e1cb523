# SPDX-License-Identifier: GPL-3.0-or-later
"""Version and notes of a release, from pyproject.toml and CHANGELOG.md, for publish.yml and the tests.

This module uses the standard library only, because GitHub runs it with nothing installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

from comfy_host import ROOT


def version(pyproject: str) -> str:
    """Return the version in the text of a pyproject.toml, the only file that has it."""
    found = re.search(r'^version = "(\d+\.\d+\.\d+)"$', pyproject, flags=re.MULTILINE)
    if found is None:
        raise SystemExit('release: pyproject.toml has no line version = "X.Y.Z".')
    return found[1]


def notes(changelog: str, wanted: str) -> str:
    """Return the notes on a version in the text of a CHANGELOG.md."""
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    for section in sections:
        title, _, text = section.partition("\n")
        if title.strip() == wanted and text.strip():
            return text.strip()
    raise SystemExit(f"release: CHANGELOG.md has no notes on {wanted}.")


def main() -> int:
    """Print the version to publish, or its notes."""
    parser = argparse.ArgumentParser(description="Print the version if it differs from the previous commit's.")
    parser.add_argument("--since", metavar="COMMIT", default="", help="the previous commit; without it, always print")
    parser.add_argument("--notes", action="store_true", help="print its notes instead")
    options = parser.parse_args()
    now = version((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), now)
    if options.notes:
        print(text)
    elif not options.since or _version_at(options.since) != now:
        print(f"version={now}")
    return 0


def _version_at(commit: str) -> str | None:
    """Return the version in a commit, or None if the file or the commit does not exist, as before the first one."""
    command = ["git", "-C", str(ROOT), "show", f"{commit}:pyproject.toml"]
    shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    return version(shown.stdout) if shown.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
