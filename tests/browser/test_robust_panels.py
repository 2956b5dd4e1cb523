# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that panels go on working, with no error in the console, whatever messages, answers and workflows come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from comfy_server import ComfyServer, Json
from extension import Extension

NODE = "GAGuidanceAdvanced"
MARKUP = "<img src=x onerror=window.__pwned=1>"
NAMES = ["constructor", "__proto__", "toString", "hasOwnProperty", MARKUP]
SEND = """([kind, contents]) => {
    for (const content of contents) gagApi.dispatchEvent(new CustomEvent(kind, { detail: JSON.parse(content) }));
}"""
COUNT = """([selector, count]) => [gagPanel, gagPresets].map(part => part("GAGuidanceAdvanced"))
    .flatMap(part => [...part.querySelectorAll(selector)]).length === count"""
POINTS = "() => gagPanel('GAGuidanceAdvanced').querySelector('polyline')?.getAttribute('points')"


def node_id(extension: Extension) -> str:
    return str(extension.page.evaluate("type => String(gagNode(type).id)", NODE))


def send(extension: Extension, kind: str, *contents: str) -> None:
    """Give the page messages as if they came from the server, from their JSON."""
    extension.page.evaluate(SEND, [kind, contents])


@contextmanager
def answers(extension: Extension, server: ComfyServer, **bodies: str) -> Iterator[None]:
    """Load the page again, with other answers of the server's routes under /gag/."""
    page = extension.page.page
    for route, body in bodies.items():
        page.route(f"**/gag/{route}", lambda route, _, body=body: route.fulfill(body=body))
    try:
        extension.page.go_to(server)
        extension.open(advanced=True)
        yield
    finally:
        for route in bodies:
            page.unroute(f"**/gag/{route}")
        extension.page.go_to(server)


def test_names_that_every_object_has(extension: Extension, server: ComfyServer) -> None:
    """Names of JavaScript's own properties do no harm as presets, parts of a model, series and reasons."""
    setup: Json = extension.page.evaluate("async () => (await fetch('/gag/setup')).json()")
    setup["presets"] = {name: {"guidance_scale": 20 + index} for index, name in enumerate(NAMES)}
    with answers(extension, server, setup=json.dumps(setup)):
        extension.page.wait(COUNT, ["option", len(NAMES) + 1])
        for index, name in enumerate(NAMES):
            extension.choose(name)
            extension.wait_preset(name)
            assert extension.field(NODE, "guidance_scale") == 20 + index
        node = node_id(extension)
        parts = {name: [1, 2] for name in NAMES}
        default = {name: [[True], [True, False]] for name in NAMES}
        send(extension, "gag.blocks", json.dumps({"node": node, "parts": parts, "default": default}))
        extension.click(NODE, "blocks")
        extension.page.wait(COUNT, [".gag-block", 2 * len(NAMES)])
        extension.press("__proto__", 1)
        assert "__proto__ 0-1" in extension.field(NODE, "blocks") or "__proto__," in extension.field(NODE, "blocks")
        for text in NAMES:
            extension.set_field(NODE, "blocks", text)
            time.sleep(0.4)  # time for the panel to draw
        extension.click(NODE, "chart")
        series = [{"name": name, "unit": name, "range": [0, 1], "colour": name} for name in NAMES]
        points = {node: [[0, *([0.5] * len(NAMES))]], "__proto__": [[0, *([0.5] * len(NAMES))]]}
        send(extension, "gag.chart", json.dumps({"run": 1, "steps": 2, "series": series, "points": points}))
        extension.page.wait(COUNT, ["polyline", len(NAMES)])
        status = {"node": node, "guided": 0, "inputs": {"model": None}}
        named = (("why_range", f"no step within {MARKUP} to 1"), ("why_other_code", f"the blocks run code of {MARKUP}"))
        for why, shown in named:
            values = {"why": why, "start": MARKUP, "end": "1", "found": MARKUP}
            send(extension, "gag.status", json.dumps({**status, "parts": [["nothing", values]], "text": "other"}))
            extension.wait_status(NODE, f"Nothing guided: {shown}.")
        for name in NAMES:  # a sentence or a reason without a text of ours: the text of the message is shown
            for part in ([name, {}], ["nothing", {"why": name}]):
                send(extension, "gag.status", json.dumps({**status, "parts": [part], "text": f"{MARKUP} {name}"}))
                extension.wait_status(NODE, f"{MARKUP} {name}")
                send(extension, "gag.status", json.dumps({**status, "parts": [], "text": ""}))
        assert extension.page.evaluate("() => [window.__pwned ?? null, document.querySelector('[onerror]')]") == [
            None,
            None,
        ]


def messages(node: str) -> dict[str, Json]:
    """Return a message of each kind, as the server sends it."""
    series = [{"name": "gain", "unit": "%", "range": [0.0, None], "colour": "red"}]
    return {
        "gag.token": {"token": "0"},
        "gag.status": {
            "node": node,
            "parts": [["guided", {"guided": 3, "of": 3, "calls": 1, "all": 2}]],
            "text": "",
            "guided": 3,
            "inputs": {"strength": 1},
        },
        "gag.blocks": {"node": node, "parts": {"d": [1]}, "default": {"d": [[True]]}},
        "gag.chart": {"run": 1, "steps": 3, "series": series, "points": {node: [[0, 0.5], [1, 0.25]]}},
    }


WRONG: list[Any] = [None, True, -1, 0.5, 1e308, 2**53, "", MARKUP, [], [None], [[]], [[1e308]], {}, {"": None}]
WRONG += [{"constructor": 1}, {"toString": 1, "valueOf": 1}, [True] * 5000]


def damaged(value: Any) -> Iterator[Any]:
    """Yield a JSON value with one part of it, at any depth, left out or replaced."""
    yield from WRONG
    if not isinstance(value, (dict, list)):
        return
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        rest: Any = value.copy()
        del rest[key]
        yield rest
        for other in damaged(value[key]):
            changed: Any = value.copy()
            changed[key] = other
            yield changed


def test_messages_that_no_server_of_ours_sends(extension: Extension) -> None:
    """Fields that are missing, of wrong types, or huge; for nodes and workflows that are there or not."""
    extension.open(advanced=True)
    for button in ("chart", "blocks"):
        extension.click(NODE, button)
    good = messages(node_id(extension))
    for kind, message in good.items():
        contents = [json.dumps(content) for content in damaged(message)]
        contents += [json.dumps({**message, "workflow": other}) for other in WRONG]
        for first in range(0, len(contents), 10):
            send(extension, kind, *contents[first : first + 10])
            time.sleep(0.3)  # time for the panels to draw
    for kind, message in good.items():
        send(extension, kind, json.dumps(message))
    extension.wait_text(NODE, ".gag-status", "Guided 3 of 3 attentions in 1 of 2 calls.")
    extension.page.wait(COUNT, [".gag-block", 1])
    extension.page.evaluate("""async () => {
        await fetch("/gag/token", { method: "POST", body: JSON.stringify({ client: gagApi.clientId }) });
        await new Promise(resolve => setTimeout(resolve, 1000));
    }""")
    extension.run()
    extension.wait_guided(NODE)
    assert extension.count("gag.chart") >= 1


def test_huge_numbers_in_a_chart(extension: Extension) -> None:
    extension.open(advanced=True)
    extension.click(NODE, "chart")
    series = [{"name": "gain", "unit": "%", "range": [-1e308, None], "colour": "red"}]
    points = {node_id(extension): [[0, -1e308], [1, 1e308], [2**53 - 1, 5e-324]]}
    send(extension, "gag.chart", json.dumps({"run": 1, "steps": 2**53 - 1, "series": series, "points": points}))
    extension.page.wait(POINTS)
    numbers = [float(number) for point in extension.page.evaluate(POINTS).split() for number in point.split(",")]
    assert all(0 <= number <= 100 for number in numbers)


ANSWERS = ["null", "[]", "{}", '{"presets": 1, "series": 2}', '{"presets": {"a": 1}, "series": []}', "<html>"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_no_server_of_ours_gives(answer: str, extension: Extension, server: ComfyServer) -> None:
    with answers(extension, server, setup=answer, blocks=answer):
        extension.click(NODE, "blocks")
        extension.click(NODE, "chart")
        extension.wait_text(NODE, ".gag-picker", "Run once to see this model's blocks.")


# Subgraphs in which one holds the next one twice, so that the innermost is there 2^(depth - 1) times.
NESTED = """depth => {
    const id = level => `00000000-0000-4000-8000-${String(level).padStart(12, "0")}`;
    const node = (id, type) => ({ id, type, pos: [0, 0], size: [200, 100], flags: {}, order: 0, mode: 0, inputs: [],
        outputs: [], properties: {}, widgets_values: [] });
    const subgraphs = Array.from({ length: depth }, (_, level) => ({
        id: id(level), version: 1, revision: 0, config: {}, name: `${level}`, inputs: [], outputs: [], widgets: [],
        state: { lastGroupId: 0, lastNodeId: 2, lastLinkId: 0, lastRerouteId: 0 }, links: [], groups: [],
        inputNode: { id: -10, bounding: [0, 0, 100, 40] }, outputNode: { id: -20, bounding: [300, 0, 100, 40] },
        nodes: level + 1 < depth ? [node(1, id(level + 1)), node(2, id(level + 1))] : [node(1, "GAGuidance")],
    }));
    return { id: id(99), version: 0.4, last_node_id: 2, last_link_id: 0, links: [], groups: [], config: {}, extra: {},
        nodes: [node(1, id(0)), node(2, "GAGuidanceAdvanced")], definitions: { subgraphs } };
}"""


def test_a_workflow_of_a_few_kilobytes_with_thousands_of_nodes(extension: Extension) -> None:
    """The one node GAG in the file is there 2,048 times, more often than there can be charts."""
    extension.open(workflow=extension.page.evaluate(NESTED, 12))
    extension.click(NODE, "chart")
    extension.page.evaluate("() => window.app.canvas.setGraph(gagNode('GAGuidance').graph)")
    extension.click("GAGuidance", "chart")
    extension.page.wait("() => gagPanel('GAGuidance').querySelector('.gag-chart')")
    time.sleep(1)  # time for an answer of the server
