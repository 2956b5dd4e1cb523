# SPDX-License-Identifier: GPL-3.0-or-later
"""The chart of a node: the declaration of its series, and the means of a run's measures for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...gag_core.measures import MEASURES
from ..patching.families import Layer
from ..patching.guidance import Guidance
from ..patching.recorder import CallRecording, Measured, guided_means
from ..patching.steps import Steps
from .listeners import is_listening
from .messages import CHART, send

_SECONDS_BETWEEN_MESSAGES = 0.25


class Series(NamedTuple):
    """The declaration of one line of the chart. web/chart.js draws the lines that a message declares.

    Attributes:
        name: name of the measure in MEASURES. Its label and tooltip in web/texts.js are called ``name`` and
        ``name_tip``.
        unit: ``"%"`` for a share, which is shown times 100; ``""`` for a plain number.
        low, high: ends of the axis; a high of None is the largest value so far.
        colour: colour of the line, as in CSS. The page lightens it on dark and darkens it on light ground.
    """

    name: str
    unit: str
    low: float
    high: float | None
    colour: str

    @property
    def declaration(self) -> dict[str, Any]:
        """The series as messages carry it."""
        return {"name": self.name, "unit": self.unit, "range": [self.low, self.high], "colour": self.colour}


# Colours that most kinds of colour vision tell apart (Okabe and Ito).
SERIES = (
    Series("gain", "%", 0.0, None, "#0072b2"),
    Series("parallel", "%", 0.0, 1.0, "#d55e00"),
    Series("capped", "%", 0.0, 1.0, "#009e73"),
)
_COLUMNS = [list(MEASURES).index(series.name) for series in SERIES]

_runs = count(1)
# The calls of several devices overlap.
_lock = threading.Lock()


class _Pending(NamedTuple):
    """Measures of one model call on their way from the device. They have arrived once ``event`` has happened."""

    node_id: str
    step: int
    measured: list[Measured]
    event: Any

    @property
    def has_arrived(self) -> bool:
        """True if reading the measures does not wait. A device without events tells only at the end of a run."""
        if self.event is not None:
            return bool(self.event.query())
        return all(part.values.device.type == "cpu" for part in self.measured)


class Chart:
    """Means of SERIES over the guided attentions, for each step of one run and each open chart.

    Values are read once they have come from the device by themselves, usually a step later. So nothing waits for it.
    """

    def __init__(self) -> None:
        self.run = next(_runs)
        self.pending: list[_Pending] = []
        # By node and step: sums, and the number of attentions and rows in them.
        self.sums: dict[str, dict[int, tuple[Tensor, int]]] = {}
        # Steps with new values, by node.
        self.unsent: dict[str, set[int]] = {}
        self.last_sent = 0.0

    def begin(self, nodes: Iterable[str | None], steps: int) -> None:
        """Send the open charts of these nodes that a run of ``steps`` steps begins: they have no points yet."""
        points: dict[str, list[list[float]]] = {node: [] for node in nodes if node is not None and is_listening(node)}
        if points:
            self._send_points(points, steps)

    def add(self, guidance: Guidance, recording: CallRecording, reached: Iterable[Layer], steps: Steps) -> None:
        """Take the measures of one model call in which the layers ``reached`` were guided."""
        if guidance.node_id is None:
            return
        recording.call.guided = frozenset(reached)
        measured = recording.finish()
        if not measured:
            return
        copies, event = _start_copy(measured)
        with _lock:
            self.pending.append(_Pending(guidance.node_id, min(steps.done, max(steps.count - 1, 0)), copies, event))
            self._read(lambda pending: pending.has_arrived)
            if time.monotonic() - self.last_sent >= _SECONDS_BETWEEN_MESSAGES:
                self._send(steps.count)

    def finish(self, steps: int) -> None:
        """Wait for measures that are on their way, and send the rest: the run of ``steps`` steps has ended."""
        with _lock:
            for pending in self.pending:
                if pending.event is not None:
                    pending.event.synchronize()
            self._read(lambda pending: True)
            self._send(steps)

    def _read(self, is_ready: Callable[[_Pending], bool]) -> None:
        """Add the measures that are ready to the sums."""
        waiting = []
        for pending in self.pending:
            if not is_ready(pending):
                waiting.append(pending)
                continue
            total, rows = guided_means(pending.measured)
            if rows:
                steps = self.sums.setdefault(pending.node_id, {})
                earlier, earlier_rows = steps.get(pending.step, (torch.zeros_like(total), 0))
                steps[pending.step] = earlier + total, earlier_rows + rows
                self.unsent.setdefault(pending.node_id, set()).add(pending.step)
        self.pending = waiting

    def _send(self, steps: int) -> None:
        unsent, self.unsent = self.unsent, {}
        points = {node: self._points(node, own) for node, own in unsent.items() if is_listening(node)}
        if points:
            self.last_sent = time.monotonic()
            self._send_points(points, steps)

    def _send_points(self, points: Mapping[str, list[list[float]]], steps: int) -> None:
        series = [one.declaration for one in SERIES]
        send(CHART, {"run": self.run, "steps": steps, "series": series, "points": points})

    def _points(self, node: str, steps: set[int]) -> list[list[float]]:
        """Return steps with their means. Values of a model that overflows are left out: JSON has no infinity or NaN."""
        sums = self.sums[node]
        points = [[step, *(sums[step][0] / sums[step][1])[_COLUMNS].tolist()] for step in sorted(steps)]
        return [point for point in points if all(map(isfinite, point))]


def _start_copy(measured: list[Measured]) -> tuple[list[Measured], Any]:
    """Return the measures with values that the device copies to the CPU when it gets there, and the event of that."""
    device = measured[0].values.device
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "Event"):
        return measured, None
    copies = [part._replace(values=part.values.detach().to("cpu", non_blocking=True)) for part in measured]
    event = module.Event()
    event.record(*([module.current_stream(device)] if hasattr(module, "current_stream") else []))
    return copies, event
