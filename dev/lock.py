# SPDX-License-Identifier: GPL-3.0-or-later
"""Rewrite the lock files from the .in files: ``python dev/lock.py [path of uv]``; needs uv, and users never run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from comfy_host import OLDER_TRITON

DEV = Path(__file__).resolve().parent
OPTIONS = [
    "--no-python-downloads",
    "--universal",
    "--python-version=3.10",
    "--generate-hashes",
    "--no-header",
    "--no-annotate",
]
CUDA = re.compile(r"(nvidia|cuda)-")

ABOUT = {
    "requirements.lock": "Everything but torch and the CUDA libraries.",
    "requirements-torch.lock": "torch alone; dev.py prefers requirements-torch-cpu.lock where it can be had.",
    "requirements-cuda.lock": "The CUDA libraries; installed only beside a torch build that asks for them.",
}
# With NumPy 2 the interpreters of older versions of Triton compute other numbers, or fail.
OLDER_NUMPY = "1.26.4"
REGISTRY = ["requirements-registry.in", "--excludes=requirements-registry.excludes"]


def lock_file_of(requirement: str) -> str:
    """Return the name of the lock file for a pinned requirement."""
    if requirement.startswith("torch=="):
        return "requirements-torch.lock"
    return "requirements-cuda.lock" if CUDA.match(requirement) else "requirements.lock"


def main() -> int:
    """Resolve the packages of one environment together, so that they fit, then write them to their lock files."""
    uv = sys.argv[1] if len(sys.argv) > 1 else "uv"
    pinned = resolve(uv, "requirements.in")
    for name, about in ABOUT.items():
        write(name, about, [part for part in pinned if lock_file_of(part) == name], "requirements.in, split")
    about = "The command lines of the Comfy Registry and ComfyUI-Manager."
    write("requirements-registry.lock", about, resolve(uv, *REGISTRY), " ".join(REGISTRY))
    for version in OLDER_TRITON:
        sources = f"triton=={version}\nnumpy=={OLDER_NUMPY}\n"
        about = f"Triton {version} for its interpreter, with a NumPy that it can use."
        write(f"triton-{version}.lock", about, resolve(uv, "--no-deps", "-", text=sources), "--no-deps -")
    return 0


def resolve(uv: str, *sources: str, text: str | None = None) -> list[str]:
    """Return all requirements of the sources, pinned; the source ``-`` is ``text``."""
    command = [uv, "pip", "compile", *OPTIONS, *sources]
    text = subprocess.run(command, cwd=DEV, check=True, stdout=subprocess.PIPE, text=True, input=text).stdout
    # A requirement is one line and its indented hash lines. Options such as index addresses are left out.
    pinned = re.findall(r"^[a-zA-Z0-9][^\n]*==[^\n]*\n(?:[ ]+--hash=[^\n]*\n?)*", text, flags=re.MULTILINE)
    return [part.rstrip("\n") for part in pinned]


def write(name: str, about: str, parts: list[str], sources: str) -> None:
    """Write a lock file."""
    header = f"# {about} Install with --no-deps --require-hashes.\n"
    header += f"# Written by `python dev/lock.py`: uv pip compile {' '.join(OPTIONS)} {sources}.\n"
    (DEV / name).write_text(header + "\n".join(parts) + "\n", encoding="utf-8", newline="\n")
    print(f"{name}: {len(parts)} requirements")


if __name__ == "__main__":
    sys.exit(main())
