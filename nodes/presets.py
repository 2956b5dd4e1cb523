# SPDX-License-Identifier: GPL-3.0-or-later
"""The settings behind the preset names."""

from __future__ import annotations

from ..gag_core import GuidanceConfig

PRESETS: dict[str, GuidanceConfig] = {
    # Small steps, and a cap that follows the size of the model's own values: on the demo model the share of right
    # pictures did not measurably fall.
    "gentle": GuidanceConfig(guidance_scale=2.0, norm_threshold=0.1, norm_mode="relative"),
    # Between the other two: a run of few steps has fewer chances to add up, and no CFG beside it.
    "few-step": GuidanceConfig(guidance_scale=4.0, norm_threshold=0.25, norm_mode="relative"),
    # What arXiv 2603.02531 v2 uses for SDXL at CFG 5.
    "paper": GuidanceConfig(guidance_scale=10.0, norm_threshold=15.0, norm_mode="absolute"),
}
DEFAULT_PRESET = "gentle"
