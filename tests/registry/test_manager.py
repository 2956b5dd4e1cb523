# SPDX-License-Identifier: GPL-3.0-or-later
"""ComfyUI-Manager installs the pack from a git address and from a registry, and ComfyUI runs the installed pack.

Git address and registry are HTTP servers on this machine, because Manager installs no folder, no zip file and nothing
at ``file:///``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import comfy_server
import release
from comfy_host import find_host
from comfy_server import ComfyServer

if TYPE_CHECKING:
    from tests.registry.conftest import LocalWeb

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = release.version(PYPROJECT)
(NAME,) = re.findall(r'^name = "(.*)"$', PYPROJECT, flags=re.MULTILINE)

CmCli = Callable[..., str]
SmokeTest = Callable[[ComfyServer, Path, str], None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The base folder of a ComfyUI without packs."""
    (tmp_path / "custom_nodes").mkdir()
    return tmp_path


@pytest.fixture
def cm_cli(base: Path, web: LocalWeb, tools: Path, offline: dict[str, str]) -> CmCli:
    where = [str(tools), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    manager = [sys.executable, str(ROOT / "tests" / "registry" / "manager.py"), packages, str(base), web.address]
    env = offline | {"COMFYUI_PATH": str(find_host())}

    def run(*options: str) -> str:
        answer = subprocess.run([*manager, *options], env=env, capture_output=True, text=True, encoding="utf-8")
        output = answer.stdout + answer.stderr
        assert answer.returncode == 0, output
        return output

    return run


@pytest.fixture
def installed_server(base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ComfyServer]:
    """A function that returns a server with the packs that Manager installed and no others."""
    monkeypatch.setattr(comfy_server, "prepare_base", lambda base, pack: None)
    return lambda: ComfyServer(base, cpu=True)


def test_installs_from_a_git_address(
    cm_cli: CmCli,
    checkout: Path,
    known_to_git: list[str],
    web: LocalWeb,
    offline: dict[str, str],
    base: Path,
    installed_server: Callable[[], ComfyServer],
    smoke_test: SmokeTest,
) -> None:
    repository = web.folder / "gag.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(checkout), str(repository)], env=offline, check=True)
    # This lets git clone from a plain web server.
    subprocess.run(["git", "update-server-info"], cwd=repository, env=offline, check=True)
    output = cm_cli("install", f"{web.address}/gag.git", "--exit-on-fail")
    assert re.search(r"\[INSTALLED\] \S+/gag\.git", output), output
    assert (
        "Requirement already satisfied: matplotlib" in output and "Requirement already satisfied: einops" in output
    ), output
    installed = base / "custom_nodes" / "gag"
    assert [name for name in known_to_git if not (installed / name).is_file()] == []
    with installed_server() as server:
        smoke_test(server, installed, installed.name)


def test_installs_what_the_registry_has(
    cm_cli: CmCli,
    comfy: Callable[[Path, str], subprocess.CompletedProcess[str]],
    checkout: Path,
    files: list[str],
    web: LocalWeb,
    base: Path,
    installed_server: Callable[[], ComfyServer],
    smoke_test: SmokeTest,
) -> None:
    assert comfy(checkout, "pack").returncode == 0
    shutil.move(checkout / "node.zip", web.folder)
    node = {"id": NAME, "name": "GAG", "publisher": {"name": "gag"}, "latest_version": {"version": VERSION}}
    version = {"id": "1", "version": VERSION, "downloadUrl": f"{web.address}/node.zip"}
    web.answers["/nodes"] = {"nodes": [node], "totalPages": 1}
    web.answers[f"/nodes/{NAME}/install"] = version | {"status": "NodeVersionStatusActive"}
    output = cm_cli("install", NAME, "--mode", "remote", "--exit-on-fail")
    assert re.search(rf"\[INSTALLED\] {NAME} +\[{re.escape(VERSION)}\]", output), output
    installed = base / "custom_nodes" / NAME
    found = [path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()]
    assert sorted(found) == sorted([*files, ".tracking"])
    with installed_server() as server:
        smoke_test(server, installed, installed.name)


@pytest.mark.parametrize("address", ["http://192.0.2.1/", "https://192.0.2.1/"])
def test_access_to_the_internet_is_noticed(address: str, web: LocalWeb, offline: dict[str, str]) -> None:
    code = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", code, address], env=offline, stderr=subprocess.DEVNULL).returncode
    assert "192.0.2.1" in web.refused.pop()
