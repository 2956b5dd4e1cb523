# SPDX-License-Identifier: GPL-3.0-or-later
"""A prompt for models whose text encoder is too large for tests; loaded by the server of test_workflows_run.py."""

from __future__ import annotations

from typing import Any

import torch


class RandomPrompt:
    """What a text encoder would give: seeded random tokens."""

    CATEGORY = "GAG/tests"
    FUNCTION = "run"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"seed": ("INT", {"max": 10**9}), "tokens": ("INT",), "width": ("INT", {"max": 10**5})}}

    def run(self, seed: int, tokens: int, width: int) -> tuple[Any]:
        text = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
        return ([[text, {}]],)


NODE_CLASS_MAPPINGS = {RandomPrompt.__name__: RandomPrompt}
