# SPDX-License-Identifier: GPL-3.0-or-later
"""The download that the Comfy Registry makes of the repository: what is in it, and that it works by itself.

Which files ``comfy node pack`` takes: those that git knows and .comfyignore does not match.
"""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from pathlib import Path

import pathspec
import pytest

import schemas
from comfy_server import ComfyServer, to_api

ROOT = Path(__file__).resolve().parents[2]
# All that users have a need of.
WANTED = re.compile(
    r"__init__\.py|pyproject\.toml|requirements\.txt|LICENSE|README\.md|CHANGELOG\.md"
    r"|(gag_core|nodes)/\w+\.py"
    r"|web/(docs/.*\.(md|png)|.*\.(js|css))|locales/.*\.json"
    r"|workflows/\w+\.(json|jpg)"
    r"|docs/\w+\.(md|png|jpg)|assets/\w+\.safetensors|assets/demo\w*\.(png|json)"
)
NEEDED = ("__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "workflows/gag_demo.json")
MOST_BYTES = 20e6


@pytest.fixture(scope="module")
def files() -> list[str]:
    # Those that git does not know yet, but would, are taken as well: the tests run before a commit too.
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip(f"this is no git checkout: {listed.stderr.strip()}")
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", (ROOT / ".comfyignore").read_text().splitlines())
    names = sorted(set(listed.stdout.splitlines()))
    return [name for name in names if (ROOT / name).is_file() and not ignored.match_file(name)]


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
    assert [name for name in files if not WANTED.fullmatch(name)] == [], "users do not need these: .comfyignore"
    assert [name for name in NEEDED if name not in files] == []
    size = sum((ROOT / name).stat().st_size for name in files)
    assert size < MOST_BYTES, f"{size / 1e6:.1f} MB"


def test_all_that_the_pages_show_and_link_to_is_there(files: list[str]) -> None:
    for page in [name for name in files if name.endswith(".md") and not name.startswith("web/")]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            linked = (ROOT / page).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
            assert linked in files, f"{page} links to {target}"


def test_works_in_a_fresh_comfyui(unpacked: Path) -> None:
    with ComfyServer(pack=unpacked, cpu=True) as server:
        object_info = server.object_info()
        assert sorted(schemas.of_pack(object_info)) == sorted(schemas.read())
        workflow = json.loads((unpacked / "workflows" / "gag_demo.json").read_text(encoding="utf-8"))
        run = server.run(to_api(workflow, object_info), workflow)
        assert run.status == "success", run.error
        assert server.images(run)
        assert not re.search(r"IMPORT FAILED.*custom_nodes", server.log())
