# SPDX-License-Identifier: GPL-3.0-or-later
"""The pack's nodes, as ComfyUI asks for them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .anderson import GAGAnderson
from .demo import GAGDemoEmptyLatent, GAGDemoLoader, GAGDemoPrompt
from .grid import GAGGrid
from .guidance import GAGuidance, GAGuidanceAdvanced
from .live import add_routes
from .probe import GAGProbe
from .report import GAGReport
from .schedule import GAGSchedule
from .sweep import GAGSweep


class GAGExtension(ComfyExtension):
    """What the host asks for the nodes."""

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
            GAGDemoLoader,
            GAGDemoPrompt,
            GAGDemoEmptyLatent,
        ]


async def comfy_entrypoint() -> GAGExtension:
    """Where the host enters the pack."""
    add_routes()
    return GAGExtension()
