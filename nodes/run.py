# SPDX-License-Identifier: GPL-3.0-or-later
"""What became of the nodes' settings in one sampling run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .compiling import CarelessCompile
from .families import Layer
from .host import PositivePrompt, Steps, log, prompt_kinds, show_on_node
from .live import Chart, tell_report
from .recording import Recording
from .settings import Guidance


@dataclass
class Run:
    """Counts of one sampling run, by guidance; and what was found out once and holds for all of it."""

    positive: PositivePrompt | None = None
    careless: CarelessCompile | None = None
    model_calls: int = 0
    in_range: Counter[Guidance] = field(default_factory=Counter)
    overruled: Counter[Guidance] = field(default_factory=Counter)
    unscheduled: Counter[Guidance] = field(default_factory=Counter)
    no_text: Counter[Guidance] = field(default_factory=Counter)
    no_positive_rows: Counter[Guidance] = field(default_factory=Counter)
    guided: dict[Guidance, Counter[Layer]] = field(default_factory=dict)
    sigmas: dict[Guidance, tuple[float, float]] = field(default_factory=dict)
    token_counts: dict[Any, list[tuple[slice, int]]] = field(default_factory=dict)
    recording: Recording | None = None
    steps: Steps = field(default_factory=Steps)
    chart: Chart = field(default_factory=Chart)

    def kinds(self, options: dict[str, Any]) -> list[int]:
        """The prompts whose rows a model call has, in their order; 0 is the positive one."""
        return prompt_kinds(options, self.positive)

    def count_call(self, guidance: Guidance, reached: list[Layer]) -> None:
        """A model call has come to its end in which these attentions were guided.

        Not sooner: torch.compile compiles anew what reads growing counts, and the calls of several devices overlap.
        """
        self.guided.setdefault(guidance, Counter()).update(reached)

    def report(self, guidance: Guidance) -> None:
        """Say on the node, and where it matters in the log, what became of a guidance.

        The node shows some 60 characters, the log the whole sentence.
        """
        counts = self.guided.get(guidance)
        if not counts:
            why, short, reason = self._why_nothing(guidance)
            text = f"Nothing guided: {short}."
            show_on_node(text, guidance.node_id)
            span = guidance.start_percent, guidance.end_percent
            tell_report(guidance.node_id, 0, len(guidance.order), text, why, span)
            log.warning("GAG guided nothing in this run: %s.", reason)
            return
        # Not every call in range reaches its attentions: step caches such as EasyCache leave the model out.
        layers, chosen, calls = len(counts), len(guidance.layers), max(counts.values())
        text = f"Guided {layers} of {chosen} attentions in {calls} of {self.model_calls} calls."
        if self.overruled[guidance]:
            text += f" In {self.overruled[guidance]} a later GAG node acted."
        show_on_node(text, guidance.node_id)
        tell_report(guidance.node_id, layers, len(guidance.order), text)
        if guidance.verbose:
            listed = ", ".join(f"{'.'.join(map(str, layer))}: {counts[layer]}" for layer in sorted(counts))
            schedule = "" if guidance.schedule is None else f" Schedule: {guidance.schedule}."
            log.info("GAG: %s Settings: %s.%s Calls by attention: %s.", text, guidance.config, schedule, listed)

    def _why_nothing(self, guidance: Guidance) -> tuple[str, str, str]:
        """The reason: what web/texts.js calls it, in a few words, and as the end of a sentence."""
        span = f"{guidance.start_percent:g} to {guidance.end_percent:g}"
        if not self.model_calls:
            return "why_no_call", "no model call", "the sampler made no model call"
        if not self.in_range[guidance]:
            if self.overruled[guidance]:
                unless = " in which its schedule is not 0" if self.unscheduled[guidance] else ""
                reason = f"a later GAG node on the same model acts in all steps of its range{unless}"
                return "why_later", "a later GAG node acts", reason
            if self.unscheduled[guidance]:
                where = f"from {span}" if guidance.ranged else "of the run"
                return "why_schedule", "its schedule is 0", f"its schedule is 0 in all steps {where}"
            reason = f"no step lies within its start_percent and end_percent, {span}"
            if guidance.start_percent:
                reason += "; where a run has so few steps, set start_percent to 0"
            return "why_range", f"no step within {span}", reason
        if self.no_text[guidance] == self.in_range[guidance]:
            return "why_empty", "the prompts are empty", "no model call had a single token of text"
        if self.no_positive_rows[guidance] == self.in_range[guidance]:
            reason = 'apply_to is "positive" and no model call had a positive prompt'
            return "why_no_positive", "no positive prompt", reason
        return (
            "why_not_run",
            "none of its attentions ran",
            "none of the chosen attentions ran; another node may replace the model's blocks or its attention",
        )
