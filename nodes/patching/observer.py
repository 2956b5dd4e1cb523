# SPDX-License-Identifier: GPL-3.0-or-later
"""Interface to whoever watches the runs of guided models from outside: the browser, in nodes/panel.

The engine calls an observer and knows nothing of servers or pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from .families import Blocks, Layer
from .guidance import Guidance
from .recorder import CallRecording
from .steps import Steps


class ChartObserver(Protocol):
    """Receiver of the measures of one run's guided attentions, for charts that are open."""

    def add(self, guidance: Guidance, recording: CallRecording, reached: Iterable[Layer], steps: Steps) -> None:
        """Take the measures of one model call in which the layers ``reached`` were guided."""

    def finish(self, steps: int) -> None:
        """Send the rest: the run of ``steps`` steps has ended."""


class Observer(Protocol):
    """Receiver of everything that users are shown about a node. A ``node_id`` of None has no receiver."""

    def send_text(self, text: str, node_id: str | None) -> None:
        """Show a sentence on a node."""

    def send_blocks(self, node_id: str | None, blocks: Blocks, default: frozenset[Layer]) -> None:
        """Send the blocks of the model that came into a node, and the layers guided by default."""

    def send_report(
        self,
        node_id: str | None,
        guided: int,
        total: int,
        text: str,
        why: str = "",
        span: tuple[float, float] = (0.0, 1.0),
        found: str = "",
    ) -> None:
        """Send the outcome of a run.

        Args:
            node_id: the node.
            guided: number of text attentions that were guided.
            total: number of text attentions that the model has.
            text: the outcome in a sentence.
            why: name of the reason in web/texts.js, if none was guided.
            span: start_percent and end_percent, for the reason that quotes them.
            found: code of another pack, for the reason that names it.
        """

    def wants_chart(self, node_id: str | None) -> bool:
        """Return True if a chart of the node is open, so that its attentions must be measured."""

    def new_chart(self) -> ChartObserver:
        """Return the receiver of one run's measures."""
