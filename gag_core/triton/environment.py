# SPDX-License-Identifier: GPL-3.0-or-later
"""The environment variable GAG_KERNELS, by which users choose the implementation themselves."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import Literal, get_args

from ..echo import echo

log = logging.getLogger("comfyui-gag")

Path = Literal["fused", "row", "eager"]
PATHS: tuple[Path, ...] = get_args(Path)
VARIABLE = "GAG_KERNELS"


def wanted() -> Path | Literal["auto"]:
    """Return the value of the variable; ``auto``, the choice by the table, if it is not set."""
    return checked(os.environ.get(VARIABLE, "auto"))


@lru_cache(maxsize=8)
def checked(value: str) -> Path | Literal["auto"]:
    """Check a value of the variable. A bad one is logged once, and stands for ``auto``."""
    for allowed in PATHS:
        if value == allowed:
            return allowed
    if value != "auto":
        log.warning(
            "GAG: GAG_KERNELS must be auto, fused, row or eager, got %s; auto is used. Set the variable to one of "
            "these, or remove it.",
            echo(value),
        )
    return "auto"
