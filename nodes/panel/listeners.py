# SPDX-License-Identifier: GPL-3.0-or-later
"""Charts that are open, by browser tab."""

from __future__ import annotations

from typing import Any, NamedTuple

from .messages import running_server, workflow_id


class Listener(NamedTuple):
    """The open charts of a browser tab, and their workflow.

    A tab that is closed or loaded again has another connection or none, so this entry no longer counts then.
    """

    connection: Any
    workflow: str
    nodes: frozenset[str]


# By the id of the tab's connection.
_listeners: dict[str, Listener] = {}


def is_listening(node_id: str | None) -> bool:
    """Return True if the chart of a node of the running workflow is open in the tab that queued the run."""
    if not _listeners:
        return False
    server = running_server()
    client = getattr(server, "client_id", None)
    listener = _listeners.get(client) if client else None
    if listener is None or node_id not in listener.nodes:
        return False
    # A prompt that is queued without its workflow counts for the workflow that the tab shows.
    return server.sockets.get(client) is listener.connection and workflow_id() in (None, listener.workflow)


def set_open_charts(client: str, workflow: str, nodes: list[str]) -> bool:
    """Store the open charts of a tab, and forget tabs that are gone. Return False if the tab has no connection."""
    sockets = getattr(running_server(), "sockets", {})
    for known, listener in list(_listeners.items()):
        if sockets.get(known) is not listener.connection:
            del _listeners[known]
    if client not in sockets:
        return False
    if nodes:
        _listeners[client] = Listener(sockets[client], workflow, frozenset(nodes))
    else:
        _listeners.pop(client, None)
    return True
