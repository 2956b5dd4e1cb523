# SPDX-License-Identifier: GPL-3.0-or-later
"""Counters of one sampling run, and the report at its end."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch.nn import Module

from ...gag_core.echo import echo
from .attention_call import TextLayers
from .compile import UnguardedCompile
from .families import Layer
from .guidance import Guidance, cfg_of
from .host_attention import StoredAttentions, stored_attentions
from .observer import ChartObserver, Observer
from .prompt_rows import PromptRows
from .recorder import Recording
from .steps import Steps

log = logging.getLogger("comfyui-gag")


class NothingGuided(NamedTuple):
    """The reason why a node guided nothing: its name in web/texts.js, in a few words, and as the end of a sentence.

    Attributes:
        name, short, reason: these three.
        found: the code of another pack that the reason names, empty for other reasons.
    """

    name: str
    short: str
    reason: str
    found: str = ""


@dataclass
class Run:
    """Counters of one sampling run, by node; and facts that are found once and hold for the whole run.

    ComfyUI can send the prompts of a step to several devices, each with a copy of the model and a thread of its own.
    So model calls overlap, and everything that they count is counted under a lock.

    Attributes:
        observer: receiver of the report.
        chart: receiver of the measures for open charts.
        prompts: identification of the rows of a batch.
        unguarded_compile: the model that was compiled without guards, None if it was not.
        model_calls: number of model calls.
        in_range: model calls in which the node acts.
        overruled: model calls in which a later node acts instead.
        unscheduled: model calls in which the node's schedule is 0.
        no_context: model calls that came without any of the family's ``text_inputs``.
        no_text: model calls whose text has no token.
        no_positive_rows: model calls without rows of the positive prompt.
        guided: model calls in which each layer was guided.
        sigmas: highest and lowest noise level of the node's range.
        unknown_rows: model calls with rows that were left alone because their prompt cannot be told.
        other_text: layers in which another node reads another text than the one that was handed to it.
        other_code: code of another pack that stands in the place of the chosen attentions; empty if it was looked for.
        modules: modules of a transformer's layers as they were before the run, when no node had replaced blocks; by
            copy of the diffusion model.
        stored: stored attentions of each copy of the model; several devices have a copy each.
        recording: measures for probes, None without a probe.
        steps: position in the run.
        guider: the host's guider, which has the CFG scale; None outside a run.
        cfgs: lowest and highest CFG scale of the model calls in which a node that adapts to CFG acts.
    """

    observer: Observer
    chart: ChartObserver
    prompts: PromptRows = field(default_factory=PromptRows)
    unguarded_compile: UnguardedCompile | None = None
    model_calls: int = 0
    in_range: Counter[Guidance] = field(default_factory=Counter)
    overruled: Counter[Guidance] = field(default_factory=Counter)
    unscheduled: Counter[Guidance] = field(default_factory=Counter)
    no_context: Counter[Guidance] = field(default_factory=Counter)
    no_text: Counter[Guidance] = field(default_factory=Counter)
    no_positive_rows: Counter[Guidance] = field(default_factory=Counter)
    guided: dict[Guidance, Counter[Layer]] = field(default_factory=dict)
    sigmas: dict[Guidance, tuple[float, float]] = field(default_factory=dict)
    unknown_rows: Counter[Guidance] = field(default_factory=Counter)
    other_text: dict[Guidance, set[Layer]] = field(default_factory=dict)
    other_code: dict[Guidance, str] = field(default_factory=dict)
    modules: dict[Module, dict[Layer, tuple[Any, str]]] = field(default_factory=dict)
    stored: WeakKeyDictionary[Module, StoredAttentions] = field(default_factory=WeakKeyDictionary)
    recording: Recording | None = None
    steps: Steps = field(default_factory=Steps)
    guider: Any = None
    cfgs: dict[Guidance, tuple[float, float]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def __deepcopy__(self, _: Any) -> Run:
        """Return the run itself: nodes that copy the options of a model call still count in this run."""
        return self

    @property
    def cfg(self) -> float:
        """CFG scale at this moment, 1 outside a run."""
        return cfg_of(self.guider)

    def modules_of(self, diffusion_model: Module) -> dict[Layer, tuple[Any, str]]:
        """Return the modules of a copy of a transformer as they were before the run; none if it is not known."""
        return self.modules.get(uncompiled(diffusion_model), {})

    def stored_attentions(self, diffusion_model: Module) -> StoredAttentions:
        """Return the stored attentions of a copy of the model; its modules are searched once per run."""
        if diffusion_model not in self.stored:
            self.stored[diffusion_model] = stored_attentions(diffusion_model)
        return self.stored[diffusion_model]

    def count_model_call(self) -> None:
        """Count a model call that begins."""
        with self._lock:
            self.model_calls += 1

    def count(self, counter: Counter[Guidance], guidance: Guidance) -> None:
        """Add 1 to one of the run's counters of model calls."""
        with self._lock:
            counter[guidance] += 1

    def note_cfg(self, guidance: Guidance, cfg: float) -> None:
        """Keep the CFG scale of a model call in which a node acts, for the report."""
        with self._lock:
            lowest, highest = self.cfgs.get(guidance, (cfg, cfg))
            self.cfgs[guidance] = min(lowest, cfg), max(highest, cfg)

    def count_layers(self, guidance: Guidance, layers: TextLayers) -> None:
        """Count what happened to the text attentions of a model call that has ended.

        Counting during the call would not do: torch.compile recompiles code that reads growing counts.
        """
        with self._lock:
            self.guided.setdefault(guidance, Counter()).update(set(layers.reached))
            self.unknown_rows[guidance] += layers.has_unknown_rows
            self.other_text.setdefault(guidance, set()).update(layers.other_text)

    def report(self, guidance: Guidance) -> None:
        """Send the outcome of the run to the node, and to the log if it matters there.

        The node shows some 60 characters, the log the whole sentence.
        """
        counts = self.guided.get(guidance)
        if not counts:
            self._report_nothing(guidance)
            return
        # Not every call in range reaches its attentions: step caches such as EasyCache skip the model.
        layers, chosen, calls = len(counts), len(guidance.layers), max(counts.values())
        text = f"Guided {layers} of {chosen} attentions in {calls} of {self.model_calls} calls."
        text += _about_cfg(*self.cfgs.get(guidance, (1.0, 1.0)))
        if self.overruled[guidance]:
            text += f" In {self.overruled[guidance]} a later GAG node acted."
        if others := len(self.other_text.get(guidance, ())):
            text += f" In {others} attentions another node reads other text."
        if self.unknown_rows[guidance]:
            text += f" In {self.unknown_rows[guidance]} some rows were left alone: their prompt cannot be told."
        self.observer.send_text(text, guidance.node_id)
        self.observer.send_report(guidance.node_id, layers, len(guidance.order), text)
        if guidance.verbose:
            listed = ", ".join(f"{'.'.join(map(str, layer))}: {counts[layer]}" for layer in sorted(counts))
            schedule = "" if guidance.schedule is None else f" Schedule: {echo(guidance.schedule)}."
            log.info("GAG: %s Settings: %s.%s Calls by attention: %s.", text, guidance.config, schedule, listed)

    def _report_nothing(self, guidance: Guidance) -> None:
        why = self._why_nothing(guidance)
        text = f"Nothing guided: {why.short}."
        self.observer.send_text(text, guidance.node_id)
        span = guidance.start_percent, guidance.end_percent
        self.observer.send_report(guidance.node_id, 0, len(guidance.order), text, why.name, span, why.found)
        log.warning("GAG guided nothing in this run: %s.", why.reason)

    def _why_nothing(self, guidance: Guidance) -> NothingGuided:
        if not self.model_calls:
            return NothingGuided(
                "why_no_call",
                "no model call reached it",
                "no model call reached GAG; the sampler had no step to make, or another node runs the model without "
                "ComfyUI's options",
            )
        in_range = self.in_range[guidance]
        if not in_range:
            return self._why_never_in_range(guidance)
        if self.no_context[guidance] == in_range:
            return NothingGuided(
                "why_no_context",
                "its text comes another way",
                f"no model call had the input {' or '.join(guidance.family.text_inputs)}, by which GAG gets the text; "
                "this model gets its text in another way, which GAG does not know yet",
            )
        if self.no_context[guidance] + self.no_text[guidance] == in_range:
            return NothingGuided("why_empty", "the prompts are empty", "no model call had a single token of text")
        if self.no_positive_rows[guidance] == in_range:
            reason = 'apply_to is "positive" and no model call had a positive prompt'
            return NothingGuided("why_no_positive", "no positive prompt", reason)
        if self.unknown_rows[guidance]:
            return NothingGuided(
                "why_unknown_rows",
                "the prompts cannot be told apart",
                'apply_to is "positive" and another node changed the batch so that its rows cannot be told apart; set '
                "apply_to to both",
            )
        if self.other_text.get(guidance):
            return NothingGuided(
                "why_other_text",
                "another node reads other text",
                "another node replaces the chosen attentions and reads other text in them than the prompts",
            )
        if found := self.other_code.get(guidance):
            return NothingGuided(
                "why_other_code",
                f"the blocks run code of {found}",
                f"the blocks run code of {found} and not ComfyUI's own, in which GAG can reach none of the chosen "
                "attentions",
                found,
            )
        return NothingGuided(
            "why_not_run",
            "none of its attentions ran",
            "none of the chosen attentions ran where GAG can reach them; another node may replace the model's blocks "
            "or its attention, or run them without ComfyUI's options",
        )

    def _why_never_in_range(self, guidance: Guidance) -> NothingGuided:
        span = f"{guidance.start_percent:g} to {guidance.end_percent:g}"
        if self.overruled[guidance]:
            unless = " in which its schedule is not 0" if self.unscheduled[guidance] else ""
            reason = f"a later GAG node on the same model acts in all steps of its range{unless}"
            return NothingGuided("why_later", "a later GAG node acts", reason)
        if self.unscheduled[guidance]:
            stretch = f"from {span}" if guidance.is_ranged else "of the run"
            return NothingGuided("why_schedule", "its schedule is 0", f"its schedule is 0 in all steps {stretch}")
        reason = f"no step lies within its start_percent and end_percent, {span}"
        if guidance.start_percent:
            reason += "; where a run has so few steps, set start_percent to 0"
        return NothingGuided("why_range", f"no step within {span}", reason)


def _about_cfg(lowest: float, highest: float) -> str:
    """Return the sentence about a strength that was adapted to these CFG scales; empty if it was not lowered."""
    text = ""
    least, most = (round(max(1.0, cfg) * max(1.0, cfg), 1) for cfg in (lowest, highest))
    if lowest < highest and most > 1.0:
        text = f" Strength was divided by {least:g} to {most:g}, because CFG was {lowest:g} to {highest:g}."
    elif highest > 1.0:
        text = f" Strength was divided by {most:g}, because CFG is {highest:g}."
    return text


def uncompiled(diffusion_model: Module) -> Module:
    """Return the module that torch.compile wrapped, or the module itself."""
    original: Module = getattr(diffusion_model, "_orig_mod", diffusion_model)
    return original
