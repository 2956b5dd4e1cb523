# SPDX-License-Identifier: GPL-3.0-or-later
"""The ComfyUI and the Python that development uses.

A ComfyUI of the user's comes first: the one that ``COMFYUI_PATH`` names, or the one whose ``custom_nodes/`` contains
this repository. Otherwise it is the one that ``dev.py`` puts into ``.cache/``. This module uses the standard library
only, because it runs before anything is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
# Version of the ComfyUI that dev.py installs, in which everything is tested.
PINNED = "0.3.75"
CACHED_HOST = CACHE / f"comfyui-{PINNED}"
VENV = CACHE / "venv"
# Environment of the command lines of the Comfy Registry and of ComfyUI-Manager, which need other packages than ComfyUI.
VENV_REGISTRY = CACHE / "venv-registry"
# Older versions of Triton, in whose interpreters tests run the kernels. dev/lock.py pins them.
OLDER_TRITON = ("3.1.0", "3.3.1")
# Results of the last full run of pytest.
TEST_RESULTS = CACHE / "tests.xml"


class HostError(Exception):
    """The set-up is wrong. The message is one sentence, shown to the user as it is."""


def users_host() -> Path | None:
    """Return the user's own ComfyUI, or None."""
    if named := os.environ.get("COMFYUI_PATH"):
        host = Path(named).expanduser().resolve()
        if not _is_host(host):
            raise HostError(f"COMFYUI_PATH is {named}, but main.py and comfy/ are not there.")
        return host
    if ROOT.parent.name == "custom_nodes" and _is_host(ROOT.parents[1]):
        return ROOT.parents[1]
    return None


def find_host() -> Path:
    """Return the folder of the ComfyUI to use."""
    host = users_host() or CACHED_HOST
    if not _is_host(host):
        raise HostError("There is no ComfyUI yet: run `python dev.py setup`.")
    return host


def python_in(venv: Path) -> Path:
    """Return the path of a virtual environment's Python."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def users_python(host: Path) -> Path | None:
    """Return the Python of the user's ComfyUI, or None if it was not found."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        python = Path(named).expanduser().absolute()
        if not python.is_file():
            raise HostError(f"COMFYUI_PYTHON is {named}, but there is no such file.")
        return python
    portable = host.parent / "python_embeded" / "python.exe"  # the spelling of ComfyUI's Windows package
    candidates = [Path(sys.executable), python_in(host / ".venv"), python_in(host / "venv"), portable]
    return next((path for path in candidates if path.is_file() and not missing_modules(path, "torch", "aiohttp")), None)


def ask(python: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that may have packages in its user's folder. Return the finished process with its output.

    PYTHONPATH is ignored, and the folder whose modules Python finds first is one of this repository.
    """
    command = [str(python), "-E", "-X", "utf8", "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT / "dev", capture_output=True, text=True, encoding="utf-8")


def python_version(python: Path) -> tuple[int, int]:
    """Return major and minor version of a Python."""
    answer = ask(python, "import sys; print(*sys.version_info[:2])")
    major, minor = answer.stdout.split()
    return int(major), int(minor)


def older_triton(version: str) -> Path:
    """Return the folder of an older Triton, with the NumPy that its interpreter needs."""
    return CACHE / f"triton-{version}"


def has_older_triton(python: tuple[int, int]) -> bool:
    """Return True if the wheels of the older versions of Triton are for this system and this version of Python."""
    # NumPy 1.26 has none for Python 3.13.
    return sys.platform == "linux" and platform.machine() == "x86_64" and (3, 10) <= python <= (3, 12)


def missing_modules(python: Path, *modules: str) -> list[str]:
    """Return the modules that a Python does not have. They are looked up, not imported."""
    code = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"
    answer = ask(python, code, *modules)
    return answer.stdout.split() if answer.returncode == 0 else list(modules)


def install_pack(custom_nodes: Path, pack: Path = ROOT) -> Path:
    """Install a node pack in a folder as ``gag``: as a link, or as a copy where links are not allowed."""
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
