# SPDX-License-Identifier: GPL-3.0-or-later
"""The pack's files by git, and the command lines of the Comfy Registry and ComfyUI-Manager, kept offline."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pathspec
import pytest

from comfy_host import VENV_REGISTRY, python_in
from comfy_server import ComfyServer, to_api
from generate import schemas

ROOT = Path(__file__).resolve().parents[2]


class LocalWeb(ThreadingHTTPServer):
    """A folder served on 127.0.0.1. As a proxy it refuses all other addresses and records them in ``refused``."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.folder = folder
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, Any] = {}
        """Answers by path, whatever the query is; other paths are files."""
        self.refused: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors, because some clients hang up after the headers."""


class _Handler(SimpleHTTPRequestHandler):
    server: LocalWeb

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.path.startswith("/"):
            return True
        self.server.refused.append(self.requestline)
        self.send_error(403)
        return False

    def do_GET(self) -> None:
        answer = self.server.answers.get(self.path.split("?")[0])
        if answer is None:
            return super().do_GET()
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def known_to_git() -> list[str]:
    # Files that git would add are included, because the tests run before a commit too.
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if listed.returncode:
        # The registry packs the files that git knows, which an unpacked download cannot list. The CI has a checkout.
        pytest.skip(f"this is no git checkout: {listed.stderr.strip()}")
    return [name for name in sorted(set(listed.stdout.splitlines())) if (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def files(known_to_git: list[str]) -> list[str]:
    """Files that ``comfy node pack`` takes, which .comfyignore does not match."""
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", (ROOT / ".comfyignore").read_text().splitlines())
    return [name for name in known_to_git if not ignored.match_file(name)]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWeb]:
    with LocalWeb(tmp_path_factory.mktemp("web")) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()
    assert running.refused == [], "a test talks to this machine alone"


@pytest.fixture(scope="module")
def offline(web: LocalWeb, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables of a new user on a machine without access to the internet."""
    home = str(tmp_path_factory.mktemp("home"))
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), web.address) | {"no_proxy": "127.0.0.1"}
    proxies |= {name.upper(): value for name, value in proxies.items()}
    others = {"DO_NOT_TRACK": "1", "PIP_DRY_RUN": "1", "PYTHONUTF8": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    of_user = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return of_user | proxies | {"HOME": home, "USERPROFILE": home} | others


@pytest.fixture(scope="module")
def checkout(known_to_git: list[str], offline: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which all files that git knows or would add are committed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in known_to_git:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    git = ["git", "-c", "core.autocrlf=false", "-c", "user.name=nobody", "-c", "user.email=nobody@127.0.0.1"]
    for command in (["init", "--quiet"], ["add", "--all", "--force"], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *command], cwd=folder, env=offline, check=True)
    return folder


@pytest.fixture(scope="session")
def tools() -> Path:
    """The Python with the command lines, which dev.py prepares."""
    python = python_in(VENV_REGISTRY)
    assert python.is_file(), "run `python dev.py setup`, which prepares the tools of this test"
    return python


@pytest.fixture(scope="module")
def comfy(tools: Path, offline: dict[str, str]) -> Callable[[Path, str], subprocess.CompletedProcess[str]]:
    """A function that runs ``comfy node`` in a folder."""

    def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
        line = [str(tools), "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "--no-json", "node", command]
        return subprocess.run(line, cwd=folder, env=offline, capture_output=True, text=True, encoding="utf-8")

    return run


@pytest.fixture(scope="session")
def smoke_test() -> Callable[[ComfyServer, Path, str], None]:
    """A function that tests a pack in a server that has it in a folder of ``custom_nodes/``."""

    def run(server: ComfyServer, pack: Path, folder: str) -> None:
        object_info = server.object_info()
        assert sorted(schemas.of_pack(object_info, folder)) == sorted(schemas.read())
        workflow = json.loads((pack / "workflows" / "gag_01_demo.json").read_text(encoding="utf-8"))
        result = server.run(to_api(workflow, object_info), workflow)
        assert result.status == "success", result.error
        assert server.images(result)
        assert not re.search(r"IMPORT FAILED.*custom_nodes", server.log())

    return run
