# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules of the pack without its node classes, for scripts that run before or without ComfyUI."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from comfy_host import ROOT

# Modules that scripts import by themselves, as paths below nodes/.
FAMILIES = "patching.families"
DEMO_ARCHITECTURE = "demo.architecture"
DEMO_TEXT_ENCODER = "demo.text_encoder"
DEMO_MODELS = "demo.models"
DEMO_SCENES = "demo.scenes"
DEMO_CAPTIONS = "demo.captions"
DEMO_SCENE_CHECK = "demo.scene_check"
CLIP_SCORE = "scoring.clip_score"
SIGNIFICANCE = "scoring.significance"


def module(name: str) -> Any:
    """Import a module of ``nodes/`` by itself, for example ``pack.module(pack.FAMILIES)``.

    The pack's own ``__init__`` files import its node classes, and those import ComfyUI. Here empty packages stand in
    their place. They are called ``gag_pack``, because ``nodes`` is also the name of a module of ComfyUI's.
    """
    folders = {f"gag_pack.nodes.{part}": ROOT / "nodes" / part for part in ("patching", "demo", "scoring")}
    for package, folder in {"gag_pack": ROOT, "gag_pack.nodes": ROOT / "nodes", **folders}.items():
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"gag_pack.nodes.{name}")
