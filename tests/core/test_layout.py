# SPDX-License-Identifier: GPL-3.0-or-later
"""The structure of the code: every package has a map, and no two files depend on each other."""

from __future__ import annotations

import ast
import re
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(
    path.parent.relative_to(ROOT).as_posix()
    for folder in ("gag_core", "nodes", "benchmarks", "training", "dev")
    for path in (ROOT / folder).rglob("__init__.py")
)
# Openings of docstrings that define nothing.
RIDDLES = ("What", "How", "Whether", "Of", "As", "Where", "Which", "Who")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[Path]:
    """Files of the pack that a file imports when it is loaded; imports inside functions run later."""
    found: set[Path] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.parents[node.level - 1] / Path(*(node.module or "").split("."))
        for name in node.names:
            found.update(file for file in (base.with_suffix(".py"), base / f"{name.name}.py") if file.exists())
            if (base / "__init__.py").exists() and not (base / f"{name.name}.py").exists():
                found.add(base / "__init__.py")
    return found - {path}


def test_no_import_circle() -> None:
    graph = {path: imports(path) for path in python_files("gag_core", "nodes")}
    assert sum(map(len, graph.values())) > 50, "imports are not found"
    finished: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " -> ".join(file.name for file in (*above[above.index(path) :], path))
        if path in finished:
            return
        for other in graph.get(path, ()):
            visit(other, (*above, path))
        finished.add(path)

    for path in graph:
        visit(path, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_stands_in_the_map_of_its_package(package: str) -> None:
    folder = ROOT / package
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    files = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    packages = [path.parent.name for path in folder.glob("*/__init__.py")]
    words = set(re.findall(r"\w+", text))
    assert [name for name in [*files, *packages] if name not in words] == []


@pytest.mark.parametrize("folder", ["gag_core", "nodes", "benchmarks", "dev", "training"])
def test_no_two_file_names_differ_by_an_ending(folder: str) -> None:
    names = sorted({path.stem for path in python_files(folder)} - {"__init__"})
    endings = ("s", "es", "ed", "ing", "er", "ion", "_model", "_architecture")
    assert [(a, b) for a, b in combinations(names, 2) if any(b == a + ending for ending in endings)] == []


def test_docstrings_define() -> None:
    """A docstring says what a thing is or does; it does not open with a question word."""
    found = []
    for path in python_files("gag_core", "nodes", "benchmarks", "training", "dev", "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if text.split(" ")[0].rstrip(",:") in RIDDLES:
                    found.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found == []


def test_the_engine_has_no_node_class_and_no_server() -> None:
    for path in python_files("nodes/patching"):
        text = path.read_text(encoding="utf-8")
        assert "io.ComfyNode" not in text, path
        assert not re.search(r"\bfrom (server|aiohttp)\b|\bimport (server|aiohttp)\b|\.panel\b", text), path
