# SPDX-License-Identifier: GPL-3.0-or-later
"""The pack's nodes, as ComfyUI asks for them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .demo import GAGDemoEmptyLatent, GAGDemoLoader, GAGDemoPrompt
from .guidance import GAGuidance, GAGuidanceAdvanced


class GAGExtension(ComfyExtension):
    """What the host asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [GAGuidance, GAGuidanceAdvanced, GAGDemoLoader, GAGDemoPrompt, GAGDemoEmptyLatent]


async def comfy_entrypoint() -> GAGExtension:
    """Where the host enters the pack."""
    return GAGExtension()
