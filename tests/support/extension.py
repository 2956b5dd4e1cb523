# SPDX-License-Identifier: GPL-3.0-or-later
"""The pack on an open page, for tests/browser: scripts that find nodes and panels, and what users do with them."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from pathlib import Path
from typing import Any

from browser import FrontEnd
from comfy_server import Json

ROOT = Path(__file__).resolve().parents[2]
DEMO: Json = json.loads((ROOT / "workflows" / "gag_01_demo.json").read_text(encoding="utf-8"))
STEPS = 4
TITLES = {"d": "down", "m": "middle", "u": "up"}
_seeds = itertools.count(int(time.time()))

# Helpers in the page: find a node by its type, also in subgraphs, its panel and its fields; collect messages.
HELPERS = """() => {
    const find = (graph, type) => graph.nodes.find(node => node.type === type)
        ?? graph.nodes.reduce((found, node) => found ?? (node.subgraph && find(node.subgraph, type)), undefined);
    window.gagNode = type => find(window.app.rootGraph ?? window.app.graph, type);
    window.gagPanel = type => window.gagNode(type).widgets.find(widget => widget.name === "gag_panel").element;
    window.gagPresets = type => window.gagNode(type).widgets.find(widget => widget.name === "gag_presets").element;
    window.gagField = (type, name) => window.gagNode(type).widgets.find(widget => widget.name === name);
    const seen = window.gagSeen = {};
    window.gagApi = window.comfyAPI.api.api;
    const ofTheHost = ["progress_text", "execution_success", "execution_error"];
    for (const kind of ["gag.chart", "gag.status", "gag.blocks", ...ofTheHost]) {
        seen[kind] = [];
        window.gagApi.addEventListener(kind, ({ detail }) => seen[kind].push(detail));
    }
}"""
TO_ADVANCED = """() => {
    const graph = window.app.graph;
    const old = gagNode("GAGuidance");
    const advanced = window.LiteGraph.createNode("GAGuidanceAdvanced");
    advanced.pos = [old.pos[0], old.pos[1] - 3000];
    graph.add(advanced);
    gagNode("GAGDemoLoader").connect(0, advanced, 0);
    advanced.connect(0, gagNode("KSampler"), 0);
    graph.remove(old);
}"""
# Move the canvas so that the foot of a node is in sight, clear of menus.
LOOK_AT = """type => {
    const { canvas } = window.app, node = gagNode(type);
    canvas.ds.scale = 1;
    canvas.ds.offset = [420 - node.pos[0], 700 - node.pos[1] - node.size[1]];
    canvas.bringToFront?.(node);
    canvas.setDirty(true, true);
}"""
# True if a panel lies entirely within its node and covers none of its widgets, in either renderer.
FITS = """type => {
    const node = gagNode(type), panel = gagPanel(type), content = panel.firstElementChild;
    const box = content.getBoundingClientRect(), own = panel.getBoundingClientRect();
    if (!box.height || box.bottom > own.bottom + 1 || box.right > own.right + 1) return false;
    const shown = panel.closest(".lg-node");
    if (shown) {
        const others = [...shown.querySelectorAll(".lg-node-widget")].filter(row => !row.contains(panel));
        const apart = other => other.bottom <= box.top + 1 || other.top >= box.bottom - 1;
        return box.bottom <= shown.getBoundingClientRect().bottom + 1
            && others.every(row => apart(row.getBoundingClientRect()));
    }
    const widget = node.widgets.find(one => one.element === panel);
    const others = node.widgets.filter(one => one !== widget);
    return widget.y + widget.computedHeight <= node.size[1] + 1
        && others.every(one => one.y + one.computedHeight <= widget.y + 1
            || one.y >= widget.y + widget.computedHeight - 1);
}"""


class Extension:
    """The pack's part of an open page; ``errors`` collects the pack's errors and warnings in the console."""

    def __init__(self, page: FrontEnd) -> None:
        self.page = page
        self.errors: list[str] = []
        page.page.on("console", self._console)

    def _console(self, message: Any) -> None:
        where = message.location.get("url", "")
        ours = "/gag/" in where or ("/extensions/" in where and "/web/" not in where and "core" not in where)
        if message.type in ("error", "warning") and (ours or "gag." in message.text):
            self.errors.append(message.text)

    def open(self, advanced: bool = False, workflow: Json | None = None) -> None:
        """Open the demo's workflow, from its file or with the advanced node instead; or another workflow."""
        self.page.load(workflow or {**DEMO, "id": str(uuid.uuid4())})  # a new id, for which nothing is remembered
        self.page.evaluate(HELPERS)
        if workflow is None:
            self.set_field("KSampler", "steps", STEPS)
        if advanced:
            self.page.evaluate(TO_ADVANCED)
        node = "GAGuidanceAdvanced" if advanced else "GAGuidance"
        self.page.wait("type => Boolean(gagNode(type))", node)

    def queue(self) -> None:
        """Queue the workflow with another seed."""
        self.page.evaluate("seed => { gagField('KSampler', 'seed').value = seed; }", next(_seeds))
        self.page.evaluate("() => window.app.queuePrompt(0)")

    def run(self) -> None:
        """Run the workflow, and wait for the last message of the run."""
        before = self.count("execution_success")
        self.queue()
        self.wait_count("execution_success", before + 1)

    def count(self, kind: str) -> int:
        return int(self.page.evaluate("kind => gagSeen[kind].length", kind))

    def wait_count(self, kind: str, count: int) -> None:
        self.page.wait("([kind, count]) => gagSeen[kind].length >= count", [kind, count], timeout_ms=120_000)

    def quiet(self) -> int:
        """Wait until no more chart messages come, because the server has the new list; return how many have come."""
        count = -1
        while count != (count := self.count("gag.chart")):
            time.sleep(2)
        return count

    def model(self) -> Json:
        """Return the blocks of the model, from the last message."""
        model: Json = self.page.evaluate("() => gagSeen['gag.blocks'].at(-1)")
        return model

    def wait_guided(self, node: str, guided: int | None = None) -> None:
        """Wait until the line says that these attentions were guided, by default the model's default, in this state."""
        if guided is None:
            guided = sum(layer for part in self.model()["default"].values() for block in part for layer in block)
        script = """([type, text]) => {
            const line = gagPanel(type).querySelector(".gag-status");
            return line.textContent.startsWith(text) && !line.classList.contains("gag-old");
        }"""
        self.page.wait(script, [node, f"Guided {guided} of {guided} attentions in "])

    def wait_status(self, node: str, text: str, *, old: bool = False) -> None:
        """Wait until the line has exactly this text, grey or not."""
        script = """([type, text, old]) => {
            const line = gagPanel(type).querySelector(".gag-status");
            return line.textContent === text && line.classList.contains("gag-old") === old;
        }"""
        self.page.wait(script, [node, text, old])

    def queue_same(self) -> None:
        """Queue the workflow as it is, and wait for the end of the run."""
        before = self.count("execution_success")
        self.page.evaluate("() => window.app.queuePrompt(0)")
        self.wait_count("execution_success", before + 1)

    def panel(self, node: str) -> Any:
        """Return the panel's element, which must be in sight."""
        self.page.evaluate(LOOK_AT, node)
        self.page.wait("type => gagPanel(type).isConnected && gagPanel(type).offsetHeight > 0", node)
        return self.page.page.evaluate_handle("type => gagPanel(type)", node).as_element()

    def click(self, node: str, text: str) -> None:
        """Press a button of a node's panel with the mouse."""
        panel = self.panel(node)
        (button,) = (found for found in panel.query_selector_all("button") if found.text_content() == text)
        button.click()
        time.sleep(0.5)  # time for the message to the server

    def press(self, part: str, block: int) -> None:
        """Press a block in the picker with the mouse."""
        for row in self.panel("GAGuidanceAdvanced").query_selector_all(".gag-part"):
            title, *cells = row.query_selector_all("span, button")
            if title.text_content() == part:
                cells[block].click()

    def choose(self, preset: str) -> None:
        """Choose a preset."""
        self.panel("GAGuidanceAdvanced")  # brings the node into sight
        top = self.page.page.evaluate_handle("() => gagPresets('GAGuidanceAdvanced')").as_element()
        top.query_selector("select").select_option(preset)

    def field(self, node: str, name: str) -> Any:
        return self.page.evaluate("([type, name]) => gagField(type, name).value", [node, name])

    def set_field(self, node: str, name: str, value: Any) -> None:
        self.page.evaluate("([type, name, value]) => { gagField(type, name).value = value; }", [node, name, value])

    def wait_text(self, node: str, part: str, text: str) -> None:
        """Wait until a part of a panel, by its selector, has exactly this text."""
        script = "([type, part, text]) => gagPanel(type).querySelector(part)?.textContent === text"
        self.page.wait(script, [node, part, text])

    def wait_preset(self, name: str) -> None:
        shown = "name => gagPresets('GAGuidanceAdvanced').querySelector('select')?.selectedOptions[0]?.text === name"
        self.page.wait(shown, name)

    def wait_blocks(self, chosen: Json) -> None:
        """Wait until the picker shows these blocks as guided, by part."""
        wanted = [f"{TITLES.get(p, p)}{i}" for p, blocks in chosen.items() for i, on in enumerate(blocks) if all(on)]
        script = """wanted => [...gagPanel("GAGuidanceAdvanced").querySelectorAll(".gag-block[aria-pressed=true]")]
            .map(b => b.parentElement.firstChild.textContent + b.textContent).join() === wanted.join()"""
        self.page.wait(script, wanted)

    def wait_fit(self, node: str) -> None:
        self.panel(node)
        self.page.wait(FITS, node)
