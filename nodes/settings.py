# SPDX-License-Identifier: GPL-3.0-or-later
"""What one guidance node asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..gag_core import GuidanceConfig
from .families import Family, Layer
from .schedules import Schedule


@dataclass(frozen=True, eq=False)
class Guidance:
    """What one GAG node asks for: plain data.

    ``order`` is every text attention of the model in the order of execution, ``layers`` those that are to be guided.
    """

    config: GuidanceConfig
    family: Family
    order: tuple[Layer, ...]
    layers: frozenset[Layer]
    apply_to: Literal["both", "positive"] = "both"
    start_percent: float = 0.0
    end_percent: float = 1.0
    verbose: bool = False
    node_id: str | None = None
    schedule: Schedule | None = None

    @property
    def ranged(self) -> bool:
        """Whether it acts in a stretch of the run only."""
        return (self.start_percent, self.end_percent) != (0.0, 1.0)

    @property
    def changes(self) -> bool:
        """Whether what it does depends on where in the run a model call is."""
        return self.ranged or self.schedule is not None

    def times(self, factor: float) -> Guidance:
        """The same with another strength, for one model call. Counts are kept by the one it is made of."""
        if factor == 1.0:
            return self
        return replace(self, config=replace(self.config, strength=self.config.strength * factor))
