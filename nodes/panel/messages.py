# SPDX-License-Identifier: GPL-3.0-or-later
"""Messages to the browser tab that queued the run; the blocks of models; the host's own text on a node."""

from __future__ import annotations

import inspect
import math
import re
import sys
from typing import Any

from ..patching.families import Blocks, Layer

Json = dict[str, Any]

CHART, STATUS, BLOCKS, TOKEN = "gag.chart", "gag.status", "gag.blocks", "gag.token"
MAX_REMEMBERED = 256
MAX_TEXT = 4000
# The front end's ids of workflows and nodes are far shorter. Ids that a stranger made longer are not remembered.
MAX_ID = 200
# Characters that front ends take for markup, with characters that look alike.
_MARKUP = (
    (re.compile("<"), "\u2039"),
    (re.compile(">"), "\u203a"),
    (re.compile("&"), "\uff06"),
    (re.compile(r"\[(?=\[)"), "[ "),
    (re.compile("://"), ":\u2215\u2215"),
    (re.compile(r"(www)\.", re.IGNORECASE), "\\1\u2024"),
    (re.compile("__LNK"), "_ _LNK"),
)

# Blocks of the model that last came into a node, by the tab that queued the run, the workflow, and the node.
_blocks: dict[tuple[str, str, str], Json] = {}


def send_text(text: str, node_id: str | None) -> None:
    """Show ``text`` on a node, if there is a server and the host is new enough for it."""
    if node_id is None:
        return
    text = without_markup(text)
    try:
        from server import PromptServer
    except ImportError:
        return
    send_progress_text = getattr(getattr(PromptServer, "instance", None), "send_progress_text", None)
    if send_progress_text is None:
        return
    client = running_client()
    if client is not None and "sid" in inspect.signature(send_progress_text).parameters:
        # Without the client the text would appear on the node of that id in whatever graph other tabs have open.
        send_progress_text(text, node_id, sid=client)
    else:
        send_progress_text(text, node_id)


def without_markup(text: str) -> str:
    """Return a text that every front end shows as it is: without markup, links, or characters that cannot be encoded.

    Front ends up to 1.32 at least write the text of a node as HTML. They turn addresses and ``[[label|address]]`` into
    links, and stop at their own placeholder ``__LNK``. A text may quote words of a prompt, file names and errors, which
    are a stranger's.
    """
    text = text[:MAX_TEXT].encode("utf-8", "backslashreplace").decode("utf-8")
    for pattern, plain in _MARKUP:
        text = pattern.sub(plain, text)
    return text[:MAX_TEXT]


def send_blocks(node_id: str | None, blocks: Blocks, default: frozenset[Layer]) -> None:
    """Send the blocks of the model that came into a node, and remember them.

    The message has, by part, the number of text attentions in each block, and which of them are guided by default.
    """
    if node_id is None or running_server() is None:
        return
    parts = {name: [len(block) for block in part] for name, part in blocks.items() if part}
    chosen = {name: [[layer in default for layer in block] for block in part] for name, part in blocks.items() if part}
    _remember_blocks(node_id, {"parts": parts, "default": chosen})


def send_known_blocks(node_id: str, total: int) -> None:
    """Send the blocks of a model with ``total`` text attentions whose node ComfyUI did not run again.

    It reused the node's output from another workflow, so no message about the blocks came in this one.
    """
    if _key(node_id) in _blocks:
        return
    elsewhere = (known for (_, _, node), known in reversed(_blocks.items()) if node == node_id)
    known = next(elsewhere, None)
    if known is not None and sum(map(sum, known["parts"].values())) == total:
        _remember_blocks(node_id, known)


def blocks_of_workflow(client: str, workflow: str) -> Json:
    """Return the remembered blocks of the nodes of a workflow that a tab queued, by node."""
    return {node: known for (*owner, node), known in list(_blocks.items()) if owner == [client, workflow]}


def send(event: str, data: Json) -> None:
    """Send a message to the tab that queued the run; to nobody if the run was queued without a tab."""
    client = running_client()
    if client is not None:
        running_server().send_sync(event, {"workflow": workflow_id(), **data}, client)


def running_server() -> Any:
    """Return ComfyUI's server; None in a process without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def running_client() -> str | None:
    """Return the id of the tab that queued the prompt that runs; None without a tab."""
    client = getattr(running_server(), "client_id", None)
    return client if isinstance(client, str) else None


def workflow_id() -> str | None:
    """Return the id that the front end gave the workflow that runs; None if what was queued has no proper id."""
    found = _running_item(3)
    # Whoever queues a prompt chooses all of this: any JSON can stand in each place.
    for key in ("extra_pnginfo", "workflow", "id"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) and len(found) <= MAX_ID else None


def queued_inputs(node_id: str) -> Json:
    """Return the inputs with which a node of the running prompt was queued; None for an input that is linked.

    Texts that are too long for a message, and numbers that JSON does not have, are left out.
    """
    found = _running_item(2)
    for key in (node_id, "inputs"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return {}
    values = {name: None if isinstance(value, list) else value for name, value in found.items()}
    return {name: value for name, value in values.items() if len(name) <= MAX_ID and _is_short(value)}


def _is_short(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) < math.inf)


def _running_item(index: int) -> Any:
    """Return an item of the prompt that runs, as ComfyUI's queue keeps it; None if none runs."""
    running = list(getattr(getattr(running_server(), "prompt_queue", None), "currently_running", {}).values())
    return running[0][index] if running else None


def _key(node_id: str) -> tuple[str, str, str]:
    """Return the key of a node of the running workflow in ``_blocks``."""
    return running_client() or "", workflow_id() or "", node_id


def _remember_blocks(node_id: str, known: Json) -> None:
    key = _key(node_id)
    _blocks.pop(key, None)
    if all(len(part) <= MAX_ID for part in key):
        _blocks[key] = known
    while len(_blocks) > MAX_REMEMBERED:
        del _blocks[next(iter(_blocks))]
    send(BLOCKS, {"node": node_id, **known})
