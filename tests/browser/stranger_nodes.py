# SPDX-License-Identifier: GPL-3.0-or-later
"""A node for the browser tests, which the server under test loads: a model whose class has markup in its name."""

from __future__ import annotations

from typing import Any

import torch

NAME = "<img src=x onerror=window.__pwned=1>[[x|javascript:window.__pwned=1]]"


class StrangerModel:
    """Node that returns a model of a class that GAG does not know."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        """Return the model with another diffusion model, which never runs."""
        patched = model.clone()
        patched.add_object_patch("diffusion_model", type(NAME, (torch.nn.Module,), {})())
        return (patched,)


NODE_CLASS_MAPPINGS = {"StrangerModel": StrangerModel}
