# SPDX-License-Identifier: GPL-3.0-or-later
"""Messages of a real server to a browser tab about its guidance nodes; charts that nobody opened get none.

The server answers a tab's requests only with the token that it sent over the tab's connection.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from comfy_server import FINAL, ComfyServer, Json
from generate import texts

_seeds = itertools.count(int(time.time()))
STEPS = 6
NODE = "5"
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def graph(seed: int, **inputs: Any) -> Json:
    guidance = {"model": ["1", 0], "preset": "paper", "strength": 1.0}
    sampler = {"seed": seed, "steps": STEPS, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": [NODE, 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "GAGDemoLoader", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red circle"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 256, "batch_size": 1}},
        NODE: {"class_type": "GAGuidance", "inputs": {**guidance, **inputs}},
        "6": {"class_type": "KSampler", "inputs": {**links, **sampler}},
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "live"}},
    }


class Tab:
    """A browser tab: its connection, and the token that the server sent over the connection."""

    def __init__(self, server: ComfyServer, session: aiohttp.ClientSession, connection: Any, client: str) -> None:
        self.url = server.url
        self.session = session
        self.connection = connection
        self.client = client
        self.token = ""

    async def post(self, route: str, **content: Any) -> tuple[int, str]:
        """Send a request of this tab, or of another that ``content`` names; return the status and the text."""
        body = {"client": self.client, "token": self.token, "workflow": "", **content}
        async with self.session.post(self.url + route, json=body) as answer:
            return answer.status, await answer.text()

    async def authenticate(self) -> None:
        """Get the token, as the page does: the first request has none."""
        status, _ = await self.post("/gag/listen", nodes=[])
        assert status == 409
        while True:
            message = json.loads((await asyncio.wait_for(self.connection.receive(), 20)).data)
            if message["type"] == "gag.token":
                self.token = message["data"]["token"]
                return

    async def listen(self, *nodes: str) -> None:
        """Open charts of nodes and close the others."""
        if not self.token:
            await self.authenticate()
        status, _ = await self.post("/gag/listen", nodes=list(nodes))
        assert status == 204

    async def blocks(self, workflow_id: str) -> Any:
        """Return the blocks of a workflow that this tab queued."""
        if not self.token:
            await self.authenticate()
        status, text = await self.post("/gag/blocks", workflow=workflow_id)
        assert status == 200
        return json.loads(text)


@asynccontextmanager
async def open_tab(server: ComfyServer, client: str | None = None) -> AsyncIterator[Tab]:
    client = client or uuid.uuid4().hex
    address = f"{server.url}/ws?clientId={client}"
    async with aiohttp.ClientSession() as session, session.ws_connect(address) as connection:
        await connection.receive()
        yield Tab(server, session, connection, client)


async def nothing(tab: Tab) -> None:
    """Do nothing with the tab before a run."""


def run(
    server: ComfyServer,
    prompt: Json,
    before: Callable[[Tab], Awaitable[None]] = nothing,
    after: Callable[[str, Any], None] = lambda event, data: None,
    workflow: Json | None = None,
) -> list[tuple[str, Any]]:
    """Return the messages of a run to the tab that queued it. ``before`` gets the tab once it is connected."""

    async def go() -> list[tuple[str, Any]]:
        async with open_tab(server) as tab:
            await before(tab)
            return await run_in(server, tab, prompt, after, workflow)

    return asyncio.run(asyncio.wait_for(go(), 120))


async def run_in(
    server: ComfyServer,
    tab: Tab,
    prompt: Json,
    after: Callable[[str, Any], None] = lambda event, data: None,
    workflow: Json | None = None,
) -> list[tuple[str, Any]]:
    """Return the messages of a run that the tab queues."""
    messages: list[tuple[str, Any]] = []
    prompt_id = await asyncio.to_thread(server.queue, prompt, workflow, tab.client)
    async for raw in tab.connection:
        if raw.type is not aiohttp.WSMsgType.TEXT:
            continue
        message = json.loads(raw.data)
        messages.append((message["type"], message.get("data", {})))
        after(*messages[-1])
        if message["type"] in FINAL and message["data"]["prompt_id"] == prompt_id:
            assert message["type"] == "execution_success"
            break
    return messages


def of_type(messages: list[tuple[str, Any]], message_type: str) -> list[Any]:
    return [data for name, data in messages if name == message_type]


def pictures(server: ComfyServer, messages: list[tuple[str, Any]]) -> bytes:
    (output,) = (data["output"] for data in of_type(messages, "executed") if "images" in (data["output"] or {}))
    (image,) = output["images"]
    address = f"/view?filename={image['filename']}&type={image['type']}&subfolder={image['subfolder']}"
    with _open(server.url + address, timeout=60) as answer:
        data: bytes = answer.read()
    return b"".join(data.split(b"IDAT")[1:])


def listen(*nodes: str) -> Callable[[Tab], Awaitable[None]]:
    """Return a function that opens charts of nodes in a tab and closes its others."""
    return lambda tab: tab.listen(*nodes)


def test_an_open_chart_gets_every_step_and_the_picture_does_not_change(server: ComfyServer) -> None:
    seed = next(_seeds)
    watched = run(server, graph(seed), listen(NODE, "99"))
    points: dict[int, list[float]] = {}
    for message in of_type(watched, "gag.chart"):
        assert set(message) == {"workflow", "run", "steps", "series", "points"}
        assert message["steps"] == STEPS
        for step, *values in message["points"][NODE]:
            points[step] = values
    assert sorted(points) == list(range(STEPS))
    for gain, parallel, capped in points.values():
        assert gain > 0.0
        assert 0.0 <= parallel <= 1.0
        assert 0.0 <= capped <= 1.0
    run(server, graph(next(_seeds)))  # otherwise the server would return the cached picture
    unwatched = run(server, graph(seed))
    assert of_type(unwatched, "gag.chart") == []
    assert pictures(server, unwatched) == pictures(server, watched)


@pytest.mark.parametrize("nodes", [(), ("6",), ("55",)], ids=["none", "another node", "an id with the same beginning"])
def test_nodes_without_an_open_chart_send_no_measures(server: ComfyServer, nodes: tuple[str, ...]) -> None:
    assert of_type(run(server, graph(next(_seeds)), listen(*nodes)), "gag.chart") == []


def test_a_closed_chart_gets_no_measures(server: ComfyServer) -> None:
    async def open_and_close(tab: Tab) -> None:
        await tab.listen(NODE)
        await tab.listen()

    assert of_type(run(server, graph(next(_seeds)), open_and_close), "gag.chart") == []


def test_a_tab_gets_its_token_over_its_own_connection(server: ComfyServer) -> None:
    """The page asks for it without a refusal, which the browser would write into its console."""

    async def go() -> None:
        async with open_tab(server) as tab, open_tab(server) as other:
            assert (await tab.post("/gag/token"))[0] == 204
            # Asked for by a stranger it goes to its owner all the same.
            assert (await other.post("/gag/token", client=tab.client))[0] == 204
            for _ in range(2):
                while (message := json.loads((await asyncio.wait_for(tab.connection.receive(), 20)).data))["type"] != (
                    "gag.token"
                ):
                    pass
                tab.token = message["data"]["token"]
            assert (await tab.post("/gag/listen", nodes=[NODE]))[0] == 204
            assert (await other.post("/gag/token", client="nobody"))[0] == 204
            wrong: list[Any] = [None, 1, [], {}]
            for client in wrong:
                status, text = await other.post("/gag/token", client=client)
                assert status == 400
                assert text == 'GAG: expected {"client": text}.'

    asyncio.run(asyncio.wait_for(go(), 60))


def test_a_closed_or_unknown_tab_cannot_listen(server: ComfyServer) -> None:
    async def go() -> None:
        async with open_tab(server) as gone:
            await gone.authenticate()
        async with open_tab(server) as tab:
            await tab.authenticate()
            for client, token in ((gone.client, gone.token), ("nobody", tab.token), ("", ""), ("\ud800", "\ud800")):
                for route in ("/gag/listen", "/gag/blocks"):
                    status, text = await tab.post(route, client=client, token=token, nodes=[NODE])
                    assert status == 409
                    assert text.startswith("GAG: this tab has no connection")

    asyncio.run(asyncio.wait_for(go(), 60))


def test_a_tab_cannot_open_close_or_read_anothers(server: ComfyServer) -> None:
    """The other tab's id is known, as it is to any page: it is in the messages of the server's history."""

    async def go() -> None:
        workflow = {"id": uuid.uuid4().hex}
        async with open_tab(server) as owner, open_tab(server) as stranger:
            await owner.listen(NODE)
            await stranger.authenticate()
            assert stranger.token != owner.token
            forged = (
                {"client": owner.client, "token": ""},
                {"client": owner.client, "token": "0" * 32},
                {"client": owner.client},
            )
            for body in forged:  # none of them closes the owner's chart
                assert (await stranger.post("/gag/listen", **body, nodes=[]))[0] == 409
            messages = await run_in(server, owner, graph(next(_seeds)), workflow={**workflow, "id": ""})
            assert of_type(messages, "gag.chart"), "the chart is still open"
            # The forged requests sent the owner its own token, and the stranger none.
            assert {data["token"] for data in of_type(messages, "gag.token")} == {owner.token}
            await owner.listen()
            for body in forged:  # none of them opens a chart
                assert (await stranger.post("/gag/listen", **body, nodes=[NODE]))[0] == 409
            messages = await run_in(server, owner, graph(next(_seeds), strength=0.9), workflow=workflow)
            assert of_type(messages, "gag.chart") == []
            for body in forged:
                status, text = await stranger.post("/gag/blocks", **body, workflow=workflow["id"])
                assert (status, NODE in text) == (409, False)
            assert await stranger.blocks(workflow["id"]) == {}, "a tab that did not queue the workflow gets nothing"
            assert set(await owner.blocks(workflow["id"])) == {NODE}

    asyncio.run(asyncio.wait_for(go(), 120))


def test_a_tab_that_connects_again_gets_a_new_token(server: ComfyServer) -> None:
    async def go() -> None:
        async with open_tab(server) as first:
            await first.authenticate()
        async with open_tab(server, first.client) as second:
            assert (await second.post("/gag/listen", token=first.token, nodes=[NODE]))[0] == 409
            await second.authenticate()
            assert second.token != first.token
            await second.listen(NODE)
            assert (await second.post("/gag/listen", token=first.token, nodes=[]))[0] == 409

    asyncio.run(asyncio.wait_for(go(), 60))


_BODY: Json = {"client": "a", "token": "b", "workflow": ""}
_WRONG: list[Json] = [{"client": 1}, {"workflow": None}, {"token": {}}]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[", [], {}, None, {"client": "a"}, {"client": "a", "nodes": []}),
        *({**_BODY, "nodes": [], **wrong} for wrong in _WRONG),
        *({name: _BODY[name] for name in _BODY if name != missing} | {"nodes": []} for missing in _BODY),
        *({**_BODY, "nodes": nodes} for nodes in ("5", [5], None, ["5"] * 1001)),
    ],
)
def test_an_invalid_request_is_refused(server: ComfyServer, body: Any) -> None:
    async def go() -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with aiohttp.ClientSession() as session, session.post(server.url + "/gag/listen", data=data) as answer:
            return answer.status, await answer.text()

    status, text = asyncio.run(asyncio.wait_for(go(), 60))
    assert status == 400
    assert text.startswith("GAG: ")


@pytest.mark.parametrize(
    ("inputs", "why"),
    [({}, ""), ({"strength": 0.0}, "why_off"), ({"schedule": ["9", 0]}, "why_schedule")],
)
def test_the_tab_gets_the_report_of_a_node(server: ComfyServer, inputs: Json, why: str) -> None:
    workflow = {"id": uuid.uuid4().hex}
    zero = {"kind": "constant", "over": "steps", "start_value": 0.0, "end_value": 0.0, "start": 0.0, "end": 1.0}
    prompt = {**graph(next(_seeds), **inputs), "9": {"class_type": "GAGSchedule", "inputs": zero}}
    messages = run(server, prompt, listen(), workflow=workflow)
    (status,) = of_type(messages, "gag.status")
    (model,) = of_type(messages, "gag.blocks")
    assert status["node"] == model["node"] == NODE
    assert status["workflow"] == model["workflow"] == workflow["id"]
    default = [layer for part in model["default"].values() for block in part for layer in block]
    assert 0 < sum(default) < len(default) == sum(map(sum, model["parts"].values()))
    assert status["guided"] == (0 if why else sum(default))
    linked = {name: None for name, value in prompt[NODE]["inputs"].items() if isinstance(value, list)}
    assert status["inputs"] == {**prompt[NODE]["inputs"], **linked}
    ((name, values),) = status["parts"]
    assert values.get("why", "") == why
    # The panel says in any language what the text says in English.
    said = texts.panel_texts()
    reason = said[why].format(**values) if why else ""
    assert said[name].format(**{**values, "why": reason}) == status["text"]


def test_a_tab_with_panels_gets_no_text_of_the_hosts(server: ComfyServer) -> None:
    """Otherwise the node would say everything twice, and the host's text would stay when it is no longer true."""

    async def go(before: Callable[[Tab], Awaitable[None]]) -> tuple[list[Json], list[bytes]]:
        async with open_tab(server) as tab:
            await before(tab)
            prompt_id = await asyncio.to_thread(server.queue, graph(next(_seeds)), None, tab.client)
            sent: list[Json] = []
            shown: list[bytes] = []
            async for raw in tab.connection:
                if raw.type is not aiohttp.WSMsgType.TEXT:
                    shown += [raw.data] if b"Guided 4 of 4" in raw.data else []
                    continue
                message = json.loads(raw.data)
                sent += [message["data"]] if message["type"] == "gag.status" else []
                if message["type"] in FINAL and message["data"]["prompt_id"] == prompt_id:
                    break
            if not sent:  # what it has missed comes once it says that it has panels
                await tab.listen()
                while (message := json.loads((await asyncio.wait_for(tab.connection.receive(), 20)).data))["type"] != (
                    "gag.status"
                ):
                    pass
                assert message["data"]["node"] == NODE
            return sent, shown

    sent, shown = asyncio.run(asyncio.wait_for(go(listen()), 60))
    assert ([one["node"] for one in sent], shown) == ([NODE], [])
    sent, shown = asyncio.run(asyncio.wait_for(go(nothing), 60))
    assert (sent, len(shown)) == ([], 1)


def test_the_blocks_are_sent_and_remembered_by_workflow(server: ComfyServer) -> None:
    workflow = {"id": uuid.uuid4().hex}
    seed = next(_seeds)
    # The strength is unused, so that the host runs the node.
    strength = 0.5 + seed % 1000 / 1e4
    (sent,) = of_type(run(server, graph(seed, strength=strength), workflow=workflow), "gag.blocks")
    assert sent.pop("workflow") == workflow["id"]
    assert sent.pop("node") == NODE
    assert list(sent["parts"]) == list(sent["default"]) == ["d", "m", "u"]
    for part, blocks in sent["default"].items():
        assert [len(block) for block in blocks] == sent["parts"][part]
        assert all(layer == (part != "m") for block in blocks for layer in block), "a UNet's default"

    # In another workflow the host reuses the node's output, and the blocks are sent there too.
    other = {"id": uuid.uuid4().hex}

    async def go() -> None:
        async with open_tab(server) as tab:
            messages = await run_in(server, tab, graph(next(_seeds), strength=strength), workflow=other)
            assert of_type(messages, "gag.blocks") == [{"workflow": other["id"], "node": NODE, **sent}]
            assert await tab.blocks(other["id"]) == {NODE: sent}
            assert await tab.blocks(workflow["id"]) == {}, "this tab did not queue it"
            assert await tab.blocks("other") == {}

    asyncio.run(asyncio.wait_for(go(), 120))


def test_the_setup_has_the_presets_of_the_node(server: ComfyServer) -> None:
    with _open(f"{server.url}/gag/setup") as answer:
        presets: Json = json.loads(answer.read())["presets"]
    info = server.object_info()
    options = info["GAGuidance"]["input"]["required"]["preset"]
    names = options[1]["options"] if options[0] == "COMBO" else options[0]
    assert list(presets) == names
    required = info["GAGuidanceAdvanced"]["input"]["required"]
    apart = {"model", "apply_to", "blocks", "verbose"}
    for settings in presets.values():
        assert set(required) - apart <= set(settings), "every other field is filled by a preset"
        assert not apart & set(settings)


def test_a_chart_gets_at_most_four_messages_a_second(server: ComfyServer) -> None:
    prompt = graph(next(_seeds))
    prompt["6"]["inputs"]["steps"] = 150
    times: list[float] = []

    def record(event: str, data: Any) -> None:
        if event == "gag.chart":
            times.append(time.monotonic())

    messages = run(server, prompt, listen(NODE), record)
    steps = {point[0] for message in of_type(messages, "gag.chart") for point in message["points"][NODE]}
    assert steps == set(range(150))
    # There is one message at the beginning, one at the end, and at most four a second between them.
    assert 2 <= len(times) <= 2 + 4 * (times[-1] - times[0] + 0.5)
