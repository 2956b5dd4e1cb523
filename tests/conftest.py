# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes ``import gag_core`` work in the tests, without the repository's root on ``sys.path``.

The root has a folder ``nodes``, and so has ComfyUI a module of that name, which the host tests import into the same
process.

Triton's kernels run in its interpreter here, which has to be said before anything imports Triton; but on a card where
GAG_TEST_DEVICE names one (see tests/core/test_kernels.py).

The tests in a browser run with ``--browser`` only, because not every machine has one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if "GAG_TEST_DEVICE" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--browser", action="store_true", help="also run tests/browser, in a real Chromium")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path == ROOT / "tests" / "browser" and not config.getoption("browser") else None


def _load_gag_core() -> None:
    folder = ROOT / "gag_core"
    spec = importlib.util.spec_from_file_location(
        "gag_core", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gag_core"] = module
    spec.loader.exec_module(module)


if "gag_core" not in sys.modules:
    _load_gag_core()
