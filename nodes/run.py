# SPDX-License-Identifier: GPL-3.0-or-later
"""What a GAG node asks for, and what became of it in one sampling run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from ..gag_core import GuidanceConfig
from .families import Family, Layer
from .host import log, show_on_node


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


@dataclass
class Run:
    """Counts of one sampling run, by guidance; and what was found out once and holds for all of it."""

    model_calls: int = 0
    in_range: Counter[Guidance] = field(default_factory=Counter)
    no_positive_rows: Counter[Guidance] = field(default_factory=Counter)
    guided: dict[Guidance, Counter[Layer]] = field(default_factory=dict)
    sigmas: dict[Guidance, tuple[float, float]] = field(default_factory=dict)
    token_counts: dict[Any, int] = field(default_factory=dict)

    def count(self, guidance: Guidance, layer: Layer) -> None:
        """One attention was guided."""
        self.guided.setdefault(guidance, Counter())[layer] += 1

    def report(self, guidance: Guidance) -> None:
        """Say on the node, and where it matters in the log, what became of a guidance."""
        counts = self.guided.get(guidance)
        if not counts:
            text = f"GAG guided nothing in this run: {self._why_nothing(guidance)}."
            log.warning(text)
        else:
            text = (
                f"GAG guided {len(counts)} of {len(guidance.layers)} chosen text attentions "
                f"in {self.in_range[guidance]} of {self.model_calls} model calls."
            )
            if guidance.verbose:
                listed = ", ".join(f"{'.'.join(map(str, layer))}: {counts[layer]}" for layer in sorted(counts))
                log.info("%s Settings: %s. Calls by attention: %s", text, guidance.config, listed)
        show_on_node(text, guidance.node_id)

    def _why_nothing(self, guidance: Guidance) -> str:
        reached = self.in_range[guidance]
        if not self.model_calls:
            return "the sampler made no model call"
        if not reached:
            span = f"start_percent {guidance.start_percent:g} to end_percent {guidance.end_percent:g}"
            return f"no step of this run lies within {span}, or a later GAG node on the same model covers them all"
        if self.no_positive_rows[guidance] == reached:
            return 'apply_to is "positive" and no model call had a positive prompt'
        return "none of the chosen attentions ran; another node may replace the model's blocks or its attention"
