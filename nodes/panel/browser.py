# SPDX-License-Identifier: GPL-3.0-or-later
"""The observer that nodes hand to the patching engine: it sends everything to the browser."""

from __future__ import annotations

from collections.abc import Sequence

from ..patching.families import Blocks, Layer
from ..patching.observer import Sentence
from . import messages
from .chart import Chart
from .listeners import is_listening
from .status import send_status


class Browser:
    """Sends the outcome of runs to the browser; implements :class:`nodes.patching.observer.Observer`."""

    def send_blocks(self, node_id: str | None, blocks: Blocks, default: frozenset[Layer]) -> None:
        """Send the blocks of the model that came into a node, and the layers guided by default."""
        messages.send_blocks(node_id, blocks, default)

    def send_status(
        self, node_id: str | None, sentences: Sequence[Sentence], guided: int | None = None, total: int | None = None
    ) -> None:
        """Show what the last run did on a node."""
        send_status(node_id, sentences, guided, total)

    def wants_chart(self, node_id: str | None) -> bool:
        """Return True if a chart of the node is open."""
        return is_listening(node_id)

    def new_chart(self) -> Chart:
        """Return the receiver of one run's measures."""
        return Chart()


BROWSER = Browser()
