# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings behind the preset names, and the defaults of the nodes."""

from __future__ import annotations

from dataclasses import replace

from ..gag_core import GuidanceConfig

PRESETS: dict[str, GuidanceConfig] = {
    # Small steps, and a cap that follows the size of the model's own values.
    "gentle": GuidanceConfig(guidance_scale=2.0, norm_threshold=0.1, norm_mode="relative"),
    # The settings of arXiv 2603.02531 v2 for SDXL at CFG 5.
    "paper": GuidanceConfig(guidance_scale=10.0, norm_threshold=15.0, norm_mode="absolute"),
}
DEFAULT_PRESET = "gentle"
# The settings of a new node. On the demo models a higher strength did more good in the cases where guidance did good,
# and far more harm in the cases where it did harm (docs/evidence.md).
DEFAULT = replace(PRESETS[DEFAULT_PRESET], strength=0.25)
# On the demo models most of the harm beside CFG came from guidance in the first steps; on the models into which CFG had
# been distilled, all of the harm.
DEFAULT_START = 0.3
