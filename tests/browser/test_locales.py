# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the nodes' texts in another language, in ComfyUI's real front end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from browser import FrontEnd
from comfy_server import ComfyServer, Json
from generate import texts

# A front end that loads a language after the packs' texts loses the packs' texts. This one does, with any pack.
LOSES_THEM = "1.32.9"
NODE = """id => {
    const node = window.LiteGraph.createNode(id);
    const names = slots => Object.fromEntries(slots.map(slot => [slot.name, slot.localized_name]));
    const widgets = Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.label]));
    return {title: node.title, description: node.constructor.nodeData.description, widgets,
            inputs: names(node.inputs), outputs: names(node.outputs)};
}"""


def test_nodes_are_shown_in_the_users_language(page: FrontEnd, server: ComfyServer) -> None:
    server.settings({"Comfy.Locale": "ja"})
    try:
        with page.beside(server) as opened:
            if opened.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__") == LOSES_THEM:
                pytest.skip(f"front end {LOSES_THEM} loses the translations of all packs")
            shown: dict[str, Json] = {node: opened.evaluate(NODE, node) for node in read("en")}
    finally:
        server.settings({"Comfy.Locale": "en"})
    for node, wanted in read("ja").items():
        assert shown[node]["title"] == wanted["display_name"]
        assert shown[node]["description"] == wanted["description"]
        for name, texts_of_input in wanted["inputs"].items():
            assert shown[node]["widgets"].get(name, name) == name
            assert shown[node]["inputs"][name] == texts_of_input.get("name", name)
        assert list(shown[node]["outputs"].values()) == [output["name"] for output in wanted["outputs"].values()]


def read(language: str) -> Json:
    path: Path = texts.LOCALES / language / "nodeDefs.json"
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    return found
