# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that nothing in a stranger's workflow becomes script or markup in the page, in the real front end.

Each kind of text that the pack repeats to the user carries markup with a script. A test fails if the script runs, or if
the page has an element that was made of the markup.
"""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from comfy_server import Json
from extension import HELPERS, Extension

ROOT = Path(__file__).resolve().parents[2]
PROBE: Json = json.loads((ROOT / "workflows" / "gag_12_probe.json").read_text(encoding="utf-8"))
IMAGE = "<img src=x onerror=window.__pwned=1>"
LINK = "[[x|javascript:window.__pwned=1]]"
MARKUP = IMAGE + LINK
FOUND = """() => {
    const roots = [document], made = [];
    for (const root of roots) {
        for (const element of root.querySelectorAll("*")) {
            if (element.shadowRoot) roots.push(element.shadowRoot);
            if (element.matches('[onerror], img[src="x"], a[href^="javascript"]')) made.push(element.outerHTML);
        }
    }
    return { ran: window.__pwned ?? null, made };
}"""
SET = """([type, name, value]) => {
    const node = gagNode(type), slot = node.findInputSlot(name);
    if (slot >= 0 && node.inputs[slot].link != null) node.disconnectInput(slot);
    gagField(type, name).value = value;
}"""
ADD = """([type, inputs]) => {
    const node = window.LiteGraph.createNode(type);
    window.app.graph.add(node);
    for (const [source, output, input] of inputs) gagNode(source).connect(output, node, input);
}"""
# Errors are in a dialog, or in a notice with a panel at the side: the button that unfolds all, where the text then is,
# and the button that closes the panel.
DIALOG = ".p-dialog"
UNFOLD = f"[data-testid=error-overlay-see-errors], {DIALOG} button:has-text('report')"
DETAILS = f"[data-testid=properties-panel], {DIALOG}"
CLOSE = '[data-testid=properties-panel] button[aria-label="Toggle properties panel"]'
SHOWN = """([places, text]) => [...document.querySelectorAll(places)].some(
    place => place.checkVisibility() && place.innerText.includes(text),
)"""
# Place a node of another type between the loader and the node GAG.
BETWEEN = """type => {
    const node = window.LiteGraph.createNode(type);
    window.app.graph.add(node);
    gagNode("GAGDemoLoader").connect(0, node, 0);
    node.connect(0, gagNode("GAGuidance"), 0);
}"""


def assert_nothing_ran(extension: Extension) -> None:
    """Look at the page twice: a picture that cannot be loaded reports its error later."""
    for _ in range(2):
        assert extension.page.evaluate(FOUND) == {"ran": None, "made": []}
        time.sleep(0.5)


def fill(extension: Extension, node: str, **values: Any) -> None:
    """Set fields of a node, also those whose value comes from another node."""
    for name, value in values.items():
        extension.page.evaluate(SET, [node, name, value])


def run_with_error(extension: Extension) -> str:
    """Run until the error, look at everything that the page says about it, and return the message."""
    before = extension.count("execution_error")
    extension.queue()
    extension.wait_count("execution_error", before + 1)
    message: str = extension.page.evaluate("() => gagSeen.execution_error.at(-1).exception_message")
    look_at_error(extension)
    return message


def look_at_error(extension: Extension) -> None:
    """Unfold what the page says about the error, see the markup there as text, and close it."""
    page = extension.page.page
    page.locator(UNFOLD).first.click(timeout=20_000)
    extension.page.wait(SHOWN, [DETAILS, IMAGE[:10]])
    assert_nothing_ran(extension)
    page.keyboard.press("Escape")
    for button in page.query_selector_all(CLOSE):
        button.click()
    extension.page.wait(f"() => ![...document.querySelectorAll('{DETAILS}')].some(shown => shown.innerText)")


def test_words_of_the_prompt_and_the_name_of_the_file(extension: Extension) -> None:
    """GAG Report shows its summary, which quotes words that the model did not read, and the path of its file."""
    extension.open(workflow={**PROBE, "id": str(uuid.uuid4())})
    extension.set_field("KSampler", "steps", 2)
    fill(extension, "GAGProbe", words=f"red, {MARKUP}", prompt=f"a red circle {'and ' * 80}{MARKUP}")
    fill(extension, "GAGReport", filename_prefix=f"report{MARKUP}")
    extension.page.evaluate(ADD, ["PreviewAny", [["GAGReport", 1, 0]]])
    extension.run()
    (text,) = (
        seen["text"]
        for seen in extension.page.evaluate("() => gagSeen['gag.status']")
        if "All numbers:" in seen["text"]
    )
    assert text.count("onerror") == 2, "the summary and the path quote the markup"
    extension.page.wait("() => document.body.textContent.includes('All numbers:')")
    assert extension.page.evaluate("() => window.__pwned ?? null") is None
    # ComfyUI's own node with the summary makes what it likes of it, but no script.
    extension.page.evaluate("() => window.app.graph.remove(gagNode('PreviewAny'))")
    assert_nothing_ran(extension)


ERRORS = {
    "blocks": ("GAGuidanceAdvanced", {"blocks": MARKUP}),
    "words": ("GAGProbe", {"words": MARKUP, "prompt": "a red circle"}),
    "text": ("CLIPTextEncode", {"text": MARKUP}),
    "values": ("GAGSweep", {"field": "guidance_scale", "values": MARKUP}),
    "labels": ("GAGSweep", {"field": "blocks", "values": f"d; {MARKUP}"}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_that_quote_an_input(case: str, extension: Extension) -> None:
    node, values = ERRORS[case]
    workflow = PROBE if node == "GAGProbe" else None
    extension.open(advanced=node == "GAGuidanceAdvanced", workflow=workflow and {**workflow, "id": str(uuid.uuid4())})
    if node == "GAGSweep":
        extension.page.evaluate(BETWEEN, node)
    fill(extension, node, **values)
    assert "<img" in run_with_error(extension), "the message quotes the input"
    assert_nothing_ran(extension)


def test_the_class_of_a_model(extension: Extension) -> None:
    extension.open()
    extension.page.evaluate(BETWEEN, "StrangerModel")
    assert "<img" in run_with_error(extension), "the message quotes the class"
    assert_nothing_ran(extension)


def test_a_preset_that_is_none_of_the_options(extension: Extension) -> None:
    extension.open()
    extension.set_field("GAGuidance", "preset", MARKUP)
    assert "<img" in run_with_error(extension), "the message quotes the preset"
    assert_nothing_ran(extension)


def test_inputs_that_the_host_refuses(extension: Extension) -> None:
    """ComfyUI quotes a text in the place of a number. Older front ends only mark the node."""
    extension.open()
    fill(extension, "GAGuidance", strength=MARKUP)
    extension.queue()
    extension.page.wait("() => JSON.stringify(window.app.lastNodeErrors ?? '').includes('<img')")
    time.sleep(1)
    notice = extension.page.page.query_selector("[data-testid=error-overlay]")
    assert notice is None or IMAGE in notice.inner_text(), "the notice quotes the text"
    assert_nothing_ran(extension)


def test_titles_and_ids_of_a_workflow(extension: Extension) -> None:
    """The workflow's id, and the ids and titles of its nodes; with the line's tooltip, the chart and the picker."""
    extension.open(advanced=True)
    workflow = extension.page.evaluate("() => window.app.graph.serialize()")
    # Where Vue draws, newer front ends show no widget if the workflow's or the node's id has a colon, as the link has.
    workflow["id"] = IMAGE
    ids = {node["id"]: f"{node['id']}\"']{IMAGE}" for node in workflow["nodes"] if node["type"].startswith("GAG")}
    for node in workflow["nodes"]:
        node["title"] = MARKUP
        node["id"] = ids.get(node["id"], node["id"])
    for link in workflow["links"]:
        link[1], link[3] = ids.get(link[1], link[1]), ids.get(link[3], link[3])
    extension.page.load(workflow)
    extension.page.evaluate(HELPERS)
    for button in ("chart", "blocks"):
        extension.click("GAGuidanceAdvanced", button)
    extension.run()
    extension.wait_guided("GAGuidanceAdvanced")
    extension.panel("GAGuidanceAdvanced").query_selector(".gag-status").hover()
    time.sleep(1)
    assert extension.count("gag.chart") >= 1
    assert_nothing_ran(extension)
    # Undo and another tab's workflow make the nodes anew, and their panels are looked up by the node's id.
    extension.page.evaluate("async () => { await window.app.loadGraphData(window.app.graph.serialize()); }")
    extension.wait_guided("GAGuidanceAdvanced")
    assert_nothing_ran(extension)
