# SPDX-License-Identifier: GPL-3.0-or-later
"""A node for models whose text encoder is too large for tests; the server of test_example_runs.py loads it."""

from __future__ import annotations

from typing import Any

import torch


class RandomPrompt:
    """Seeded random tokens in place of a text encoder's output."""

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
