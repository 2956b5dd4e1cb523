# SPDX-License-Identifier: GPL-3.0-or-later
"""Promises of docs/security.md about the code of the pack, as users download it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "security.md"
MODULES = sorted([ROOT / "__init__.py", *ROOT.glob("nodes/**/*.py"), *ROOT.glob("gag_core/**/*.py")])
SCRIPTS = sorted(ROOT.glob("web/**/*.js"))
# Text that runs, and stored objects whose loading runs code.
RUNS_TEXT = {"eval", "exec", "__import__", "runpy", "pickle", "marshal", "shelve", "dill"}
RUNS_TEXT |= {
    "importlib.import_module",
    "importlib.machinery",
    "torch.load",
    "torch.jit",
    "torch.hub",
    "numpy.load",
    "np.load",
}
STARTS_PROGRAMS = {"subprocess", "multiprocessing", "pty", "os.system", "os.popen", "os.fork", "os.execv", "os.spawnv"}
STARTS_PROGRAMS |= {"pip", "ensurepip", "ctypes", "cffi", "webbrowser"}
CONNECTS = {"socket", "ssl", "urllib", "http", "requests", "httpx", "ftplib", "smtplib", "huggingface_hub"}
CONNECTS |= {"aiohttp.ClientSession", "aiohttp.request"}
WRITES = {
    "write_text",
    "write_bytes",
    "mkdir",
    "makedirs",
    "unlink",
    "rename",
    "rmdir",
    "rmtree",
    "touch",
    "symlink_to",
}
WRITES |= {"tempfile", "torch.save", "save_file", "copyfile", "PreviewImage", "get_save_image_path"}


def names(path: Path) -> Iterator[str]:
    """Yield the names that a module imports and uses, with dots: ``os.system``, ``torch.load``, ``write_text``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            # The last name of an attribute alone too: methods have a name, but no module that can be seen.
            yield from (ast.unparse(node), node.attr)


def uses(path: Path, forbidden: set[str]) -> set[str]:
    return {one for name in names(path) for one in forbidden if name == one or name.startswith(f"{one}.")}


@pytest.mark.parametrize("forbidden", [RUNS_TEXT, STARTS_PROGRAMS, CONNECTS], ids=["text", "programs", "network"])
def test_no_module_runs_text_starts_programs_or_connects(forbidden: set[str]) -> None:
    found = {path.relative_to(ROOT).as_posix(): used for path in MODULES if (used := uses(path, forbidden))}
    assert not found


def test_one_module_writes_files() -> None:
    """No node calls ``main``, the command line of the check, which writes the file that its user names."""
    found = {path.relative_to(ROOT).as_posix(): used for path in MODULES if (used := uses(path, WRITES))}
    assert set(found) == {"nodes/output_files.py", "gag_core/check.py"}
    assert found["gag_core/check.py"] == {"write_text"}
    command = (ROOT / "gag_core" / "check.py").read_text(encoding="utf-8").partition("def main(")
    assert "write_text" not in command[0] and command[2].count("write_text") == 1
    assert not [path for path in MODULES if re.search(r"check import .*\bmain\b|check\.main", path.read_text("utf-8"))]
    calls = re.compile(r"\bopen\([^)]*[\"'][wax+]")
    assert [path.name for path in MODULES if calls.search(path.read_text(encoding="utf-8"))] == ["output_files.py"]


def test_these_names_would_be_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "import os, urllib.request\nfrom torch import load\nos.system('')\neval('1')\npath.write_text('')\n"
    )
    assert uses(module, RUNS_TEXT) == {"eval", "torch.load"}
    assert uses(module, STARTS_PROGRAMS) == {"os.system"}
    assert uses(module, CONNECTS) == {"urllib"}
    assert uses(module, WRITES) == {"write_text"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_writes_markup_runs_text_or_asks_another_server(script: Path) -> None:
    text = re.sub(r"/\*.*?\*/|^\s*//.*$", "", script.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|\beval\(|new Function|XMLHttpRequest"
    forbidden += r"|sendBeacon|EventSource|new WebSocket|(?<![.\w])fetch\("
    assert not re.findall(forbidden, text)
    # Namespaces of SVG are names, not addresses that are asked.
    assert not [url for url in re.findall(r"https?://[^\s\"'`]+", text) if not url.startswith("http://www.w3.org/")]


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, function in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, f"{file}::{function}"
