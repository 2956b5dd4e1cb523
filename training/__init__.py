# SPDX-License-Identifier: GPL-3.0-or-later
"""How the pack's own demo models are made: data, checker, text encoder, models, training. For developers only."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_NODES = Path(__file__).resolve().parents[1] / "nodes"


def pack_module(name: str) -> Any:
    """A file of the pack's ``nodes/`` by itself, without the pack's node classes.

    Under a name of its own, because the host has a module ``nodes``.
    """
    if "gag_nodes" not in sys.modules:
        package = ModuleType("gag_nodes")
        package.__path__ = [str(_NODES)]
        sys.modules["gag_nodes"] = package
    return importlib.import_module(f"gag_nodes.{name}")


demo_architecture = pack_module("demo_architecture")
