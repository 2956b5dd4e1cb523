# SPDX-License-Identifier: GPL-3.0-or-later
"""The Comfy Registry's command line (comfy-cli) on a copy of the repository.

It sends no telemetry: its two packages for that are not installed, and an option switches it off.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Comfy = Callable[[Path, str], CompletedProcess[str]]
CLEAN = "All validation checks passed successfully"


@pytest.fixture(scope="module")
def unpacked(comfy: Comfy, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    answer = comfy(checkout, "pack")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        archive.extractall(folder)
    return folder


def test_packs_the_files_that_users_get(unpacked: Path, checkout: Path, files: list[str]) -> None:
    packed = [path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()]
    assert sorted(packed) == files
    assert [name for name in packed if (unpacked / name).read_bytes() != (checkout / name).read_bytes()] == []


def test_what_users_get_is_valid(comfy: Comfy, unpacked: Path, offline: dict[str, str]) -> None:
    answer = comfy(unpacked, "validate")
    output = answer.stdout + answer.stderr
    assert answer.returncode == 0 and CLEAN in output and "warning" not in output.lower(), output
    (configuration,) = Path(offline["HOME"]).rglob("comfy-cli")
    assert not (configuration / "config.ini").exists(), (
        "comfy-cli would store its permission for telemetry and an id there"
    )


@pytest.mark.parametrize(
    ("name", "old", "new", "code", "message"),
    [
        ("__init__.py", "\n", "\nexec('')\n", 0, "Security warnings found"),
        ("pyproject.toml", 'version = "', '# "', 1, "version is empty"),
    ],
    ids=["exec", "no version"],
)
def test_validate_finds_faults(
    comfy: Comfy, unpacked: Path, tmp_path: Path, name: str, old: str, new: str, code: int, message: str
) -> None:
    faulty = shutil.copytree(unpacked, tmp_path / "faulty")
    text = (faulty / name).read_text(encoding="utf-8")
    assert old in text
    (faulty / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    answer = comfy(faulty, "validate")
    assert answer.returncode == code and message in answer.stdout + answer.stderr
    assert CLEAN not in answer.stdout + answer.stderr
