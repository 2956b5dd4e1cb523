# SPDX-License-Identifier: GPL-3.0-or-later
"""The addresses of the pack on ComfyUI's server."""

from __future__ import annotations

from aiohttp import web

from ..presets import PRESETS
from .chart import SERIES
from .listeners import set_open_charts
from .messages import blocks_of_workflow, running_server

_MAX_CHARTS = 1000


def add_routes() -> None:
    """Add the addresses to the server, if there is one in this process."""
    server = running_server()
    if server is not None:
        server.routes.get("/gag/setup")(_get_setup)
        server.routes.get("/gag/blocks")(_get_blocks)
        server.routes.post("/gag/listen")(_post_listen)


async def _get_setup(_: web.Request) -> web.Response:
    """Return the chart's series, and each preset's settings but for the strength, which multiplies any of them."""
    presets = {name: {k: v for k, v in vars(config).items() if k != "strength"} for name, config in PRESETS.items()}
    return web.json_response({"presets": presets, "series": [series.declaration for series in SERIES]})


async def _get_blocks(request: web.Request) -> web.Response:
    """Return the blocks of the models in one workflow's nodes, by node."""
    return web.json_response(blocks_of_workflow(request.query.get("workflow", "")))


async def _post_listen(request: web.Request) -> web.Response:
    """Store the open charts of a tab: ``{"client": id of its connection, "workflow": id, "nodes": [ids]}``."""
    try:
        body = await request.json()
        client, workflow, nodes = body["client"], body["workflow"], body["nodes"]
    except (ValueError, TypeError, KeyError):
        client, workflow, nodes = None, None, None
    if not isinstance(nodes, list) or not all(isinstance(text, str) for text in (client, workflow, *nodes)):
        expected = '{"client": text, "workflow": text, "nodes": [text, ...]}'
        return web.Response(status=400, text=f"GAG: expected {expected}.")
    if len(nodes) > _MAX_CHARTS:
        return web.Response(status=400, text=f"GAG: at most {_MAX_CHARTS} charts can be open, got {len(nodes)}.")
    if not set_open_charts(client, workflow, nodes):
        return web.Response(status=409, text="GAG: this tab has no connection to the server.")
    return web.Response(status=204)
