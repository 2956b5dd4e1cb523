# SPDX-License-Identifier: GPL-3.0-or-later
"""Tabs that show our panels, and their open charts; and the proof that a request comes from that tab.

The id of a tab's connection is no secret: a request could name another tab. So the server sends a random token over the
connection itself, and a request must repeat it.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Any, NamedTuple

from .messages import TOKEN, running_client, running_server, workflow_id


class Listener(NamedTuple):
    """The open charts of a browser tab that shows our panels, and their workflow. There may be no open chart.

    A tab that is closed or loaded again has another connection or none, so this entry no longer counts then.
    """

    connection: Any
    workflow: str
    nodes: frozenset[str]


# By the id of the tab's connection.
_listeners: dict[str, Listener] = {}
# Connection and token of each tab that asked, by the id of its connection.
_tokens: dict[str, tuple[Any, str]] = {}


def is_listening(node_id: str | None) -> bool:
    """Return True if the chart of a node of the running workflow is open in the tab that queued the run."""
    if not _listeners:
        return False
    client = running_client()
    listener = _listeners.get(client) if client else None
    if listener is None or node_id not in listener.nodes:
        return False
    # A prompt that is queued without its workflow counts for the workflow that the tab shows.
    return running_server().sockets.get(client) is listener.connection and workflow_id() in (None, listener.workflow)


def has_panels(client: str) -> bool:
    """Return True if a tab has said that its page shows our panels."""
    listener = _listeners.get(client)
    return listener is not None and running_server().sockets.get(client) is listener.connection


def is_tab(client: str, token: str) -> bool:
    """Return True if ``token`` is the one that was sent over the connection ``client``.

    Otherwise send the connection, if there is one, its token, so that its tab can ask again.
    """
    server = running_server()
    sockets = getattr(server, "sockets", {})
    for known, (connection, _) in list(_tokens.items()):
        if sockets.get(known) is not connection:
            del _tokens[known]
    if client not in sockets:
        return False
    if client not in _tokens:
        _tokens[client] = (sockets[client], secrets.token_hex(16))
    expected = _tokens[client][1]
    if hmac.compare_digest(token.encode(errors="backslashreplace"), expected.encode()):
        return True
    server.send_sync(TOKEN, {"token": expected}, client)
    return False


def set_open_charts(client: str, workflow: str, nodes: list[str]) -> None:
    """Store that a tab with a connection shows our panels, and its open charts; forget tabs that are gone."""
    sockets = getattr(running_server(), "sockets", {})
    for known, listener in list(_listeners.items()):
        if sockets.get(known) is not listener.connection:
            del _listeners[known]
    if client in sockets:
        _listeners[client] = Listener(sockets[client], workflow, frozenset(nodes))
