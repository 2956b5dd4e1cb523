# SPDX-License-Identifier: GPL-3.0-or-later
"""The tests in this folder import ``training``, which is found without the repository's root on the path.

Its folder ``nodes`` would hide the host's module of that name.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import host_process  # noqa: F401  (brings up the host before the tests import it)

_FOLDER = Path(__file__).resolve().parents[2] / "training"
_SPEC = importlib.util.spec_from_file_location(
    "training", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
)
assert _SPEC is not None and _SPEC.loader is not None
sys.modules["training"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sys.modules["training"])
