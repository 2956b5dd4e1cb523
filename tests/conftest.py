# SPDX-License-Identifier: GPL-3.0-or-later
"""Options and environment of all tests: Triton's interpreter, and the option ``--browser``.

Triton's kernels run in its interpreter, which must be chosen before anything imports Triton. If GAG_TEST_DEVICE names a
device, they run on that device instead (see tests/core/test_kernels.py).

The browser tests run with ``--browser`` only, because not every machine has a browser.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if "GAG_TEST_DEVICE" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--browser", action="store_true", help="also run tests/browser, in a real Chromium")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path == ROOT / "tests" / "browser" and not config.getoption("browser") else None
