# SPDX-License-Identifier: GPL-3.0-or-later
"""What the pack's nodes in the browser are told (see web/gag.js): presets, blocks, what a run did, and open charts.

Messages go to the browser tab that queued the run, as the host's own do. A chart is measured only while that tab says
that the chart is open, and only what was measured is sent, so that a run that nobody watches does nothing for it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from itertools import count
from math import isfinite
from typing import Any, NamedTuple

import torch
from aiohttp import web
from torch import Tensor

from ..gag_core.measures import MEASURES
from .families import Blocks, Layer
from .host import Steps
from .presets import PRESETS
from .recording import CallRecording, Measured, guided_means
from .settings import Guidance

Json = dict[str, Any]

CHART, REPORT, BLOCKS = "gag.chart", "gag.report", "gag.blocks"
CHARTED = ("gain", "parallel", "capped")
_COLUMNS = [list(MEASURES).index(name) for name in CHARTED]
_SECONDS_BETWEEN_MESSAGES = 0.25
_MOST_REMEMBERED = 256
_MOST_CHARTS = 1000


class _Listener(NamedTuple):
    """What a browser tab said: which charts are open in it, and of which workflow.

    A tab that is closed or loaded anew has another connection or none, so that this does not count any more.
    """

    connection: Any
    workflow: str
    nodes: frozenset[str]


# By browser tab.
_listeners: dict[str, _Listener] = {}
# By workflow and node: the blocks of the model that last came in.
_blocks: dict[tuple[str, str], Json] = {}
_runs = count(1)
# The calls of several devices overlap.
_lock = threading.Lock()


def add_routes() -> None:
    """Add the pack's addresses to the host's server, if there is one in this process."""
    server = _server()
    if server is not None:
        server.routes.get("/gag/presets")(_get_presets)
        server.routes.get("/gag/blocks")(_get_blocks)
        server.routes.post("/gag/listen")(_post_listen)


async def _get_presets(_: web.Request) -> web.Response:
    """The settings of each preset, without the strength, which multiplies any of them."""
    presets = {name: {k: v for k, v in vars(config).items() if k != "strength"} for name, config in PRESETS.items()}
    return web.json_response(presets)


async def _get_blocks(request: web.Request) -> web.Response:
    """What :func:`tell_blocks` told of the nodes of one workflow, by node."""
    wanted = request.query.get("workflow", "")
    return web.json_response({node: known for (workflow, node), known in list(_blocks.items()) if workflow == wanted})


async def _post_listen(request: web.Request) -> web.Response:
    """A tab says which charts are open in it: ``{"client": its connection's id, "workflow": id, "nodes": [ids]}``."""
    try:
        body = await request.json()
        client, workflow, nodes = body["client"], body["workflow"], body["nodes"]
    except (ValueError, TypeError, KeyError):
        client, workflow, nodes = None, None, None
    if not isinstance(nodes, list) or not all(isinstance(text, str) for text in (client, workflow, *nodes)):
        expected = '{"client": text, "workflow": text, "nodes": [text, ...]}'
        return web.Response(status=400, text=f"GAG: expected {expected}.")
    if len(nodes) > _MOST_CHARTS:
        return web.Response(status=400, text=f"GAG: at most {_MOST_CHARTS} charts can be open, got {len(nodes)}.")
    sockets = getattr(_server(), "sockets", {})
    for known, listener in list(_listeners.items()):
        if sockets.get(known) is not listener.connection:
            del _listeners[known]
    if client not in sockets:
        return web.Response(status=409, text="GAG: this tab has no connection to the server.")
    if nodes:
        _listeners[client] = _Listener(sockets[client], workflow, frozenset(nodes))
    else:
        _listeners.pop(client, None)
    return web.Response(status=204)


def listening(node_id: str | None) -> bool:
    """Whether the chart of a node of the running workflow is open in the tab that queued the run."""
    if not _listeners:
        return False
    server = _server()
    client = getattr(server, "client_id", None)
    listener = _listeners.get(client) if client else None
    if listener is None or node_id not in listener.nodes:
        return False
    # What is queued without its workflow counts for the one that the tab shows.
    return server.sockets.get(client) is listener.connection and _workflow() in (None, listener.workflow)


def tell_blocks(node_id: str | None, blocks: Blocks, default: frozenset[Layer]) -> None:
    """A model came into a node: its blocks, each as the number of its text attentions, and those of the default."""
    if node_id is None or _server() is None:
        return
    parts = {name: [len(block) for block in part] for name, part in blocks.items() if part}
    chosen = {name: [[layer in default for layer in block] for block in part] for name, part in blocks.items() if part}
    _remember_blocks(node_id, {"parts": parts, "default": chosen})


def _remember_blocks(node_id: str, known: Json) -> None:
    key = (_workflow() or "", node_id)
    _blocks.pop(key, None)
    _blocks[key] = known
    while len(_blocks) > _MOST_REMEMBERED:
        del _blocks[next(iter(_blocks))]
    _send(BLOCKS, {"node": node_id, **known})


def tell_report(
    node_id: str | None, guided: int, of: int, text: str, why: str = "", span: tuple[float, float] = (0.0, 1.0)
) -> None:
    """What became of a node in a run.

    Args:
        node_id: the node; without one there is nobody to tell.
        guided: how many text attentions were guided.
        of: how many there are.
        text: the same in a sentence.
        why: if none was guided, what web/texts.js calls the reason.
        span: start_percent and end_percent, for the reason that has them in it.
    """
    if node_id is None:
        return
    start, end = (f"{percent:g}" for percent in span)
    _send(
        REPORT,
        {"node": node_id, "guided": guided, "of": of, "text": text, "why": why, "start": start, "end": end},
    )
    if (_workflow() or "", node_id) in _blocks:
        return
    # The host took over what the node made in another workflow, so that nobody told of the blocks in this one.
    elsewhere = (known for (_, node), known in reversed(_blocks.items()) if node == node_id)
    known = next(elsewhere, None)
    if known is not None and sum(map(sum, known["parts"].values())) == of:
        _remember_blocks(node_id, known)


class GuidedRecording(CallRecording):
    """Of one model call what a chart shows: the layers that are guided alone."""

    def __init__(self, guidance: Guidance, x: Tensor, t: Tensor, kinds: list[int]) -> None:
        super().__init__(guidance, (), x, t, kinds)
        self.layers = guidance.layers

    def cross(self, layer: Layer, *args: Any, **kwargs: Any) -> None:
        """As for any recording, if the layer is guided."""
        if layer in self.layers:
            super().cross(layer, *args, **kwargs)

    def joint(self, layer: Layer, *args: Any, **kwargs: Any) -> None:
        """As for any recording, if the layer is guided."""
        if layer in self.layers:
            super().joint(layer, *args, **kwargs)


class _Late(NamedTuple):
    """Numbers of one model call on their way from the device; they are there once ``event`` has happened."""

    node_id: str
    step: int
    measured: list[Measured]
    event: Any

    @property
    def there(self) -> bool:
        """Whether reading them waits for nothing. Where a device has no events, that is known at the end only."""
        if self.event is not None:
            return bool(self.event.query())
        return all(part.values.device.type == "cpu" for part in self.measured)


class Chart:
    """What the open charts are told of one run: for each step the means of CHARTED over the guided attentions.

    Numbers are read once they have come from the device by themselves, usually a step later, so nothing waits for it.
    """

    def __init__(self) -> None:
        self.run = next(_runs)
        self.late: list[_Late] = []
        # By node and step: sums, and how many attentions and rows there are in them.
        self.sums: dict[str, dict[int, tuple[Tensor, int]]] = {}
        self.news: dict[str, set[int]] = {}
        self.sent = 0.0

    def add(self, guidance: Guidance, recorded: CallRecording, reached: Iterable[Layer], steps: Steps) -> None:
        """A model call has come to its end, in which these layers were guided."""
        if guidance.node_id is None:
            return
        recorded.call.guided = frozenset(reached)
        measured = recorded.finish()
        if not measured:
            return
        coming, event = _on_their_way(measured)
        with _lock:
            self.late.append(_Late(guidance.node_id, min(steps.done, max(steps.count - 1, 0)), coming, event))
            self._read(lambda late: late.there)
            if time.monotonic() - self.sent >= _SECONDS_BETWEEN_MESSAGES:
                self._send(steps.count)

    def finish(self, steps: int) -> None:
        """The run has come to its end: what is still on its way is waited for."""
        with _lock:
            for late in self.late:
                if late.event is not None:
                    late.event.synchronize()
            self._read(lambda late: True)
            self._send(steps)

    def _read(self, there: Callable[[_Late], bool]) -> None:
        """Add up the numbers that have come."""
        waiting = []
        for late in self.late:
            if not there(late):
                waiting.append(late)
                continue
            total, number = guided_means(late.measured)
            if number:
                steps = self.sums.setdefault(late.node_id, {})
                earlier, before = steps.get(late.step, (torch.zeros_like(total), 0))
                steps[late.step] = earlier + total, before + number
                self.news.setdefault(late.node_id, set()).add(late.step)
        self.late = waiting

    def _send(self, steps: int) -> None:
        news, self.news = self.news, {}
        points = {node: self._points(node, numbers) for node, numbers in news.items() if listening(node)}
        if points:
            self.sent = time.monotonic()
            _send(CHART, {"run": self.run, "steps": steps, "points": points})

    def _points(self, node: str, numbers: set[int]) -> list[list[float]]:
        """Steps with their means. What a model that overflows leaves is left out: JSON has no word for it."""
        sums = self.sums[node]
        points = [[step, *(sums[step][0] / sums[step][1])[_COLUMNS].tolist()] for step in sorted(numbers)]
        return [point for point in points if all(map(isfinite, point))]


def _on_their_way(measured: list[Measured]) -> tuple[list[Measured], Any]:
    """The same with values that the device copies to the CPU when it gets there, and the event of that."""
    device = measured[0].values.device
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "Event"):
        return measured, None
    coming = [part._replace(values=part.values.detach().to("cpu", non_blocking=True)) for part in measured]
    event = module.Event()
    event.record(*([module.current_stream(device)] if hasattr(module, "current_stream") else []))
    return coming, event


def _server() -> Any:
    """The host's server; None in a process without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _workflow() -> str | None:
    """The id that the front end gave the workflow that is being run."""
    queue = getattr(_server(), "prompt_queue", None)
    running = list(getattr(queue, "currently_running", {}).values())
    if not running:
        return None
    saved = (running[0][3].get("extra_pnginfo") or {}).get("workflow")
    found = saved.get("id") if isinstance(saved, dict) else None
    return found if isinstance(found, str) else None


def _send(event: str, data: Json) -> None:
    """Send a message to the tab that queued the run; none if it was queued without one."""
    server = _server()
    client = getattr(server, "client_id", None)
    if client is not None:
        server.send_sync(event, {"workflow": _workflow(), **data}, client)
