# SPDX-License-Identifier: GPL-3.0-or-later
"""Version, notes and pictures of a release in the Comfy Registry, and the workflow that publishes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from PIL import Image

import release

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PUBLISH = ROOT / ".github" / "workflows" / "publish.yml"


def test_the_changelog_begins_with_the_version_and_says_what_is_new() -> None:
    version = release.version(PYPROJECT)
    assert re.findall(r"^## (.*)$", CHANGELOG, flags=re.MULTILINE)[0] == version
    assert release.notes(CHANGELOG, version)


def test_a_version_without_notes_is_not_released() -> None:
    assert release.notes("# Changelog\n\n## 1.0.1\n\n- a\n- b\n\n## 1.0.0\n\n- c\n", "1.0.1") == "- a\n- b"
    for changelog in ("# Changelog\n", "## 1.0.10\n\n- a\n", "## 1.0.1\n\n## 1.0.0\n\n- c\n"):
        with pytest.raises(SystemExit, match=re.escape("CHANGELOG.md has no notes on 1.0.1.")):
            release.notes(changelog, "1.0.1")


def test_a_version_has_three_numbers() -> None:
    assert release.version('name = "a"\nversion = "12.3.4"\n') == "12.3.4"
    for text in ('version = "1.0"\n', 'dynamic = ["version"]\n', 'requires-version = "1.0.0"\n'):
        with pytest.raises(SystemExit, match="has no line version"):
            release.version(text)


def test_the_version_is_in_one_file_only() -> None:
    version = re.compile(rf"(?<![\d.]){re.escape(release.version(PYPROJECT))}(?![\d.])")
    code = [path for folder in ("gag_core", "nodes", "web") for path in (ROOT / folder).rglob("*.*")]
    texts = [path for path in (*code, *ROOT.glob("*.py"), ROOT / "README.md") if path.suffix in (".py", ".js", ".md")]
    assert [path for path in texts if version.search(path.read_text(encoding="utf-8"))] == []


def test_requirements_are_the_same_for_pip_and_the_registry() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (dependencies,) = re.findall(r"^dependencies = \[(.*)\]$", PYPROJECT, flags=re.MULTILINE)
    assert re.findall(r'"([^"]+)"', dependencies) == [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(("key", "ratio", "most"), [("Icon", 1.0, 400), ("Banner", 21 / 9, 1260)])
def test_pictures_are_as_the_registry_wants_them(key: str, ratio: float, most: int) -> None:
    (name,) = re.findall(rf'^{key} = "REPOSITORY/raw/main/(.*)"$', PYPROJECT, flags=re.MULTILINE)
    with Image.open(ROOT / name) as picture:
        assert picture.width / picture.height == pytest.approx(ratio, rel=1e-2)
        assert picture.width <= most


def test_published_files_get_the_repositorys_address() -> None:
    """No file has the address, so that a fork publishes its own."""
    with_placeholder = {
        path.name for path in ROOT.glob("*.*") if path.suffix in (".md", ".toml") and _has_placeholder(path)
    }
    (replaced,) = re.findall(r'sed -i "[^"]*REPOSITORY[^"]*" (.*)$', PUBLISH.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(replaced.split()) == with_placeholder


def test_publishes_only_with_the_secret_and_only_new_versions() -> None:
    workflow: dict[Any, Any] = yaml.safe_load(PUBLISH.read_text(encoding="utf-8"))
    on = workflow[True]  # YAML reads the key "on" as True
    assert set(on) == {"workflow_dispatch", "push"}
    assert on["push"] == {"branches": ["main"], "paths": ["pyproject.toml"]}
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    *_, check, prepare, publish = job["steps"]
    assert "dev/release.py --since" in check["run"]
    for step in (prepare, publish):
        assert step["if"] == f"steps.{check['id']}.outputs.version != ''"
    assert publish["env"] == {"TOKEN": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}
    assert "REGISTRY_ACCESS_TOKEN" not in str([step for step in job["steps"] if step is not publish])
    assert "pip install --quiet --no-deps --require-hashes" in publish["run"]
    assert "--only-binary :all: -r dev/requirements-registry.lock" in publish["run"]


def test_actions_are_pinned_by_commit_and_have_few_rights() -> None:
    workflows = sorted((ROOT / ".github").rglob("*.y*ml"))
    assert workflows
    for path in workflows:
        text = path.read_text(encoding="utf-8")
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert "permissions" not in job
        for used in re.findall(r"uses: *(.*)$", text, flags=re.MULTILINE):
            assert re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", used), used
        assert text.count("persist-credentials: false") == text.count("uses: actions/checkout@")


def _has_placeholder(path: Path) -> bool:
    return "REPOSITORY" in path.read_text(encoding="utf-8")
