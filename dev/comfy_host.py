# SPDX-License-Identifier: GPL-3.0-or-later
"""Which ComfyUI, and which Python, development runs with. Standard library only: it runs before anything is installed.

A ComfyUI that the user already has comes first: the one that ``COMFYUI_PATH`` names, or the one whose ``custom_nodes/``
this repository lies in. Otherwise it is the one that ``dev.py`` puts into ``.cache/``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
# The ComfyUI that dev.py brings, which everything is tested in.
PINNED = "0.3.75"
CACHED_HOST = CACHE / f"comfyui-{PINNED}"
VENV = CACHE / "venv"
# The command lines of the Comfy Registry and of ComfyUI-Manager, apart: they need other packages than ComfyUI.
VENV_REGISTRY = CACHE / "venv-registry"
# What pytest said in the last full run.
TEST_RESULTS = CACHE / "tests.xml"


class HostError(Exception):
    """Says in one sentence what is wrong with the set-up; shown to the user as it is."""


def users_host() -> Path | None:
    """The ComfyUI that the user already has, if any."""
    if named := os.environ.get("COMFYUI_PATH"):
        host = Path(named).expanduser().resolve()
        if not _is_host(host):
            raise HostError(f"COMFYUI_PATH is {named}, but main.py and comfy/ are not there.")
        return host
    if ROOT.parent.name == "custom_nodes" and _is_host(ROOT.parents[1]):
        return ROOT.parents[1]
    return None


def find_host() -> Path:
    """The folder of the ComfyUI to use."""
    host = users_host() or CACHED_HOST
    if not _is_host(host):
        raise HostError("There is no ComfyUI yet: run `python dev.py setup`.")
    return host


def python_in(venv: Path) -> Path:
    """Where a virtual environment keeps its Python."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def users_python(host: Path) -> Path | None:
    """The Python that the user's ComfyUI runs with, if it can be told."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        python = Path(named).expanduser().absolute()
        if not python.is_file():
            raise HostError(f"COMFYUI_PYTHON is {named}, but there is no such file.")
        return python
    portable = host.parent / "python_embeded" / "python.exe"  # spelled so by ComfyUI's own Windows package
    candidates = [Path(sys.executable), python_in(host / ".venv"), python_in(host / "venv"), portable]
    return next((path for path in candidates if path.is_file() and not missing_modules(path, "torch", "aiohttp")), None)


def python_version(python: Path) -> tuple[int, int]:
    """Major and minor version of a Python."""
    answer = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    major, minor = answer.stdout.split()
    return int(major), int(minor)


def missing_modules(python: Path, *modules: str) -> list[str]:
    """Those of the modules that a Python does not have (it is only asked where they are; nothing is imported)."""
    code = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"
    answer = subprocess.run([python, "-c", code, *modules], capture_output=True, text=True)
    return answer.stdout.split() if answer.returncode == 0 else list(modules)


def install_pack(custom_nodes: Path, pack: Path = ROOT) -> Path:
    """Put a node pack into a folder as ``gag``: as a link, or as a copy where links are not allowed."""
    target = custom_nodes / "gag"
    if target.is_symlink():
        if target.exists() and target.samefile(pack):
            return target
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)  # an earlier copy
    custom_nodes.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(pack.resolve(), target_is_directory=True)
    except OSError:  # Windows without its developer mode
        shutil.copytree(pack, target, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests"))
    return target


def _is_host(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()
