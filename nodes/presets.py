# SPDX-License-Identifier: GPL-3.0-or-later
"""The settings behind the preset names."""

from __future__ import annotations

from dataclasses import replace

from ..gag_core import GuidanceConfig

PRESETS: dict[str, GuidanceConfig] = {
    # Small steps, and a cap that follows the size of the model's own values.
    "gentle": GuidanceConfig(guidance_scale=2.0, norm_threshold=0.1, norm_mode="relative"),
    # What arXiv 2603.02531 v2 uses for SDXL at CFG 5.
    "paper": GuidanceConfig(guidance_scale=10.0, norm_threshold=15.0, norm_mode="absolute"),
}
DEFAULT_PRESET = "gentle"
# What a new node is set to. On the demo models more of the guidance did more good where it did good, and far more harm
# where it did harm (docs/evidence.md).
DEFAULT = replace(PRESETS[DEFAULT_PRESET], strength=0.25)
# There, most of the harm it did beside CFG, and all where CFG had been distilled in, came of the first steps.
DEFAULT_START = 0.3
