# SPDX-License-Identifier: GPL-3.0-or-later
"""The status of a node: what its last run did, or why it did nothing.

A tab whose page has our panels gets it as a message, with the inputs that the node was queued with, so that the panel
can tell when the node was edited since. Everyone else gets the host's own text on the node: other user interfaces, and
pages without our panels. Front ends from about 1.55 remove that text when the job ends.

A tab that is loaded again in the middle of a run misses messages. They are kept, and sent once its panels are back.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

from ..patching.observer import Sentence
from .listeners import has_panels
from .messages import (
    MAX_REMEMBERED,
    MAX_TEXT,
    STATUS,
    Json,
    queued_inputs,
    running_client,
    running_server,
    send,
    send_known_blocks,
    send_text,
    workflow_id,
)

# Messages that a tab has missed, by tab, workflow and node.
_missed: dict[tuple[str, str, str], Json] = {}
# The routes run in another thread than the nodes.
_lock = Lock()


def send_status(
    node_id: str | None, sentences: Sequence[Sentence], guided: int | None = None, total: int | None = None
) -> None:
    """Show sentences on a node; arguments as in :class:`..patching.observer.Observer`."""
    if node_id is None:
        return
    text = " ".join(sentence.text for sentence in sentences)[:MAX_TEXT].encode("utf-8", "backslashreplace").decode()
    parts = [[sentence.name, sentence.values] for sentence in sentences]
    data = {"node": node_id, "parts": parts, "text": text, "guided": guided, "inputs": queued_inputs(node_id)}
    client, workflow = running_client(), workflow_id()
    with _lock:
        if client is not None and has_panels(client):
            send(STATUS, data)
        else:
            if client is not None:
                key = (client, workflow or "", node_id)
                _missed.pop(key, None)
                _missed[key] = {"workflow": workflow, **data}
                while len(_missed) > MAX_REMEMBERED:
                    del _missed[next(iter(_missed))]
            send_text(text, node_id)
    if total is not None:
        send_known_blocks(node_id, total)


def send_missed(client: str) -> None:
    """Send a tab whose panels are back the messages that it has missed."""
    with _lock:
        keys = [key for key in _missed if key[0] == client]
        missed = [_missed.pop(key) for key in keys]
    for data in missed:
        running_server().send_sync(STATUS, data, client)
