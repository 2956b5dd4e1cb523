# SPDX-License-Identifier: GPL-3.0-or-later
"""The addresses of the pack on ComfyUI's server."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from ..presets import PRESETS
from .chart import SERIES
from .listeners import is_tab, set_open_charts
from .messages import blocks_of_workflow, running_server
from .status import send_missed

_MAX_CHARTS = 1000
_MAX_BODY = 1 << 20


def add_routes() -> None:
    """Add the addresses to the server, if there is one in this process."""
    server = running_server()
    if server is not None:
        server.routes.get("/gag/setup")(_get_setup)
        server.routes.post("/gag/token")(_post_token)
        server.routes.post("/gag/blocks")(_post_blocks)
        server.routes.post("/gag/listen")(_post_listen)


async def _get_setup(_: web.Request) -> web.Response:
    """Return the chart's series, and each preset's settings."""
    presets = {name: preset.fields for name, preset in PRESETS.items()}
    return web.json_response({"presets": presets, "series": [series.declaration for series in SERIES]})


async def _post_token(request: web.Request) -> web.Response:
    """Send a tab its token over its connection. The body is ``{"client": id of the tab's connection}``.

    The other routes send the token too, but with a refusal, which the browser writes into its console as an error.
    """
    body = await _texts_of(request, ("client",))
    if body is None:
        return _expected('{"client": text}')
    is_tab(body["client"], "")
    return web.Response(status=204)


async def _post_blocks(request: web.Request) -> web.Response:
    """Return the blocks of the models in the nodes of a workflow that the asking tab queued, by node.

    The body is ``{"client": id of the tab's connection, "token": its token, "workflow": id}``.
    """
    body = await _texts_of(request, ("client", "token", "workflow"))
    if body is None:
        return _expected('{"client": text, "token": text, "workflow": text}')
    if not is_tab(body["client"], body["token"]):
        return _not_the_tab()
    return web.json_response(blocks_of_workflow(body["client"], body["workflow"]))


async def _post_listen(request: web.Request) -> web.Response:
    """Store that a tab shows our panels, and its open charts; send it what it has missed.

    The body is ``{"client": id of its connection, "token": its token, "workflow": id, "nodes": [ids]}``.
    """
    body = await _texts_of(request, ("client", "token", "workflow"))
    nodes = None if body is None else body.get("nodes")
    if body is None or not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
        return _expected('{"client": text, "token": text, "workflow": text, "nodes": [text, ...]}')
    if len(nodes) > _MAX_CHARTS:
        return web.Response(status=400, text=f"GAG: at most {_MAX_CHARTS} charts can be open, got {len(nodes)}.")
    if not is_tab(body["client"], body["token"]):
        return _not_the_tab()
    set_open_charts(body["client"], body["workflow"], nodes)
    send_missed(body["client"])
    return web.Response(status=204)


async def _texts_of(request: web.Request, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the body of a request, a JSON object with texts under these names; None if it is anything else.

    A body may be of any length, encoding and depth: every error on the way means that it is something else. A charset
    in its header does not count, because some codecs take a time that grows with the square of the length.
    """
    try:
        text = bytearray()
        async for part in request.content.iter_any():
            text += part
            if len(text) > _MAX_BODY:
                return None
        body = json.loads(text)
    except (ValueError, RecursionError, ClientError, HttpProcessingError, web.RequestPayloadError):
        return None
    if not isinstance(body, dict) or not all(isinstance(body.get(name), str) for name in names):
        return None
    return body


def _expected(body: str) -> web.Response:
    return web.Response(status=400, text=f"GAG: expected {body}.")


def _not_the_tab() -> web.Response:
    return web.Response(status=409, text="GAG: this tab has no connection to the server, or has yet to get its token.")
