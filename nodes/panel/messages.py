# SPDX-License-Identifier: GPL-3.0-or-later
"""Messages to the browser tab that queued the run: reports, blocks, charts, and text on a node."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from ..patching.families import Blocks, Layer

Json = dict[str, Any]

CHART, REPORT, BLOCKS = "gag.chart", "gag.report", "gag.blocks"
_MAX_REMEMBERED = 256

# Blocks of the model that last came into a node, by workflow and node.
_blocks: dict[tuple[str, str], Json] = {}


def send_text(text: str, node_id: str | None) -> None:
    """Show ``text`` on a node, if there is a server and the host is new enough for it."""
    if node_id is None:
        return
    try:
        from server import PromptServer
    except ImportError:
        return
    send_progress_text = getattr(getattr(PromptServer, "instance", None), "send_progress_text", None)
    if send_progress_text is None:
        return
    client = getattr(PromptServer.instance, "client_id", None)
    if client is not None and "sid" in inspect.signature(send_progress_text).parameters:
        # Without the client the text would appear on the node of that id in whatever graph other tabs have open.
        send_progress_text(text, node_id, sid=client)
    else:
        send_progress_text(text, node_id)


def send_blocks(node_id: str | None, blocks: Blocks, default: frozenset[Layer]) -> None:
    """Send the blocks of the model that came into a node, and remember them.

    The message has, by part, the number of text attentions in each block, and which of them are guided by default.
    """
    if node_id is None or running_server() is None:
        return
    parts = {name: [len(block) for block in part] for name, part in blocks.items() if part}
    chosen = {name: [[layer in default for layer in block] for block in part] for name, part in blocks.items() if part}
    _remember_blocks(node_id, {"parts": parts, "default": chosen})


def send_report(
    node_id: str | None, guided: int, total: int, text: str, why: str = "", span: tuple[float, float] = (0.0, 1.0)
) -> None:
    """Send the outcome of a run; arguments as in :class:`..patching.observer.Observer`."""
    if node_id is None:
        return
    start, end = (f"{percent:g}" for percent in span)
    send(
        REPORT,
        {"node": node_id, "guided": guided, "of": total, "text": text, "why": why, "start": start, "end": end},
    )
    if (workflow_id() or "", node_id) in _blocks:
        return
    # ComfyUI reused the node's output from another workflow, so no message about the blocks came in this one.
    elsewhere = (known for (_, node), known in reversed(_blocks.items()) if node == node_id)
    known = next(elsewhere, None)
    if known is not None and sum(map(sum, known["parts"].values())) == total:
        _remember_blocks(node_id, known)


def blocks_of_workflow(workflow: str) -> Json:
    """Return the remembered blocks of a workflow's nodes, by node."""
    return {node: known for (owner, node), known in list(_blocks.items()) if owner == workflow}


def send(event: str, data: Json) -> None:
    """Send a message to the tab that queued the run; to nobody if the run was queued without a tab."""
    server = running_server()
    client = getattr(server, "client_id", None)
    if client is not None:
        server.send_sync(event, {"workflow": workflow_id(), **data}, client)


def running_server() -> Any:
    """Return ComfyUI's server; None in a process without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def workflow_id() -> str | None:
    """Return the id that the front end gave the workflow that runs."""
    queue = getattr(running_server(), "prompt_queue", None)
    running = list(getattr(queue, "currently_running", {}).values())
    if not running:
        return None
    saved = (running[0][3].get("extra_pnginfo") or {}).get("workflow")
    found = saved.get("id") if isinstance(saved, dict) else None
    return found if isinstance(found, str) else None


def _remember_blocks(node_id: str, known: Json) -> None:
    key = (workflow_id() or "", node_id)
    _blocks.pop(key, None)
    _blocks[key] = known
    while len(_blocks) > _MAX_REMEMBERED:
        del _blocks[next(iter(_blocks))]
    send(BLOCKS, {"node": node_id, **known})
