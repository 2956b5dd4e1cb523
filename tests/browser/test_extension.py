# SPDX-License-Identifier: GPL-3.0-or-later
"""What the pack adds to its nodes in the browser (web/gag.js): in the real front end, on the real server."""

from __future__ import annotations

import importlib
import itertools
import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from browser import FrontEnd
from comfy_server import ComfyServer, Json

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
DEMO: Json = json.loads((ROOT / "workflows" / "gag_demo.json").read_text(encoding="utf-8"))
STEPS = 12  # of the demo workflow
_seeds = itertools.count(int(time.time()))

# In the page: a node of a type, in a subgraph or not, its panel and its fields; and how many messages have come.
HELPERS = """() => {
    const everyNode = graph => graph.nodes.flatMap(n => [n, ...(n.subgraph ? everyNode(n.subgraph) : [])]);
    window.gagNode = type => everyNode(window.app.rootGraph ?? window.app.graph).find(node => node.type === type);
    window.gagPanel = type => window.gagNode(type).widgets.find(widget => widget.name === "gag_panel").element;
    window.gagField = (type, name) => window.gagNode(type).widgets.find(widget => widget.name === name);
    window.gagCounts = {};
    const count = ({ type }) => { window.gagCounts[type] = (window.gagCounts[type] ?? 0) + 1; };
    window.gagApi = window.comfyAPI.api.api;
    for (const kind of ["gag.chart", "gag.report", "execution_success", "execution_error"]) {
        window.gagApi.addEventListener(kind, count);
    }
}"""
TO_ADVANCED = """() => {
    const graph = window.app.graph;
    const old = gagNode("GAGuidance");
    const advanced = window.LiteGraph.createNode("GAGuidanceAdvanced");
    advanced.pos = [400, -400];
    graph.add(advanced);
    gagNode("GAGDemoLoader").connect(0, advanced, 0);
    advanced.connect(0, gagNode("KSampler"), 0);
    graph.remove(old);
}"""


class Extension:
    """The pack's part of an open page; ``errors`` are those in the console that are ours."""

    def __init__(self, page: FrontEnd) -> None:
        self.page = page
        self.errors: list[str] = []
        page.page.on("console", self._console)

    def _console(self, message: Any) -> None:
        where = message.location.get("url", "")
        ours = "/gag/" in where or ("/extensions/" in where and "/web/" not in where and "core" not in where)
        if message.type in ("error", "warning") and (ours or "gag." in message.text):
            self.errors.append(message.text)

    def open(self, advanced: bool = False) -> None:
        """Open the demo's workflow, as it is in its file or with the advanced node."""
        self.page.load({**DEMO, "id": str(uuid.uuid4())})  # so that nothing is known of its nodes
        self.page.evaluate(HELPERS)
        if advanced:
            self.page.evaluate(TO_ADVANCED)
        node = "GAGuidanceAdvanced" if advanced else "GAGuidance"
        self.page.wait("type => Boolean(gagNode(type))", node)

    def run(self) -> None:
        """Run the workflow with another seed, to its end and to that of its messages."""
        before = self.count("execution_success")
        self.page.evaluate("seed => { gagField('KSampler', 'seed').value = seed; }", next(_seeds))
        self.page.evaluate("() => window.app.queuePrompt(0)")
        self.page.wait("before => (gagCounts.execution_success ?? 0) > before", before)

    def count(self, kind: str) -> int:
        return int(self.page.evaluate("kind => gagCounts[kind] ?? 0", kind))

    def click(self, node: str, text: str) -> None:
        """Press a button of a node's panel."""
        find = "([type, text]) => [...gagPanel(type).querySelectorAll('button')].find(b => b.textContent === text)"
        self.page.evaluate(f"given => ({find})(given).click()", [node, text])
        time.sleep(0.5)  # the server is told meanwhile

    def field(self, node: str, name: str) -> Any:
        return self.page.evaluate("([type, name]) => gagField(type, name).value", [node, name])

    def set_field(self, node: str, name: str, value: Any) -> None:
        self.page.evaluate("([type, name, value]) => { gagField(type, name).value = value; }", [node, name, value])

    def wait_text(self, node: str, part: str, text: str) -> None:
        """Wait until a part of a panel, by its selector, has exactly this text."""
        script = "([type, part, text]) => gagPanel(type).querySelector(part)?.textContent === text"
        self.page.wait(script, [node, part, text])

    def wait_blocks(self, pressed: str) -> None:
        """Wait until the picker shows these blocks as guided, by the names of their parts, ``down0,up1``."""
        script = """pressed => [...gagPanel("GAGuidanceAdvanced").querySelectorAll(".gag-block[aria-pressed=true]")]
            .map(b => b.parentElement.firstChild.textContent + b.textContent).join() === pressed"""
        self.page.wait(script, pressed)


@pytest.fixture(scope="module", params=["classic", "vue"])
def tab(request: pytest.FixtureRequest, server: ComfyServer, page: FrontEnd) -> Iterator[FrontEnd]:
    """A tab with nodes drawn on the canvas, and one with those of the Vue renderer."""
    server.settings({"Comfy.VueNodes.Enabled": request.param == "vue"})
    with page.beside(server) as opened:
        yield opened
    server.settings({"Comfy.VueNodes.Enabled": False})


@pytest.fixture
def extension(tab: FrontEnd) -> Iterator[Extension]:
    """No test may leave an error in the page or the console."""
    tab.errors.clear()
    opened = Extension(tab)
    yield opened
    assert tab.errors == []
    assert opened.errors == []


def test_a_chart_is_drawn_while_it_is_open_and_nothing_comes_otherwise(extension: Extension) -> None:
    extension.open()
    extension.run()
    assert extension.count("gag.report") == 1
    assert extension.count("gag.chart") == 0
    extension.click("GAGuidance", "chart")
    extension.run()
    drawn = (
        """() => gagPanel("GAGuidance").querySelector("polyline.gag-gain").getAttribute("points").split(" ").length"""
    )
    extension.page.wait(f"steps => ({drawn})() === steps", STEPS)
    shown = extension.page.evaluate("() => gagPanel('GAGuidance').querySelector('.gag-chart').textContent")
    assert shown.count("%") == 3
    came = extension.count("gag.chart")
    assert came >= 1
    extension.click("GAGuidance", "chart")
    extension.run()
    assert extension.count("gag.report") == 3
    assert extension.count("gag.chart") == came
    assert extension.page.evaluate("() => gagPanel('GAGuidance').querySelector('.gag-chart') === null")


def test_the_badge_says_what_was_guided_or_why_nothing(extension: Extension) -> None:
    extension.open()
    extension.wait_text("GAGuidance", ".gag-badge", "")
    extension.run()
    extension.wait_text("GAGuidance", ".gag-badge", "guiding 4 of 5 layers")
    extension.set_field("GAGuidance", "strength", 0)
    extension.run()
    extension.wait_text("GAGuidance", ".gag-badge", "not guiding: strength is 0")
    extension.set_field("GAGuidance", "strength", 1)
    extension.set_field("GAGuidance", "start_percent", 1)
    extension.run()
    extension.wait_text("GAGuidance", ".gag-badge", "not guiding: no step within 1 to 1")


def test_the_picker_and_the_text_agree(extension: Extension) -> None:
    node = "GAGuidanceAdvanced"
    extension.open(advanced=True)
    extension.click(node, "blocks")
    extension.wait_text(node, ".gag-picker", "Run once to see this model's blocks.")
    extension.run()
    extension.wait_blocks("down0,down1,up0,up1")
    press = """([part, block]) => [...gagPanel("GAGuidanceAdvanced").querySelectorAll(".gag-part")]
        .find(row => row.firstChild.textContent === part).querySelectorAll("button")[block].click()"""
    extension.page.evaluate(press, ["up", 1])
    assert extension.field(node, "blocks") == "d,u0"
    extension.wait_blocks("down0,down1,up0")
    extension.set_field(node, "blocks", "m, u1")
    extension.wait_blocks("middle0,up1")
    extension.run()
    extension.wait_text(node, ".gag-badge", "guiding 2 of 5 layers")
    extension.set_field(node, "blocks", "d9")
    extension.wait_text(node, ".gag-note", "The text does not name blocks of this model.")
    extension.set_field(node, "blocks", "m")
    extension.wait_blocks("middle0")
    extension.page.evaluate(press, ["middle", 0])
    assert extension.field(node, "blocks") == "m", "the last block stays, because an empty text is the default"
    extension.click(node, "default")
    assert extension.field(node, "blocks") == ""
    extension.wait_blocks("down0,down1,up0,up1")


def test_after_a_reload_the_blocks_are_still_known_and_no_chart_is_open(
    extension: Extension, server: ComfyServer
) -> None:
    node = "GAGuidanceAdvanced"
    extension.open(advanced=True)
    extension.click(node, "chart")
    extension.run()
    assert extension.count("gag.chart") >= 1
    workflow = extension.page.evaluate("() => window.app.graph.serialize()")
    extension.page.go_to(server)
    extension.page.load(workflow)
    extension.page.evaluate(HELPERS)
    extension.page.wait("type => Boolean(gagNode(type))", node)
    extension.click(node, "blocks")
    extension.wait_blocks("down0,down1,up0,up1")
    extension.run()
    extension.wait_text(node, ".gag-badge", "guiding 4 of 5 layers")
    assert extension.count("gag.chart") == 0


def test_a_preset_fills_the_fields_and_shows_when_they_differ(extension: Extension) -> None:
    presets = extension.page.evaluate("async () => (await fetch('/gag/presets')).json()")
    node = "GAGuidanceAdvanced"
    shown = "name => gagPanel('GAGuidanceAdvanced').querySelector('select')?.value === name"
    choose = """name => { const select = gagPanel("GAGuidanceAdvanced").querySelector("select");
        select.value = name; select.dispatchEvent(new Event("change")); }"""
    extension.open(advanced=True)
    extension.page.wait(shown, "paper")  # which is what the node's defaults are
    extension.set_field(node, "strength", 0.5)
    for name, config in presets.items():
        extension.page.evaluate(choose, name)
        fields = set(extension.page.evaluate("() => gagNode('GAGuidanceAdvanced').widgets.map(w => w.name)"))
        settings = {key: value for key, value in config.items() if key in fields}
        assert len(settings) >= 7
        assert {key: extension.field(node, key) for key in settings} == settings
        assert extension.field(node, "strength") == 0.5
        extension.page.wait(shown, name)
    extension.set_field(node, "guidance_scale", 3.3)
    extension.page.wait(shown, "modified")
    extension.set_field(node, "guidance_scale", presets["paper"]["guidance_scale"])
    extension.page.wait(shown, "paper")
    prompt = extension.page.prompt()
    (inputs,) = (entry["inputs"] for entry in prompt.values() if entry["class_type"] == node)
    assert "gag_panel" not in inputs


def test_each_node_is_told_of_itself(extension: Extension) -> None:
    extension.open()
    extension.page.evaluate("""() => {
        const first = window.LiteGraph.createNode("GAGuidanceAdvanced");
        first.pos = [400, -400];
        window.app.graph.add(first);
        gagNode("GAGDemoLoader").connect(0, first, 0);
        first.connect(0, gagNode("GAGuidance"), 0);
    }""")
    extension.click("GAGuidanceAdvanced", "chart")
    extension.run()
    extension.wait_text("GAGuidance", ".gag-badge", "guiding 4 of 5 layers")
    extension.wait_text("GAGuidanceAdvanced", ".gag-badge", "not guiding: a later GAG node acts")
    assert extension.count("gag.chart") == 0, "the node whose chart is open does nothing in this run"
    extension.click("GAGuidance", "chart")
    extension.run()
    assert extension.count("gag.chart") >= 1
    points = "type => gagPanel(type).querySelector('polyline').getAttribute('points')"
    extension.page.wait(f"type => ({points})(type) !== ''", "GAGuidance")
    assert extension.page.evaluate(points, "GAGuidanceAdvanced") == ""


def test_a_node_in_a_subgraph(extension: Extension) -> None:
    extension.open()
    extension.page.evaluate("() => { window.app.graph.convertToSubgraph(new Set([gagNode('GAGuidance')])); }")
    assert extension.page.evaluate("() => !window.app.graph.nodes.includes(gagNode('GAGuidance'))")
    extension.click("GAGuidance", "chart")
    extension.run()
    extension.wait_text("GAGuidance", ".gag-badge", "guiding 4 of 5 layers")
    assert extension.count("gag.chart") >= 1


def test_what_was_shown_survives_undo(extension: Extension) -> None:
    """Which makes all nodes anew."""
    extension.open()
    extension.click("GAGuidance", "chart")
    extension.run()
    extension.wait_text("GAGuidance", ".gag-badge", "guiding 4 of 5 layers")
    extension.page.evaluate("async () => { await window.app.loadGraphData(window.app.graph.serialize()); }")
    extension.wait_text("GAGuidance", ".gag-badge", "guiding 4 of 5 layers")
    came = extension.count("gag.chart")
    extension.run()
    assert extension.count("gag.chart") > came


def test_another_tab_gets_nothing_of_a_run(extension: Extension, server: ComfyServer) -> None:
    extension.open()
    with extension.page.beside(server) as second:
        other = Extension(second)
        other.open()
        other.click("GAGuidance", "chart")
        extension.run()
        assert extension.count("gag.chart") == 0
        assert other.count("gag.chart") == other.count("gag.report") == 0
        # It is measured for the tab that runs and looks.
        other.run()
        assert other.count("gag.chart") >= 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_saved_and_queued_as_without_the_extension(
    path: Path, page: FrontEnd, plain: FrontEnd, server: ComfyServer
) -> None:
    workflow: Json = json.loads(path.read_text(encoding="utf-8"))
    known = server.object_info()
    if any(node["type"] not in known for node in workflow["nodes"] if "Note" not in node["type"]):
        pytest.skip("this ComfyUI does not have all of its nodes")
    graphs = []
    for opened in (page, plain):
        opened.load(workflow)
        opened.wait("count => window.app.graph.nodes.length === count", len(workflow["nodes"]))
        graphs.append(opened.evaluate("() => window.app.graphToPrompt()"))
    ours, without = graphs
    assert ours["output"] == without["output"]
    saved = [
        [(node["type"], node["inputs"], node.get("widgets_values")) for node in graph["workflow"]["nodes"]]
        for graph in graphs
    ]
    assert saved[0] == saved[1]
    assert page.evaluate("() => document.querySelectorAll('.gag-panel').length") >= 1
    assert plain.evaluate("() => document.querySelectorAll('.gag-panel').length") == 0


@pytest.fixture(scope="module")
def plain(page: FrontEnd, server: ComfyServer) -> Iterator[FrontEnd]:
    """A tab that the extension does not reach."""
    with page.beside(server, without="/gag.js") as opened:
        yield opened


def test_the_picker_reads_texts_as_the_server_does(page: FrontEnd) -> None:
    # In a thread of its own, because the browser's loop runs in this one.
    with ThreadPoolExecutor(1) as thread:
        host: Any = thread.submit(importlib.import_module, "host_process").result()
    blocks = host.pack_module("nodes.blocks")
    layer = host.pack_module("nodes.families").Layer
    models = [
        {"d": [1, 1, 2], "m": [10], "u": [2, 2, 1]},
        {"double": [1] * 19, "single": [1] * 38},
        {"block": [1] * 30},
    ]
    terms = ["d", "d0", "d0-1", "m", "m0.3", "u1.0-1", "u2.1", "double", "double 3-5", "single 37", "single0-40", "7"]
    terms += ["19-21", "block 2", "block2-1", "0-29", "x", "", " U0 ", "d2.", ".1", "d.0", "3 - 5", "1.0", "d-1"]
    texts = [*terms, *(f"{a},{b}" for a in terms for b in terms)]
    script = """async ([models, texts]) => {
        const files = await (await fetch("/extensions")).json();
        const { parseBlocks, formatBlocks } = await import(files.find(file => file.endsWith("/blocks.js")));
        return models.map(parts => texts.map(text => {
            const chosen = parseBlocks(text, parts);
            const again = chosen && parseBlocks(formatBlocks(chosen), parts);
            return [chosen, again];
        }));
    }"""
    read = 0
    for parts, found in zip(models, page.evaluate(script, [models, texts]), strict=True):
        known = {
            name: [[layer(name, number, inner) for inner in range(count)] for number, count in enumerate(part)]
            for name, part in parts.items()
        }
        for text, (chosen, again) in zip(texts, found, strict=True):
            try:
                wanted = blocks.parse_blocks(text, known)
            except blocks.BlocksError:
                assert chosen is None, text
                continue
            read += 1
            assert chosen is not None, text
            layers = {
                layer(p, b, i) for p in chosen for b, row in enumerate(chosen[p]) for i, on in enumerate(row) if on
            }
            assert layers == wanted, text
            assert again == chosen, text
    assert read > 200


def test_without_the_server_nothing_goes_wrong(page: FrontEnd) -> None:
    with ComfyServer(cpu=True) as lost, page.beside(lost) as opened:
        extension = Extension(opened)
        extension.open(advanced=True)
        extension.click("GAGuidanceAdvanced", "chart")
        lost.__exit__(None, None, None)
        opened.wait("() => gagApi.socket?.readyState !== WebSocket.OPEN")
        opened.errors.clear()
        for button in ("chart", "chart", "blocks", "blocks"):
            extension.click("GAGuidanceAdvanced", button)
        assert opened.errors == []
        assert extension.errors == []
