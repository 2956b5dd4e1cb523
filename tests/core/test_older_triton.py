# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernels in the interpreters of older versions of Triton: the tests of this folder, each in a process of its own.

``dev.py`` puts these versions into ``.cache/``. There are wheels for Linux on x86-64 and Python 3.10 to 3.12 only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_host import OLDER_TRITON, has_older_triton, older_triton

ROOT = Path(__file__).resolve().parents[2]
# The fused kernel needs Triton 3.3. Some of its tests are enough, because the formulas are those of the row kernels.
TESTS = {
    "3.1.0": ["tests/core/test_row_kernels.py"],
    "3.3.1": ["tests/core/test_row_kernels.py", "tests/core/test_kernels.py::test_masks"],
}

pytestmark = [
    pytest.mark.skipif(
        not has_older_triton(sys.version_info[:2]), reason="no wheels of older Triton for this system or this Python"
    ),
    pytest.mark.skipif("GAG_TEST_DEVICE" in os.environ, reason="the interpreter is off"),
]


@pytest.mark.parametrize("version", OLDER_TRITON)
def test_its_packages_are_pinned(version: str) -> None:
    lock = (ROOT / "dev" / f"triton-{version}.lock").read_text(encoding="utf-8")
    assert re.findall(r"^[^#\s].*==\S+", lock, flags=re.MULTILINE) == ["numpy==1.26.4", f"triton=={version}"]


@pytest.mark.parametrize("version", OLDER_TRITON)
def test_kernels_in_the_interpreter_of(version: str) -> None:
    folder = older_triton(version)
    assert (folder / "gag-ready").exists(), f"Triton {version} is missing: run `python dev.py setup`"
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    check = f"import triton; assert triton.__version__ == {version!r}, triton.__version__"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=environment).returncode == 0
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS[version]]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    summary = run.stdout.splitlines()[-1:]
    assert run.returncode == 0 and " passed" in str(summary), run.stdout[-5000:] + run.stderr[-2000:]
    assert " skipped" not in str(summary), summary
