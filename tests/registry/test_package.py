# SPDX-License-Identifier: GPL-3.0-or-later
"""The download that the Comfy Registry makes of the repository: its files, and that it works by itself."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
# Files that users need.
WANTED = re.compile(
    r"__init__\.py|pyproject\.toml|requirements\.txt|LICENSE|README\.md|CHANGELOG\.md"
    r"|(gag_core|nodes)/(\w+/)?\w+\.py"
    r"|web/(docs/.*\.(md|png)|.*\.(js|css))|locales/.*\.json"
    r"|workflows/\w+\.(json|jpg)"
    r"|docs/[\w-]+\.(md|png|jpg)|assets/demo\w*\.(safetensors|sha256)|assets/demo\w*\.png|assets/evidence/[\w-]+\.png"
)
NEEDED = ("__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "workflows/gag_01_demo.json")
MOST_BYTES = 20e6


@pytest.fixture(scope="module")
def unpacked(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("download")
    with zipfile.ZipFile(folder / "node.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            archive.write(ROOT / name, name)
    with zipfile.ZipFile(folder / "node.zip") as archive:
        archive.extractall(folder / "pack")
    return folder / "pack"


def test_has_what_users_need_and_nothing_else(files: list[str]) -> None:
    assert [name for name in files if not WANTED.fullmatch(name)] == [], (
        "users do not need these: add them to .comfyignore"
    )
    assert [name for name in NEEDED if name not in files] == []
    size = sum((ROOT / name).stat().st_size for name in files)
    assert size < MOST_BYTES, f"{size / 1e6:.1f} MB"


def test_all_pictures_and_links_of_the_pages_are_there(files: list[str]) -> None:
    for page in [name for name in files if name.endswith(".md") and not name.startswith("web/")]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            linked = (ROOT / page).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
            assert linked in files, f"{page} links to {target}"


def test_the_check_of_a_machine_runs_from_the_download(unpacked: Path) -> None:
    command = [sys.executable, "-m", "gag_core.check", "--quick", "--device", "cpu"]
    run = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("GAG Check: All ") and "GAG 0." in run.stdout


def test_works_in_a_fresh_comfyui(unpacked: Path, smoke_test: Callable[[ComfyServer, Path, str], None]) -> None:
    with ComfyServer(pack=unpacked, cpu=True) as server:
        smoke_test(server, unpacked, "gag")
