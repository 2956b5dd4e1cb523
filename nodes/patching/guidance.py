# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings of one GAG node, resolved for a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...gag_core import GuidanceConfig
from .families import Family, Layer
from .strength_curve import Schedule


@dataclass(frozen=True, eq=False)
class Guidance:
    """Settings of one GAG node, resolved for a model: plain data.

    Attributes:
        config: settings of the guidance rule.
        family: family of the model.
        order: every text attention of the model, in the order of execution.
        layers: the text attentions that are guided.
        apply_to: prompts that are guided, ``"both"`` or ``"positive"``.
        start_percent, end_percent: stretch of the run in which the node acts, 0 to 1.
        adapt_to_cfg: True if guidance rests beside CFG, see :func:`cfg_factor`.
        verbose: True if the log lists every guided attention at the end of a run.
        node_id: id of the node, None outside a graph.
        schedule: factor of the strength by step, None for a constant strength.
    """

    config: GuidanceConfig
    family: Family
    order: tuple[Layer, ...]
    layers: frozenset[Layer]
    apply_to: Literal["both", "positive"] = "both"
    start_percent: float = 0.0
    end_percent: float = 1.0
    adapt_to_cfg: bool = False
    verbose: bool = False
    node_id: str | None = None
    schedule: Schedule | None = None

    @property
    def is_ranged(self) -> bool:
        """True if the node acts in a stretch of the run only."""
        return (self.start_percent, self.end_percent) != (0.0, 1.0)

    @property
    def depends_on_step(self) -> bool:
        """True if the effect on a model call depends on the position of the call in the run."""
        return self.is_ranged or self.schedule is not None

    def scaled(self, factor: float) -> Guidance:
        """Return a copy whose strength is multiplied by ``factor``, for one model call.

        :class:`Run` uses the original object as its key; a scaled copy would be another key.
        """
        if factor == 1.0:
            return self
        return replace(self, config=replace(self.config, strength=self.config.strength * factor))


def cfg_of(guider: Any) -> float:
    """Return the CFG scale of a guider at this moment, 1 if it has none. Guiders may change it from step to step."""
    # The guider of DualCFGGuider has two scales; the first is that of the positive prompt.
    scales = (getattr(guider, name, None) for name in ("cfg", "cfg1"))
    return max((float(s) for s in scales if isinstance(s, (int, float)) and math.isfinite(s)), default=1.0)


def cfg_factor(cfg: float) -> float:
    """Return the factor of the strength of guidance that rests beside CFG: 1 up to a scale of 1, 0 from 2 on.

    Between the two it falls in a straight line. Beside CFG of 2 and more no guidance of the text attention did
    measurable good on any of the demo models, and strong settings did harm (docs/evidence.md).
    """
    return min(1.0, max(0.0, 2.0 - cfg))
