# SPDX-License-Identifier: GPL-3.0-or-later
"""The presets: every setting of a guidance node behind one name, and the defaults of the nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..gag_core import GuidanceConfig


@dataclass(frozen=True)
class Preset:
    """All settings that a preset stands for.

    Attributes:
        config: settings of the guidance rule, the strength included.
        start_percent, end_percent: stretch of the run in which guidance acts, 0 to 1.
        adapt_to_cfg: True if guidance rests beside CFG.
    """

    config: GuidanceConfig
    start_percent: float = 0.0
    end_percent: float = 1.0
    adapt_to_cfg: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Return the settings under the names of the inputs of GAG (advanced)."""
        others = {name: value for name, value in vars(self).items() if name != "config"}
        return {**vars(self.config), **others}

    def scaled(self, strength: float) -> GuidanceConfig:
        """Return the config at a multiple of the preset's strength.

        Raises:
            ValueError, TypeError: the multiple is no finite number.
        """
        checked = replace(self.config, strength=strength)
        return replace(self.config, strength=checked.strength * self.config.strength)


_CAPPED = GuidanceConfig(norm_threshold=0.1, norm_mode="relative")
# docs/evidence.md has the measurements behind each preset.
PRESETS: dict[str, Preset] = {
    # Without CFG this did good on all demo models. Beside CFG nothing did good on all of them, so it rests there.
    "auto": Preset(replace(_CAPPED, rule="uniform", guidance_scale=0.5), adapt_to_cfg=True),
    # The best setting of GAG itself without CFG; it did much harm beside CFG.
    "no CFG": Preset(replace(_CAPPED, guidance_scale=10.0, strength=0.5)),
    # Most of the harm that GAG does beside CFG comes from the first steps.
    "beside CFG": Preset(replace(_CAPPED, guidance_scale=2.0, strength=0.25), start_percent=0.3),
    # The settings of arXiv 2603.02531 v2 for SDXL at CFG 5.
    "paper": Preset(GuidanceConfig(guidance_scale=10.0, norm_threshold=15.0, norm_mode="absolute")),
}
DEFAULT_PRESET = "auto"
# The settings of a new node.
DEFAULT = PRESETS[DEFAULT_PRESET]
