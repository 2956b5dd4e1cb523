# SPDX-License-Identifier: GPL-3.0-or-later
"""What a real server tells a browser tab of its guidance nodes, and that it does nothing for a chart nobody opened."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

import texts
from comfy_server import FINAL, ComfyServer, Json

_seeds = itertools.count(int(time.time()))
STEPS = 6
NODE = "5"
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def graph(seed: int, **inputs: Any) -> Json:
    guidance = {"model": ["1", 0], "preset": "paper", "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    sampler = {"seed": seed, "steps": STEPS, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": [NODE, 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "GAGDemoLoader", "inputs": {}},
        "2": {"class_type": "GAGDemoPrompt", "inputs": {"text_encoder": ["1", 1], "text": "a red circle"}},
        "3": {"class_type": "GAGDemoPrompt", "inputs": {"text_encoder": ["1", 1], "text": ""}},
        "4": {"class_type": "GAGDemoEmptyLatent", "inputs": {"batch_size": 1}},
        NODE: {"class_type": "GAGuidance", "inputs": {**guidance, **inputs}},
        "6": {"class_type": "KSampler", "inputs": {**links, **sampler}},
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "live"}},
    }


def post(server: ComfyServer, body: Any) -> int:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + "/gag/listen", data, {"Content-Type": "application/json"})
    try:
        with _open(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def run(
    server: ComfyServer,
    prompt: Json,
    before: Callable[[str], None] = lambda client: None,
    after: Callable[[str, Any], None] = lambda kind, data: None,
    workflow: Json | None = None,
) -> list[tuple[str, Any]]:
    """The messages of a run to the tab that queued it; ``before`` is called with that tab's id once it is connected."""

    async def go() -> list[tuple[str, Any]]:
        client = uuid.uuid4().hex
        messages: list[tuple[str, Any]] = []
        address = f"{server.url}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as connection:
            await connection.receive()
            before(client)
            prompt_id = await asyncio.to_thread(server.queue, prompt, workflow, client)
            async for raw in connection:
                if raw.type is not aiohttp.WSMsgType.TEXT:
                    continue
                message = json.loads(raw.data)
                messages.append((message["type"], message.get("data", {})))
                after(*messages[-1])
                if message["type"] in FINAL and message["data"]["prompt_id"] == prompt_id:
                    assert message["type"] == "execution_success"
                    break
        return messages

    return asyncio.run(asyncio.wait_for(go(), 120))


def of(messages: list[tuple[str, Any]], kind: str) -> list[Any]:
    return [data for name, data in messages if name == kind]


def pictures(server: ComfyServer, messages: list[tuple[str, Any]]) -> bytes:
    (output,) = (data["output"] for data in of(messages, "executed") if "images" in (data["output"] or {}))
    (image,) = output["images"]
    address = f"/view?filename={image['filename']}&type={image['type']}&subfolder={image['subfolder']}"
    with _open(server.url + address, timeout=60) as answer:
        data: bytes = answer.read()
    return b"".join(data.split(b"IDAT")[1:])


def listen(server: ComfyServer, *nodes: str) -> Callable[[str], None]:
    def tell(client: str) -> None:
        assert post(server, {"client": client, "workflow": "", "nodes": list(nodes)}) == 204

    return tell


def test_every_step_comes_to_an_open_chart_and_the_picture_is_the_same(server: ComfyServer) -> None:
    seed = next(_seeds)
    watched = run(server, graph(seed), listen(server, NODE, "99"))
    points: dict[int, list[float]] = {}
    for message in of(watched, "gag.chart"):
        assert set(message) == {"workflow", "run", "steps", "points"}
        assert message["steps"] == STEPS
        for step, *values in message["points"][NODE]:
            points[step] = values
    assert sorted(points) == list(range(STEPS))
    for gain, parallel, capped in points.values():
        assert gain > 0.0
        assert 0.0 <= parallel <= 1.0
        assert 0.0 <= capped <= 1.0
    run(server, graph(next(_seeds)))  # or the server would hand out the picture that it remembers
    unwatched = run(server, graph(seed))
    assert of(unwatched, "gag.chart") == []
    assert pictures(server, unwatched) == pictures(server, watched)


@pytest.mark.parametrize("nodes", [(), ("6",), ("55",)], ids=["none", "another node", "an id that begins alike"])
def test_nothing_comes_that_nobody_listens_to(server: ComfyServer, nodes: tuple[str, ...]) -> None:
    assert of(run(server, graph(next(_seeds)), listen(server, *nodes)), "gag.chart") == []


def test_a_closed_chart_ends_it(server: ComfyServer) -> None:
    def open_and_close(client: str) -> None:
        listen(server, NODE)(client)
        listen(server)(client)

    assert of(run(server, graph(next(_seeds)), open_and_close), "gag.chart") == []


def test_a_tab_that_is_gone_or_never_was_does_not_listen(server: ComfyServer) -> None:
    gone: list[str] = []

    def open_chart(client: str) -> None:
        listen(server, NODE)(client)
        gone.append(client)

    assert of(run(server, graph(next(_seeds)), open_chart), "gag.chart")
    # Its connection is closed by now.
    for client in (gone[0], "nobody"):
        assert post(server, {"client": client, "workflow": "", "nodes": [NODE]}) == 409


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[", [], {}, None, {"client": "a"}, {"client": "a", "nodes": []}),
        *({"client": client, "workflow": workflow, "nodes": []} for client, workflow in ((1, ""), ("a", None))),
        *({"client": "a", "workflow": "", "nodes": nodes} for nodes in ("5", [5], None, ["5"] * 1001)),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(server: ComfyServer, body: Any) -> None:
    assert post(server, body) == 400


@pytest.mark.parametrize(
    ("inputs", "why"),
    [({}, ""), ({"strength": 0.0}, "why_off"), ({"start_percent": 1.0}, "why_range")],
)
def test_the_tab_is_told_what_became_of_a_node(server: ComfyServer, inputs: Json, why: str) -> None:
    workflow = {"id": uuid.uuid4().hex}
    messages = run(server, graph(next(_seeds), **inputs), workflow=workflow)
    (report,) = of(messages, "gag.report")
    (model,) = of(messages, "gag.blocks")
    assert report["node"] == model["node"] == NODE
    assert report["workflow"] == model["workflow"] == workflow["id"]
    default = [layer for part in model["default"].values() for block in part for layer in block]
    assert 0 < sum(default) < len(default) == sum(map(sum, model["parts"].values()))
    assert (report["guided"], report["of"], report["why"]) == (0 if why else sum(default), len(default), why)
    if why:  # the words that the badge translates are those of the sentence
        assert texts.panel_texts()[why].format(**report) in report["text"]


def test_the_blocks_are_told_and_remembered_by_workflow(server: ComfyServer) -> None:
    workflow = {"id": uuid.uuid4().hex}
    seed = next(_seeds)
    # Another strength, or the node would not be run again.
    strength = 0.5 + seed % 1000 / 1e4
    (told,) = of(run(server, graph(seed, strength=strength), workflow=workflow), "gag.blocks")
    assert told.pop("workflow") == workflow["id"]
    assert told.pop("node") == NODE
    assert list(told["parts"]) == list(told["default"]) == ["d", "m", "u"]
    for part, blocks in told["default"].items():
        assert [len(block) for block in blocks] == told["parts"][part]
        assert all(layer == (part != "m") for block in blocks for layer in block), "a UNet's default"

    def known(name: str) -> Any:
        with _open(f"{server.url}/gag/blocks?workflow={name}") as answer:
            return json.loads(answer.read())

    assert known(workflow["id"]) == {NODE: told}
    assert known("other") == {}
    # In another workflow the host takes over what the node made, and they are told all the same.
    other = {"id": uuid.uuid4().hex}
    (again,) = of(run(server, graph(next(_seeds), strength=strength), workflow=other), "gag.blocks")
    assert again == {"workflow": other["id"], "node": NODE, **told}
    assert known(other["id"]) == {NODE: told}


def test_the_presets_are_those_of_the_node(server: ComfyServer) -> None:
    with _open(f"{server.url}/gag/presets") as answer:
        presets: Json = json.loads(answer.read())
    info = server.object_info()
    options = info["GAGuidance"]["input"]["required"]["preset"]
    names = options[1]["options"] if options[0] == "COMBO" else options[0]
    assert list(presets) == names
    required = info["GAGuidanceAdvanced"]["input"]["required"]
    apart = {"model", "strength", "apply_to", "blocks", "start_percent", "end_percent", "verbose"}
    for settings in presets.values():
        assert set(required) - apart <= set(settings), "every other field is filled by a preset"
        assert "strength" not in settings


def test_no_more_than_a_few_messages_a_second(server: ComfyServer) -> None:
    prompt = graph(next(_seeds))
    prompt["6"]["inputs"]["steps"] = 150
    times: list[float] = []

    def note(kind: str, data: Any) -> None:
        if kind == "gag.chart":
            times.append(time.monotonic())

    messages = run(server, prompt, listen(server, NODE), note)
    steps = {point[0] for message in of(messages, "gag.chart") for point in message["points"][NODE]}
    assert steps == set(range(150))
    # One at the beginning, one at the end, and four a second between them.
    assert 2 <= len(times) <= 2 + 4 * (times[-1] - times[0] + 0.5)
