# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a module of the developer's side: ``python dev/run.py MODULE [options]``, which ``python dev.py`` calls.

A module is named from ``dev/`` (``demo``, ``generate.texts``) or from the repository (``benchmarks.quality.study``,
``training.train``). The repository goes to the end of ``sys.path``: its folder ``nodes`` has the name of a module of
ComfyUI's, which must be found first once ComfyUI is on the path.
"""

from __future__ import annotations

import runpy
import signal
import sys

from comfy_host import ROOT

if __name__ == "__main__":
    # Servers are stopped and temporary folders removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.path.append(str(ROOT))
    sys.argv[:] = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
