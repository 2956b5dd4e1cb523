# SPDX-License-Identifier: GPL-3.0-or-later
"""The observer that nodes hand to the patching engine: it sends everything to the browser."""

from __future__ import annotations

from ..patching.families import Blocks, Layer
from . import messages
from .chart import Chart
from .listeners import is_listening


class Browser:
    """Sends the outcome of runs to the browser; implements :class:`nodes.patching.observer.Observer`."""

    def send_text(self, text: str, node_id: str | None) -> None:
        """Show a sentence on a node."""
        messages.send_text(text, node_id)

    def send_blocks(self, node_id: str | None, blocks: Blocks, default: frozenset[Layer]) -> None:
        """Send the blocks of the model that came into a node, and the layers guided by default."""
        messages.send_blocks(node_id, blocks, default)

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
        """Send the outcome of a run."""
        messages.send_report(node_id, guided, total, text, why, span, found)

    def wants_chart(self, node_id: str | None) -> bool:
        """Return True if a chart of the node is open."""
        return is_listening(node_id)

    def new_chart(self) -> Chart:
        """Return the receiver of one run's measures."""
        return Chart()


BROWSER = Browser()
