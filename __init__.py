# SPDX-License-Identifier: GPL-3.0-or-later
"""GAG for ComfyUI: Geometry-Aware Attention Guidance as model patches."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
