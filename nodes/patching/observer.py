# SPDX-License-Identifier: GPL-3.0-or-later
"""Interface to whoever watches the runs of guided models from outside: the browser, in nodes/panel.

The engine calls an observer and knows nothing of servers or pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .families import Blocks, Layer
from .guidance import Guidance
from .steps import Steps

if TYPE_CHECKING:
    from .recorder import CallRecording


class Sentence(NamedTuple):
    """One sentence about a run, in English, and by name so that the browser can say it in another language.

    Attributes:
        name: name of the sentence in web/texts.js, which has the same words; empty if it is said in English only.
        values: the values that it names.
        text: the sentence in English.
    """

    name: str
    values: dict[str, Any]
    text: str


UNFINISHED = Sentence("unfinished", {}, "The last run did not finish.")


class ChartObserver(Protocol):
    """Receiver of the measures of one run's guided attentions, for charts that are open."""

    def begin(self, nodes: Iterable[str | None], steps: int) -> None:
        """Show the empty charts of these nodes: a run of ``steps`` steps begins."""

    def add(self, guidance: Guidance, recording: CallRecording, reached: Iterable[Layer], steps: Steps) -> None:
        """Take the measures of one model call in which the layers ``reached`` were guided."""

    def finish(self, steps: int) -> None:
        """Send the rest: the run of ``steps`` steps has ended."""


class Observer(Protocol):
    """Receiver of everything that users are shown about a node. A ``node_id`` of None has no receiver."""

    def send_blocks(self, node_id: str | None, blocks: Blocks, default: frozenset[Layer]) -> None:
        """Send the blocks of the model that came into a node, and the layers guided by default."""

    def send_status(
        self, node_id: str | None, sentences: Sequence[Sentence], guided: int | None = None, total: int | None = None
    ) -> None:
        """Show what the last run did, or why it did nothing, on a node.

        Args:
            node_id: the node.
            sentences: the outcome.
            guided: number of text attentions that were guided; None for a node that guides none.
            total: number of text attentions that the model has.
        """

    def wants_chart(self, node_id: str | None) -> bool:
        """Return True if a chart of the node is open, so that its attentions must be measured."""

    def new_chart(self) -> ChartObserver:
        """Return the receiver of one run's measures."""
