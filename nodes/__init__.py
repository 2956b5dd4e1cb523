# SPDX-License-Identifier: GPL-3.0-or-later
"""The pack's nodes: one file per node, found by its name.

=============  ======================================================================="""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .advanced import GAGuidanceAdvanced
from .anderson import GAGAnderson
from .check import GAGCheck
from .demo_loader import GAGDemoLoader
from .gag import GAGuidance
from .grid import GAGGrid
from .panel.routes import add_routes
from .probe import GAGProbe
from .report import GAGReport
from .schedule import GAGSchedule
from .score import GAGScore
from .sweep import GAGSweep


class GAGExtension(ComfyExtension):
    """Extension of ComfyUI: the list of the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            GAGuidance,
            GAGuidanceAdvanced,
            GAGAnderson,
            GAGProbe,
            GAGReport,
            GAGSchedule,
            GAGSweep,
            GAGGrid,
            GAGScore,
            GAGCheck,
            GAGDemoLoader,
        ]


async def comfy_entrypoint() -> GAGExtension:
    """Return the extension; ComfyUI calls this when it loads the pack."""
    add_routes()
    return GAGExtension()
