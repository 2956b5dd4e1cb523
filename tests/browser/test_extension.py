# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the panels of guidance nodes (web/gag.js), in the real front end on the real server."""

from __future__ import annotations

import importlib
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
from extension import HELPERS, STEPS, Extension

ROOT = Path(__file__).resolve().parents[2]
PROBE: Json = json.loads((ROOT / "workflows" / "gag_12_probe.json").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
CLOSED = "() => gagApi.socket?.readyState !== WebSocket.OPEN"
# True if the line of a series has so many points.
POINTS = """([type, name, count]) => gagPanel(type).querySelector(`polyline[data-series="${name}"]`)
    ?.getAttribute("points").split(" ").length === count"""


def test_a_chart_gets_messages_only_while_it_is_open(extension: Extension) -> None:
    extension.open()
    extension.run()
    assert extension.count("gag.status") == 1
    assert extension.count("gag.chart") == 0
    extension.click("GAGuidance", "chart")
    extension.run()
    series = extension.page.evaluate("async () => (await (await fetch('/gag/setup')).json()).series")
    for name in (one["name"] for one in series):
        extension.page.wait(POINTS, ["GAGuidance", name, STEPS])
    shown = extension.page.evaluate(
        "() => [...gagPanel('GAGuidance').querySelectorAll('span.gag-series')].map(one => one.textContent).join()"
    )
    assert shown.count("%") == [one["unit"] for one in series].count("%")
    extension.wait_fit("GAGuidance")
    count = extension.count("gag.chart")
    assert count >= 1
    extension.click("GAGuidance", "chart")
    extension.run()
    assert extension.count("gag.status") == 3
    assert extension.count("gag.chart") == count
    assert extension.page.evaluate("() => gagPanel('GAGuidance').querySelector('.gag-chart') === null")


def test_the_legend_is_there_before_the_first_run(extension: Extension) -> None:
    extension.open()
    extension.click("GAGuidance", "chart")
    series = extension.page.evaluate("async () => (await (await fetch('/gag/setup')).json()).series")
    texts = json.loads((ROOT / "locales" / "en" / "main.json").read_text(encoding="utf-8"))["gag"]
    script = """wanted => JSON.stringify([...gagPanel("GAGuidance").querySelectorAll("span.gag-series")]
        .map(label => [label.dataset.series, label.textContent, label.title])) === JSON.stringify(wanted)"""
    names = [one["name"] for one in series]
    extension.page.wait(script, [[name, texts[name], texts[f"{name}_tip"]] for name in names])


def test_a_chart_draws_any_series_that_a_message_declares(extension: Extension) -> None:
    """A name without texts, which objects inherit besides, and values outside the range."""
    extension.open()
    extension.click("GAGuidance", "chart")
    extension.page.evaluate("""() => {
        const series = [
            { name: "constructor", unit: "", range: [-1, 1], colour: "rgb(0, 0, 255)" },
            { name: "most", unit: "%", range: [0, null], colour: "rgb(255, 0, 0)" },
        ];
        const points = { [gagNode("GAGuidance").id]: [[0, -5, 0.5], [1, 0, 2], [2, 5, 1]] };
        gagApi.dispatchEvent(new CustomEvent("gag.chart", { detail: { run: -1, steps: 3, series, points } }));
    }""")
    extension.page.wait("() => gagPanel('GAGuidance').querySelector('[data-series=constructor]')")
    shown = extension.page.evaluate("""() => {
        const parts = [...gagPanel("GAGuidance").querySelectorAll("polyline, .gag-legend span")];
        return parts.map(part => part.getAttribute("points") ?? `${part.textContent}, ${part.title}`);
    }""")
    lines = ["0.00,98.00 50.00,50.00 100.00,2.00", "0.00,74.00 50.00,2.00 100.00,50.00"]
    assert shown == [*lines, "constructor 5, constructor", "most 100 %, most"]
    axes = extension.page.evaluate("""() => [...gagPanel("GAGuidance").querySelectorAll(".gag-axis, .gag-steps")]
        .map(axis => [...axis.children].map(label => label.textContent))""")
    assert axes == [["200 %", "0 %"], ["1", "-1"], ["step 1", "3"]]
    colours = extension.page.evaluate("""() => [...gagPanel("GAGuidance").querySelectorAll("polyline")]
        .map(line => getComputedStyle(line).stroke)""")
    assert len(set(colours)) == 2
    extension.wait_fit("GAGuidance")


def test_the_line_says_what_the_last_run_did_and_is_grey_once_that_is_no_longer_so(extension: Extension) -> None:
    node = "GAGuidance"
    note = ".gag-chart .gag-note"
    extension.open()
    extension.wait_status(node, "")
    extension.click(node, "chart")
    extension.wait_text(node, note, "Queue a run: it draws a point for each step.")
    extension.run()
    extension.wait_guided(node)
    told = extension.page.evaluate("() => gagSeen['gag.status'].at(-1).text")
    extension.page.wait("() => gagPanel('GAGuidance').querySelector('.gag-note').textContent.startsWith('On average')")
    extension.set_field(node, "strength", 0.5)
    extension.wait_status(node, told, old=True)
    extension.page.wait("() => gagPanel('GAGuidance').querySelector('.gag-chart.gag-old') !== null")
    extension.set_field(node, "strength", 1)
    extension.wait_status(node, told)
    for mode, text in ((4, "Bypassed: does nothing."), (2, "Muted: does not run.")):
        extension.page.evaluate("mode => { gagNode('GAGuidance').mode = mode; }", mode)
        extension.wait_status(node, text, old=True)
    extension.page.evaluate("() => { gagNode('GAGuidance').mode = 0; }")
    extension.wait_status(node, told)
    title = "() => gagPanel('GAGuidance').querySelector('.gag-status').title"
    assert extension.page.evaluate(title) == told
    extension.page.evaluate("() => { gagField('KSampler', 'seed').value = 5; }")
    extension.set_field("KSampler", "control_after_generate", "fixed")
    extension.queue_same()
    extension.wait_guided(node)
    extension.queue_same()
    extension.wait_status(node, "Nothing ran: cached.", old=True)
    assert told in extension.page.evaluate(title)
    cached = "Nothing ran: nothing had changed, so ComfyUI reused the last result. Run with another seed to draw it."
    extension.wait_text(node, note, cached)
    extension.set_field(node, "strength", 0)
    extension.wait_status(node, told, old=True)
    extension.run()
    extension.wait_status(node, "Nothing guided: strength is 0.")
    extension.wait_text(node, note, "Nothing was guided in the last run.")
    assert (
        extension.page.evaluate("() => gagPanel('GAGuidance').querySelector('polyline').getAttribute('points')") == ""
    )
    extension.run()  # only the sampler runs again
    time.sleep(3)  # time for the panel to ask about the run
    extension.wait_status(node, "Nothing guided: strength is 0.")
    extension.set_field(node, "strength", 1)
    extension.set_field("KSampler", "cfg", 4)
    extension.run()
    extension.wait_status(node, "Nothing guided: it rests beside CFG 4.")


def test_probe_and_report_can_be_read_after_the_job(extension: Extension) -> None:
    """Front ends from about 1.55 remove the host's own text from nodes when a job ends."""
    extension.open(workflow={**PROBE, "id": str(uuid.uuid4())})
    for node in ("GAGProbe", "GAGReport"):
        extension.wait_status(node, "")
    extension.set_field("KSampler", "steps", STEPS)
    extension.run()
    time.sleep(1)
    extension.wait_status("GAGProbe", f"Measured 5 attentions in {STEPS} model calls.")
    shown = "type => gagPanel(type).querySelector('.gag-status').textContent"
    assert extension.page.evaluate(shown, "GAGReport").startswith("Guidance acted in 4 of the model's 5 attentions")
    assert "All numbers: " in extension.page.evaluate(shown, "GAGReport")
    extension.wait_fit("GAGReport")
    assert extension.count("progress_text") == 0
    assert not extension.page.evaluate("() => gagNode('GAGReport').widgets.some(one => /All numbers/.test(one.value))")


def test_a_reload_in_the_middle_of_a_run(extension: Extension, server: ComfyServer) -> None:
    extension.open()
    extension.set_field("KSampler", "steps", 60)
    extension.click("GAGuidance", "chart")
    extension.queue()
    extension.wait_count("gag.chart", 2)
    workflow = extension.page.evaluate("() => window.app.graph.serialize()")
    extension.page.go_to(server)
    extension.page.load(workflow)
    extension.page.evaluate(HELPERS)
    extension.wait_guided("GAGuidance", 4)


# Rectangles of all nodes, with their title bars.
BOXES = """() => window.app.graph.nodes.map(({ type, pos, size }) => [type, pos[0], pos[1] - 30, ...size])"""


def test_an_open_chart_covers_no_other_node(extension: Extension) -> None:
    node = "GAGuidance"
    extension.open()
    extension.wait_fit(node)
    (before,) = (box for box in extension.page.evaluate(BOXES) if box[0] == node)
    extension.page.evaluate("""() => {
        const below = window.LiteGraph.createNode("CLIPTextEncode"), { pos, size } = gagNode("GAGuidance");
        below.pos = [pos[0] + 20, pos[1] + size[1] + 40];
        window.app.graph.add(below);
    }""")
    extension.click(node, "chart")
    extension.wait_fit(node)
    time.sleep(1.5)  # the node may move more than once until Vue has drawn it
    boxes = extension.page.evaluate(BOXES)
    ((_, left, top, width, height),) = (box for box in boxes if box[0] == node)
    assert height > before[4] + 80
    assert [
        box[0]
        for box in boxes
        if box[0] != node
        and box[1] < left + width
        and left < box[1] + box[3]
        and box[2] < top + height
        and top < box[2] + box[4]
    ] == []
    extension.click(node, "chart")
    at = "([type, x, y]) => Math.hypot(gagNode(type).pos[0] - x, gagNode(type).pos[1] - 30 - y) < 2"
    extension.page.wait(at, before[:3])


def test_the_picker_and_the_text_agree(extension: Extension) -> None:
    node = "GAGuidanceAdvanced"
    extension.open(advanced=True)
    extension.click(node, "blocks")
    extension.wait_text(node, ".gag-picker", "Run once to see this model's blocks.")
    extension.run()
    default = extension.model()["default"]
    none = {part: [[False] * len(block) for block in blocks] for part, blocks in default.items()}
    extension.wait_blocks(default)
    last = len(default["u"]) - 1
    extension.press("up", last)
    assert extension.field(node, "blocks") == f"d,u{f'0-{last - 1}' if last > 1 else 0}"
    extension.wait_blocks({**default, "u": [*default["u"][:-1], none["u"][-1]]})
    extension.set_field(node, "blocks", "m, u1")
    chosen = {**none, "m": [[True]], "u": [none["u"][0], [True] * len(none["u"][1]), *none["u"][2:]]}
    extension.wait_blocks(chosen)
    extension.wait_fit(node)
    extension.run()
    guided = sum(layer for part in chosen.values() for block in part for layer in block)
    extension.wait_guided(node, guided)
    extension.set_field(node, "blocks", "d9")
    extension.wait_text(node, ".gag-note", "The text does not name blocks of this model.")
    extension.set_field(node, "blocks", "m")
    extension.wait_blocks({"m": [[True]]})
    extension.press("middle", 0)
    assert extension.field(node, "blocks") == "m", "the last block stays, because an empty text means the default"
    extension.click(node, "default")
    assert extension.field(node, "blocks") == ""
    extension.wait_blocks(default)


def test_a_large_model_fits_on_a_narrow_node(extension: Extension) -> None:
    node = "GAGuidanceAdvanced"
    extension.open(advanced=True)
    extension.page.evaluate("""() => {
        const parts = { double: Array(19).fill(1), single: Array(38).fill(1) };
        const all = counts => counts.map(() => [true]);
        const chosen = { double: all(parts.double), single: all(parts.single) };
        const detail = { node: String(gagNode("GAGuidanceAdvanced").id), parts, default: chosen };
        window.comfyAPI.api.api.dispatchEvent(new CustomEvent("gag.blocks", { detail }));
        gagNode("GAGuidanceAdvanced").setSize([225, gagNode("GAGuidanceAdvanced").size[1]]);
    }""")
    extension.click(node, "blocks")
    extension.click(node, "chart")
    extension.wait_blocks({"double": [[True]] * 19, "single": [[True]] * 38})
    extension.wait_fit(node)
    extension.press("single", 37)
    assert extension.field(node, "blocks") == "double, single 0-36"
    open_height = extension.page.evaluate("type => gagNode(type).size[1]", node)
    extension.click(node, "chart")
    extension.click(node, "blocks")
    extension.wait_fit(node)
    extension.page.wait("([type, high]) => gagNode(type).size[1] < high - 150", [node, open_height])


def test_after_a_reload_the_blocks_are_still_known_and_the_chart_is_still_open(
    extension: Extension, server: ComfyServer
) -> None:
    node = "GAGuidanceAdvanced"
    extension.open(advanced=True)
    extension.click(node, "chart")
    extension.run()
    assert extension.count("gag.chart") >= 1
    default = extension.model()["default"]
    extension.wait_fit(node)
    height = extension.page.evaluate("type => gagNode(type).size[1]", node)
    workflow = extension.page.evaluate("() => window.app.graph.serialize()")
    extension.page.go_to(server)
    extension.page.load(workflow)
    extension.page.evaluate(HELPERS)
    extension.page.wait("type => Boolean(gagNode(type))", node)
    extension.wait_status(node, "")
    extension.wait_fit(node)
    assert extension.page.evaluate("type => gagNode(type).size[1]", node) == pytest.approx(height, abs=2)
    extension.wait_text(node, ".gag-chart .gag-note", "Queue a run: it draws a point for each step.")
    extension.click(node, "blocks")
    extension.wait_blocks(default)
    extension.run()
    extension.wait_guided(node, sum(layer for part in default.values() for block in part for layer in block))
    assert extension.count("gag.chart") >= 1


def test_a_preset_fills_the_fields_and_shows_when_they_differ(extension: Extension) -> None:
    presets = extension.page.evaluate("async () => (await (await fetch('/gag/setup')).json()).presets")
    node = "GAGuidanceAdvanced"
    extension.open(advanced=True)
    extension.wait_preset("auto")  # the node's defaults are this preset
    for name, value in (("apply_to", "positive"), ("blocks", "u"), ("verbose", True)):
        extension.set_field(node, name, value)
    extension.wait_preset("auto")  # these fields are not part of a preset
    fields = set(extension.page.evaluate("() => gagNode('GAGuidanceAdvanced').widgets.map(w => w.name)"))
    for name, config in presets.items():
        extension.choose(name)
        settings = {key: value for key, value in config.items() if key in fields}
        assert set(settings) == fields - {"apply_to", "blocks", "verbose", "gag_panel", "gag_presets"}
        assert {key: extension.field(node, key) for key in settings} == settings
        assert [extension.field(node, key) for key in ("apply_to", "blocks", "verbose")] == ["positive", "u", True]
        extension.wait_preset(name)
    changes: dict[str, float] = {
        "guidance_scale": 3.3,
        "strength": 0.7,
        "start_percent": 0.1,
        "end_percent": 0.9,
        "adapt_to_cfg": True,
    }
    for name, number in changes.items():
        extension.set_field(node, name, number)
        extension.wait_preset("modified")
        extension.set_field(node, name, presets["paper"][name])
        extension.wait_preset("paper")
    prompt = extension.page.prompt()
    (inputs,) = (entry["inputs"] for entry in prompt.values() if entry["class_type"] == node)
    assert not {"gag_panel", "gag_presets"} & set(inputs)


def test_the_list_of_presets_is_on_top_and_leaves_no_gap_among_the_saved_values(extension: Extension) -> None:
    node = "GAGuidanceAdvanced"
    extension.open(advanced=True)
    extension.wait_preset("auto")
    extension.choose("paper")
    extension.set_field(node, "blocks", "u")
    extension.panel(node)
    above = extension.page.evaluate(
        """type => {
        const list = gagPresets(type).getBoundingClientRect(), foot = gagPanel(type).getBoundingClientRect();
        const shown = gagPanel(type).closest(".lg-node");
        if (!shown) {
            const [first, ...others] = gagNode(type).widgets;
            return first.element === gagPresets(type) && others.every(one => one.y > first.y) && list.bottom < foot.top;
        }
        return [...shown.querySelectorAll(".lg-node-widget")].every(row => row.contains(gagPresets(type))
            || row.getBoundingClientRect().top >= list.bottom - 1);
    }""",
        node,
    )
    assert above
    fields = extension.page.evaluate(
        """type => gagNode(type).widgets
        .filter(widget => widget.serialize !== false).map(widget => [widget.name, widget.value])""",
        node,
    )
    saved = extension.page.evaluate("() => window.app.graph.serialize()")
    (values,) = (one["widgets_values"] for one in saved["nodes"] if one["type"] == node)
    assert values[: len(fields)] == [value for _, value in fields]
    extension.page.load(json.loads(json.dumps(saved)))
    extension.page.evaluate(HELPERS)
    for name, value in fields:
        assert extension.field(node, name) == value, name
    extension.wait_preset("paper")


def test_a_preset_is_one_step_for_undo(extension: Extension) -> None:
    node = "GAGuidanceAdvanced"
    undo = "() => window.app.extensionManager.workflow.activeWorkflow.changeTracker.undo()"
    extension.open(advanced=True)
    extension.wait_preset("auto")
    extension.click(node, "chart")  # makes the front end note the values of the fields
    extension.choose("paper")
    extension.wait_preset("paper")
    time.sleep(0.5)
    extension.page.evaluate(undo)
    extension.wait_preset("auto")
    assert extension.field(node, "norm_mode") == "relative"
    assert extension.field(node, "adapt_to_cfg") is True
    extension.wait_fit(node)
    extension.choose("paper")
    extension.wait_preset("paper")


def test_each_node_gets_its_own_messages(extension: Extension) -> None:
    extension.open()
    extension.page.evaluate("""() => {
        const first = window.LiteGraph.createNode("GAGuidanceAdvanced");
        first.pos = [400, -3000];
        window.app.graph.add(first);
        gagNode("GAGDemoLoader").connect(0, first, 0);
        first.connect(0, gagNode("GAGuidance"), 0);
    }""")
    extension.click("GAGuidanceAdvanced", "chart")
    extension.run()
    extension.wait_guided("GAGuidance")
    extension.wait_status("GAGuidanceAdvanced", "Nothing guided: a later GAG node acts.")
    rows = extension.page.evaluate("() => gagSeen['gag.chart'].flatMap(data => Object.values(data.points).flat())")
    assert rows == [], "the node whose chart is open does nothing in this run"
    extension.wait_text("GAGuidanceAdvanced", ".gag-chart .gag-note", "Nothing was guided in the last run.")
    extension.click("GAGuidance", "chart")
    extension.run()
    assert extension.count("gag.chart") >= 1
    points = "type => gagPanel(type).querySelector('polyline').getAttribute('points')"
    extension.page.wait(f"type => ({points})(type) !== ''", "GAGuidance")
    assert extension.page.evaluate(points, "GAGuidanceAdvanced") == ""


def test_a_copy_has_a_panel_of_its_own(extension: Extension) -> None:
    extension.open(advanced=True)
    extension.set_field("GAGuidanceAdvanced", "guidance_scale", 3.0)
    extension.click("GAGuidanceAdvanced", "chart")
    states = extension.page.evaluate("""async () => {
        const { canvas, graph } = window.app;
        canvas.selectItems?.([gagNode("GAGuidanceAdvanced")]);
        canvas.copyToClipboard([gagNode("GAGuidanceAdvanced")]);
        canvas.pasteFromClipboard();
        await new Promise(resolve => setTimeout(resolve, 1000));
        return graph.nodes.filter(node => node.type === "GAGuidanceAdvanced").map(node => [
            node.widgets.filter(widget => widget.name === "gag_panel").length,
            node.widgets.find(widget => widget.name === "guidance_scale").value,
            node.widgets.find(widget => widget.name === "gag_panel").element
                .querySelector("button").getAttribute("aria-expanded"),
        ]);
    }""")
    assert states == [[1, 3.0, "true"]] * 2


def test_a_node_in_a_subgraph(extension: Extension) -> None:
    extension.open()
    extension.page.evaluate("() => { window.app.graph.convertToSubgraph(new Set([gagNode('GAGuidance')])); }")
    assert extension.page.evaluate("() => !window.app.graph.nodes.includes(gagNode('GAGuidance'))")
    extension.page.evaluate("() => window.app.canvas.setGraph(gagNode('GAGuidance').graph)")
    extension.click("GAGuidance", "chart")
    extension.page.evaluate("() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph.rootGraph)")
    extension.run()
    extension.wait_guided("GAGuidance")
    assert extension.count("gag.chart") >= 1


def test_line_and_chart_survive_undo(extension: Extension) -> None:
    """Undo makes all nodes anew."""
    extension.open()
    extension.click("GAGuidance", "chart")
    extension.run()
    extension.wait_guided("GAGuidance")
    extension.page.evaluate("async () => { await window.app.loadGraphData(window.app.graph.serialize()); }")
    extension.wait_guided("GAGuidance")
    extension.wait_fit("GAGuidance")
    count = extension.count("gag.chart")
    extension.run()
    assert extension.count("gag.chart") > count
    assert extension.page.evaluate("() => document.querySelectorAll('.gag-panel').length") == 1


def test_another_workflow_is_opened_while_one_runs(extension: Extension) -> None:
    """The other workflow has nodes of the same ids, and one of them has an open chart."""
    extension.open()
    extension.click("GAGuidance", "chart")
    first = extension.page.evaluate("() => window.app.graph.serialize()")
    second = {**first, "id": str(uuid.uuid4())}
    extension.open(workflow=first)
    extension.set_field("KSampler", "steps", 60)
    extension.queue()
    extension.wait_count("gag.chart", 1)
    extension.page.load(second)
    count = extension.quiet()
    extension.wait_count("execution_success", 1)
    assert extension.count("gag.chart") == count
    extension.wait_status("GAGuidance", "")
    assert (
        extension.page.evaluate("() => gagPanel('GAGuidance').querySelector('polyline').getAttribute('points')") == ""
    )
    extension.page.load(first)
    extension.wait_guided("GAGuidance")


def test_a_node_is_removed_in_the_middle_of_a_run(extension: Extension) -> None:
    extension.open()
    extension.set_field("KSampler", "steps", 60)
    extension.click("GAGuidance", "chart")
    extension.queue()
    extension.wait_count("gag.chart", 1)
    extension.page.evaluate("() => window.app.graph.remove(gagNode('GAGuidance'))")
    count = extension.quiet()
    extension.wait_count("execution_success", 1)
    assert extension.count("gag.chart") == count, "no chart is open any more"
    assert extension.page.evaluate("() => document.querySelectorAll('.gag-panel').length") == 0


def test_the_wheel_zooms_over_a_panel_as_beside_it(extension: Extension) -> None:
    extension.open()
    box = extension.panel("GAGuidance").bounding_box()
    extension.page.page.mouse.move(box["x"] + 20, box["y"] + box["height"] / 2)
    extension.page.page.mouse.wheel(0, -120)
    extension.page.wait("() => window.app.canvas.ds.scale > 1.01")
    assert extension.page.evaluate("() => window.app.canvas.ds.scale") < 1.3, "once, not twice"


CONTRAST = """type => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const plain = colour => {
        const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data];
    };
    const node = () => plain(gagNode(type).bgcolor ?? window.LiteGraph.NODE_DEFAULT_BGCOLOR);
    const behind = element => {
        for (let at = element; at; at = at.parentElement) {
            if (at.classList.contains("dom-widget")) return node();
            const colour = plain(getComputedStyle(at).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return node();
    };
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const panels = [gagPanel(type), ...(type === "GAGuidanceAdvanced" ? [gagPresets(type)] : [])];
    return panels.flatMap(panel => [...panel.querySelectorAll("span, button, select, polyline")]).map(part => {
        const [a, b] = [light(plain(getComputedStyle(part).color)), light(behind(part))];
        return [part.textContent || part.getAttribute("class"), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
}"""


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_everything_can_be_read(theme: str, extension: Extension, server: ComfyServer) -> None:
    node = "GAGuidanceAdvanced"
    server.settings({"Comfy.ColorPalette": theme})
    extension.page.go_to(server)
    try:
        extension.open(advanced=True)
        extension.click(node, "chart")
        extension.click(node, "blocks")
        extension.run()
        extension.wait_guided(node)
        contrasts = extension.page.evaluate(CONTRAST, node)
    finally:
        server.settings({"Comfy.ColorPalette": "dark"})
        extension.page.go_to(server)
    assert len(contrasts) > 12
    # The guidelines for accessible web content ask for a contrast of 3 for graphics and large controls, 4.5 for text.
    assert [part for part in contrasts if part[1] < 3.0] == []


def test_another_tab_gets_nothing_of_a_run(extension: Extension, server: ComfyServer) -> None:
    extension.open()
    with extension.page.beside(server) as second:
        other = Extension(second)
        other.open()
        other.click("GAGuidance", "chart")
        extension.run()
        assert extension.count("gag.chart") == 0
        assert other.count("gag.chart") == other.count("gag.status") == other.count("progress_text") == 0
        assert extension.count("gag.status") == 1
        assert extension.count("progress_text") == 0, "the line says it"
        # A run of the tab with the open chart is measured.
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
    # The value of a node without widgets may be missing or an empty list.
    written, saved = (
        {node["id"]: node.get("widgets_values") or [] for node in nodes if node["type"].startswith("GAG")}
        for nodes in (workflow["nodes"], ours["workflow"]["nodes"])
    )
    assert written == saved
    with_it, without_it = (
        [(node["type"], node["inputs"], node.get("widgets_values")) for node in graph["workflow"]["nodes"]]
        for graph in graphs
    )
    assert with_it == without_it
    assert page.evaluate("() => document.querySelectorAll('.gag-panel').length") >= 1
    assert plain.evaluate("() => document.querySelectorAll('.gag-panel').length") == 0


@pytest.fixture(scope="module")
def plain(page: FrontEnd, server: ComfyServer) -> Iterator[FrontEnd]:
    """A tab without the extension."""
    with page.beside(server, without="/gag.js") as opened:
        yield opened


def test_the_picker_reads_texts_as_the_server_does(page: FrontEnd) -> None:
    # The import needs another thread, because the browser's event loop runs in this one.
    with ThreadPoolExecutor(1) as thread:
        host: Any = thread.submit(importlib.import_module, "host_process").result()
    blocks = host.pack_module("nodes.patching.block_syntax")
    layer = host.pack_module("nodes.patching.families").Layer
    models = [
        {"d": [1, 1, 2], "m": [10], "u": [2, 2, 1]},
        {"double": [1] * 19, "single": [1] * 38},
        {"block": [1] * 30},
    ]
    terms = ["d", "d0", "d0-1", "m", "m0.3", "u1.0-1", "u2.1", "double", "double 3-5", "single 37", "single0-40", "7"]
    terms += ["19-21", "block 2", "block2-1", "0-29", "x", "", " U0 ", "d2.", ".1", "d.0", "3 - 5", "1.0", "d-1"]
    terms.append("constructor")  # every object in JavaScript has a property of this name
    texts = [*terms, *(f"{a},{b}" for a in terms for b in terms)]
    script = """async ([models, texts]) => {
        const files = await (await fetch("/extensions")).json();
        const { parseBlocks, formatBlocks } = await import(files.find(file => file.endsWith("/blocks.js")));
        return models.map(parts => texts.map(text => {
            const chosen = parseBlocks(text, parts);
            return [chosen, chosen && formatBlocks(chosen)];
        }));
    }"""
    read = 0
    for parts, found in zip(models, page.evaluate(script, [models, texts]), strict=True):
        known = {
            name: [[layer(name, block, inner) for inner in range(count)] for block, count in enumerate(part)]
            for name, part in parts.items()
        }
        for text, (chosen, written) in zip(texts, found, strict=True):
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
            assert blocks.parse_blocks(written, known) == wanted, f"{text} is written as {written}"
    assert read > 150


def test_the_server_goes_and_comes_back(page: FrontEnd, tmp_path: Path) -> None:
    node = "GAGuidanceAdvanced"
    with ComfyServer(tmp_path, cpu=True) as lost, page.beside(lost) as opened:
        extension = Extension(opened)
        extension.open(advanced=True)
        extension.click(node, "chart")
        lost.__exit__(None, None, None)
        opened.wait(CLOSED)
        opened.errors.clear()
        for button in ("chart", "chart", "blocks", "blocks"):
            extension.click(node, button)
        assert opened.errors == []
        assert extension.errors == []
        lost.__enter__()
        opened.wait(f"() => !({CLOSED})()")
        time.sleep(1)  # time for the message about the open chart
        extension.run()
        assert extension.count("gag.chart") >= 1
        extension.wait_guided(node)


def test_a_picture_brings_its_workflow_back(page: FrontEnd, server: ComfyServer) -> None:
    """The picture is saved by a run and dropped onto the page, as a user does."""
    extension = Extension(page)
    extension.open(advanced=True)
    extension.set_field("GAGuidanceAdvanced", "guidance_scale", 3.25)
    extension.set_field("GAGuidanceAdvanced", "blocks", "m,u")
    queued = page.prompt()
    page.evaluate("""() => {
        window.gagPictures = [];
        gagApi.addEventListener("executed", ({ detail }) => window.gagPictures.push(...detail.output.images ?? []));
    }""")
    extension.run()
    page.wait("() => window.gagPictures.some(picture => picture.filename.startsWith('GAG_demo_with_'))")
    state = "() => window.app.graph.serialize().nodes.map(node => [node.id, node.type, node.widgets_values])"
    before = page.evaluate(state)
    page.evaluate("() => { window.app.graph.clear(); }")
    page.evaluate("""async () => {
        // The pictures without GAG may be those of an earlier run, with its workflow.
        const picture = window.gagPictures.find(picture => picture.filename.startsWith("GAG_demo_with_"));
        const data = await (await fetch("/view?" + new URLSearchParams(picture))).blob();
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([data], picture.filename, { type: "image/png" }));
        const place = { bubbles: true, cancelable: true, clientX: 600, clientY: 400, dataTransfer };
        for (const kind of ["dragenter", "dragover", "drop"]) {
            document.getElementById("graph-canvas").dispatchEvent(new DragEvent(kind, place));
        }
    }""")
    page.wait("count => window.app.graph.nodes.length === count", len(before))
    after = sorted(page.evaluate(state))
    # Some front ends save the text that a run wrote on a node (and a gap for the panel before it). No field gets it.
    kept = [
        [node_id, kind, (values or [])[: len(got or [])]]
        for (node_id, kind, values), (_, _, got) in zip(sorted(before), after, strict=True)
    ]
    assert [[node_id, kind, got or []] for node_id, kind, got in after] == kept
    assert next(got for _, kind, got in after if kind == "GAGuidanceAdvanced")[9] == "m,u"
    restored = page.prompt()
    seeds = {node: entry["inputs"].pop("seed", None) for node, entry in restored.items()}
    assert any(seeds.values())
    for entry in queued.values():
        entry["inputs"].pop("seed", None)  # the run changed it
    assert restored == queued
    page.wait("() => Boolean(gagNode('GAGuidanceAdvanced'))")
    extension.panel("GAGuidanceAdvanced")


def test_panels_speak_the_users_language(page: FrontEnd, server: ComfyServer) -> None:
    wanted = json.loads((ROOT / "locales" / "ja" / "main.json").read_text(encoding="utf-8"))["gag"]
    server.settings({"Comfy.Locale": "ja"})
    try:
        with page.beside(server) as opened:
            extension = Extension(opened)
            extension.open(advanced=True)
            extension.wait_text("GAGuidanceAdvanced", "button", wanted["chart"])
            extension.set_field("GAGuidanceAdvanced", "guidance_scale", 3.3)
            extension.wait_preset(wanted["modified"])
            assert opened.errors == []
    finally:
        server.settings({"Comfy.Locale": "en"})
