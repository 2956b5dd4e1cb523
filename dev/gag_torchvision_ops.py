# SPDX-License-Identifier: GPL-3.0-or-later
"""Lets a torchvision built for CUDA be imported beside a CPU build of torch.

Such a torchvision cannot load its compiled operators, and then fails on its own Python code, which describes operators
that nobody declared. dev.py copies this file into the development environment where, and only where, that happens; a
.pth file beside it imports it at every start of Python, so it must not import torch itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_libraries: list[Any] = []  # a torch.library.Library takes its declarations back when it is freed


class _DeclareFirst(MetaPathFinder):
    """Finds nothing, but is asked first: just before torchvision is imported it declares the two operators."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import Library

            library = Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)
        return None


sys.meta_path.insert(0, _DeclareFirst())
