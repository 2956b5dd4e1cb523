# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the example workflows in ComfyUI's real front end: it opens them completely, and queues what we queue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from browser import FrontEnd
from comfy_server import ComfyServer, Json, to_api

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NODES = """() => window.app.graph.nodes.map(node => ({
    type: node.type,
    known: node.type in window.LiteGraph.registered_node_types,
    wanted: Array.from(node.computeSize()),
    size: Array.from(node.size),
}))"""


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> Json:
    return server.object_info()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_opens_completely_and_queues_the_file(path: Path, page: FrontEnd, object_info: Json) -> None:
    workflow: Json = json.loads(path.read_text(encoding="utf-8"))
    types = [node["type"] for node in workflow["nodes"]]
    if missing := set(types) - set(object_info) - {"Note", "MarkdownNote"}:
        pytest.skip(f"this ComfyUI does not have {', '.join(sorted(missing))}")
    page.errors.clear()
    page.load(workflow)
    page.wait("count => window.app.graph.nodes.length === count", len(types))

    nodes: list[dict[str, Any]] = page.evaluate(NODES)
    assert sorted(node["type"] for node in nodes) == sorted(types)
    assert all(node["known"] for node in nodes)
    for node in nodes:
        assert node["size"][1] >= node["wanted"][1] - 1, f"{node['type']} needs a height of {node['wanted'][1]}"
    assert page.evaluate("() => window.app.graph.links.size") == len(workflow["links"])
    assert _without_titles(page.prompt()) == _without_titles(to_api(workflow, object_info))
    assert page.evaluate("() => document.querySelectorAll('.p-dialog').length") == 0, "a warning lies over the page"
    assert page.errors == []


def _without_titles(prompt: Json) -> Json:
    """Return a prompt without the titles of its nodes, which the front end takes from its own translations."""
    return {node_id: {key: value for key, value in node.items() if key != "_meta"} for node_id, node in prompt.items()}
