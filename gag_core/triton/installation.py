# SPDX-License-Identifier: GPL-3.0-or-later
"""Triton as it is installed: it may be missing, broken, or another package's stub that only bears its name."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from functools import lru_cache

from ..echo import plain

log = logging.getLogger("comfyui-gag")


def _is_there() -> bool:
    """Return True if ``import triton`` would find something, whatever that is."""
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None
    try:
        return importlib.util.find_spec("triton") is not None
    except Exception:  # finders of other packages can raise anything
        return True


IS_THERE = _is_there()


@lru_cache(maxsize=1)
def is_usable() -> bool:
    """Return True if Triton makes kernels here. If a Triton is there that does not, the log says once why."""
    if not IS_THERE:
        return False
    problem = _problem()
    if problem is not None:
        log.warning(
            "GAG cannot use the installed Triton, so plain PyTorch computes everything: the same picture, slower. "
            "Reason: %s. The package triton (on Windows triton-windows) may be broken, or another node pack may have "
            "put a stub in its place. Install the package again if you need the speed.",
            plain(problem, 300),
        )
    return problem is None


def _problem() -> str | None:
    """Return why Triton does not make kernels, or None if it does."""
    try:
        from . import kernels
    except (Exception, SystemExit) as error:  # a broken installation can raise anything
        return f"{type(error).__name__}: {error}"
    kind = type(kernels.guided_attention_kernel)
    if kind.__module__.partition(".")[0] != "triton":
        return f"triton.jit makes a {kind.__module__}.{kind.__qualname__} and no kernel"
    return None if version() is not None else "its version is not known"


def version() -> tuple[int, int] | None:
    """Return the version of the imported Triton, major and minor; None if it has none."""
    numbers = re.match(r"(\d+)\.(\d+)", str(getattr(sys.modules.get("triton"), "__version__", "")))
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))
