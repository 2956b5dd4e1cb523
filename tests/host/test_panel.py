# SPDX-License-Identifier: GPL-3.0-or-later
"""The browser's panel, in the host's sampler: charts, blocks and presets. A stand-in represents the server.

tests/server has the real one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

import host_process as host
from transformers_of_host import TRANSFORMERS

chart_module = host.pack_module("nodes.panel.chart")
listeners = host.pack_module("nodes.panel.listeners")
messages = host.pack_module("nodes.panel.messages")
routes = host.pack_module("nodes.panel.routes")
BROWSER = host.pack_module("nodes.panel.browser").BROWSER
guided_model = host.pack_module("nodes.patching.guided_model")
recorder_module = host.pack_module("nodes.patching.recorder")
MEASURES = list(host.pack_module("gag_core.measures").MEASURES)
NODE = "7"
TAB = "tab"
WORKFLOW = "workflow"
# One model for each way in which the text is found: attn2, wrapped blocks, a watched module, a measured stream.
MODELS = ["sd15", "sdxl", "flux", "wan-t2v", "mochi"]


class Server:
    """Stand-in for the host's server: one tab, which queued the run and may have charts open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
        self.client_id = TAB
        self.sockets = {TAB: object()}
        self.messages: list[tuple[str, dict[str, Any]]] = []
        module = SimpleNamespace(PromptServer=SimpleNamespace(instance=self))
        monkeypatch.setitem(sys.modules, "server", module)
        listener = listeners.Listener(self.sockets[TAB], WORKFLOW, frozenset(nodes))
        monkeypatch.setattr(listeners, "_listeners", {TAB: listener} if nodes else {})

    def send_sync(self, event: str, data: dict[str, Any], client: str) -> None:
        assert client == TAB
        self.messages.append((event, data))

    def points(self) -> dict[int, list[float]]:
        """Return the latest values of each step of the last run."""
        charts = [data for event, data in self.messages if event == messages.CHART]
        last = max((data["run"] for data in charts), default=0)
        found: dict[int, list[float]] = {}
        for data in charts:
            if data["run"] == last:
                found.update({step: values for step, *values in data["points"][NODE]})
        return found


def guided(model: Any, **inputs: Any) -> Any:
    (out,) = host.run_advanced(model=model, **inputs)
    return with_node_id(out)


def with_node_id(model: Any) -> Any:
    """Return the model with ids for its nodes, which they have in a graph."""
    guidances = guided_model.guidances_of(model)
    with_ids = tuple(replace(guidance, node_id=NODE) for guidance in guidances)
    return guided_model.with_guidances(model, with_ids, BROWSER)


def sample(model: Any, name: str, **settings: Any) -> Tensor:
    if name in TRANSFORMERS and name not in host.CONFIGS:
        return TRANSFORMERS[name].sample(model, **settings)
    return host.sample(model, name, **settings)


def build(name: str) -> Any:
    import companions

    return companions.build(name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("apply_to", ["both", "positive"])
def test_a_chart_has_the_probes_measures_and_does_not_change_the_picture(
    name: str, apply_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"guidance_scale": 2.0, "norm_threshold": 0.7, "strength": 0.8, "apply_to": apply_to}
    model = guided(build(name), **settings)
    Server(monkeypatch)
    plain = sample(model, name, cfg=4.0)
    server = Server(monkeypatch, NODE)
    assert torch.equal(sample(model, name, cfg=4.0), plain)
    points = server.points()
    probed, probe = host.run_node("GAGProbe", model=model)
    server_with_probe = Server(monkeypatch, NODE)
    assert torch.equal(sample(probed, name, cfg=4.0), plain)
    result = probe.result
    assert sorted(points) == sorted(server_with_probe.points()) == [0, 1]
    for step, values in points.items():
        means = result.values[:, :, step][result.guided[:, :, step]].mean(dim=0)
        expected = [
            float(means[MEASURES.index(measure)]) for measure in [series.name for series in chart_module.SERIES]
        ]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-6)
        # A probe and a chart use the same samples.
        assert server_with_probe.points()[step] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert any(values[0] > 0.0 for values in points.values())


@pytest.mark.usefixtures("traceable_attention")
def test_opening_a_chart_does_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import companions

    model = companions.compiled_without_guards(guided(build("wan-t2v"), start_percent=0.0))
    Server(monkeypatch)
    plain = sample(model, "wan-t2v")
    graph_count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graph_count > 0
    server = Server(monkeypatch, NODE)
    assert torch.equal(sample(model, "wan-t2v"), plain)
    assert server.points()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graph_count


@pytest.mark.parametrize("nodes", [(), ("8",)], ids=["nobody", "another node"])
def test_nothing_is_measured_without_a_listener(nodes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured for nobody")

    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, *nodes)
    monkeypatch.setattr(recorder_module.CallRecording, "__init__", fail)
    monkeypatch.setattr(chart_module.Chart, "add", fail)
    sample(model, "sd15")
    # A tab with a chart of another node has panels, so that it gets the outcome as a message.
    assert [event for event, _ in server.messages] == ([messages.STATUS] if nodes else [])
    # With a listener the call is measured, so the check above works.
    Server(monkeypatch, NODE)
    with pytest.raises(AssertionError, match="measured for nobody"):
        sample(model, "sd15")


@pytest.mark.parametrize(("running", "is_shown"), [(WORKFLOW, True), (None, True), ("another", False)])
def test_a_chart_gets_only_runs_of_its_own_workflow(
    running: str | None, is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tab may show another workflow by then, whose nodes have the same ids."""
    server = Server(monkeypatch, NODE)
    workflow = {} if running is None else {"workflow": {"id": running}}
    item: tuple[Any, ...] = (0, "prompt", {}, {"extra_pnginfo": workflow}, [])
    monkeypatch.setattr(server, "prompt_queue", SimpleNamespace(currently_running={0: item}), raising=False)
    sample(guided(host.build_model("sd15")), "sd15")
    assert bool(server.points()) == is_shown
    assert {data["workflow"] for event, data in server.messages} == {running}


def test_values_that_are_not_numbers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would make the whole message invalid as JSON."""
    server = Server(monkeypatch, NODE)
    chart = chart_module.Chart()
    good, bad = torch.ones(len(MEASURES)), torch.full((len(MEASURES),), float("nan"))
    chart.sums[NODE] = {0: (good, 1), 1: (bad, 1), 2: (2 * good, 1)}
    chart.unsent[NODE] = {2, 1, 0}
    chart.finish(3)
    ((_, data),) = server.messages
    assert data["points"] == {NODE: [[0, 1.0, 1.0, 1.0], [2, 2.0, 2.0, 2.0]]}


@pytest.mark.parametrize("end", ["closed", "gone", "anew"])
def test_measuring_ends_when_the_chart_or_the_tab_is_closed_during_a_run(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    monkeypatch.setattr(chart_module, "_SECONDS_BETWEEN_MESSAGES", 0.0)
    add = chart_module.Chart.add
    steps: list[int] = []

    def recorded(chart: Any, guidance: Any, recorded: Any, reached: Any, at: Any) -> None:
        steps.append(at.done)
        add(chart, guidance, recorded, reached, at)

    def close(step: int, *_: Any) -> None:
        if step != 1:
            return
        if end == "closed":
            listeners._listeners.clear()
        elif end == "gone":
            del server.sockets[TAB]
        else:
            server.sockets[TAB] = object()

    monkeypatch.setattr(chart_module.Chart, "add", recorded)
    sample(model, "sd15", steps=5, callback=close)
    assert steps == [0, 1]
    assert sorted(server.points()) == [0, 1]


def test_messages_are_sent_at_most_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    now = [100.0]
    monkeypatch.setattr(chart_module.time, "monotonic", lambda: now[0])

    def advance(*_: Any) -> None:
        now[0] += 0.1

    sample(model, "sd15", steps=10, callback=advance)
    charts = [data for event, data in server.messages if event == messages.CHART]
    # Messages come at the beginning and after steps 0, 3, 6 and 9. Nothing is left at the end.
    steps = [[point[0] for point in data["points"][NODE]] for data in charts]
    assert steps == [[], [0], [1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_further_model_calls_in_a_step_belong_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    sample(model, "sd15", steps=4, sampler="heun")
    assert sorted(server.points()) == [0, 1, 2, 3]


def test_steps_without_guidance_are_not_charted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"), start_percent=0.5)
    server = Server(monkeypatch, NODE)
    sample(model, "sd15", steps=6)
    steps = sorted(server.points())
    assert steps
    assert steps[0] >= 2
    assert steps[-1] == 5


def test_each_run_has_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    sample(model, "sd15")
    sample(model, "sd15")
    assert len({data["run"] for event, data in server.messages if event == messages.CHART}) == 2


def test_an_open_chart_is_told_that_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows then that no number has come yet, and no more the run before."""
    server = Server(monkeypatch, NODE)
    sample(guided(host.build_model("sd15"), start_percent=1.0, end_percent=1.0), "sd15", steps=3)
    (chart,) = [data for event, data in server.messages if event == messages.CHART]
    assert (chart["steps"], chart["points"]) == (3, {NODE: []})


def queue(server: Server, monkeypatch: pytest.MonkeyPatch, inputs: Any) -> None:
    """Let the server run a prompt in which the node has these inputs."""
    item: tuple[Any, ...] = (0, "prompt", {NODE: {"inputs": inputs}}, {}, [])
    monkeypatch.setattr(server, "prompt_queue", SimpleNamespace(currently_running={0: item}), raising=False)


def test_the_status_has_the_inputs_that_the_node_was_queued_with(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch, "8")
    inputs = {"model": ["1", 0], "strength": 0.5, "blocks": "d0", "on": True}
    unfit = {"long": "x" * 10**5, "nan": float("nan"), "inf": float("inf"), "object": {}, "x" * 300: 1}
    queue(server, monkeypatch, {**inputs, **unfit})
    sample(guided(host.build_model("sd15"), start_percent=0.0), "sd15")
    ((event, data),) = server.messages
    assert event == messages.STATUS
    assert data["inputs"] == {**inputs, "model": None}
    assert data["text"] == "Guided 6 of 6 attentions in 2 of 2 calls."
    assert data["parts"] == [["guided", {"guided": 6, "of": 6, "calls": 2, "all": 2}]]
    wrong: Any
    for wrong in (None, [], "text", {NODE: 1}):
        queue(server, monkeypatch, wrong)
        assert messages.queued_inputs(NODE) == ({} if not isinstance(wrong, dict) else {NODE: 1})


@pytest.mark.parametrize("name", ["sd15"])
def test_a_run_that_does_not_finish_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    model, _ = host.run_node("GAGProbe", model=guided(host.build_model(name)))
    server = Server(monkeypatch, "8")
    with pytest.raises(KeyboardInterrupt):
        sample(model, name, callback=stop)
    assert [data["text"] for _, data in server.messages] == ["The last run did not finish."]


def test_a_tab_gets_what_it_has_missed_once_its_panels_are_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is loaded again during a run: its connection is new, and has said nothing about panels."""
    server = Server(monkeypatch, NODE)
    status = host.pack_module("nodes.panel.status")
    monkeypatch.setattr(status, "_missed", {})
    shown: list[str] = []
    monkeypatch.setattr(status, "send_text", lambda text, node: shown.append(text))
    sentence = host.pack_module("nodes.patching.observer").UNFINISHED
    status.send_status(NODE, [sentence])
    assert [data["node"] for _, data in server.messages] == [NODE]
    assert shown == []
    server.sockets[TAB] = object()
    for _ in range(2):
        status.send_status(NODE, [sentence])
    assert len(server.messages) == 1
    assert len(shown) == 2, "whoever has no panels sees the host's text"
    status.send_missed("another")
    assert len(server.messages) == 1
    listeners.set_open_charts(TAB, WORKFLOW, [])
    status.send_missed(TAB)
    assert [(event, data["node"]) for event, data in server.messages] == [(messages.STATUS, NODE)] * 2
    status.send_missed(TAB)
    assert len(server.messages) == 2
    for node in range(300):
        server.sockets[TAB] = object()
        status.send_status(str(node), [sentence])
    assert len(status._missed) == 256


class Event:
    """Stand-in for an event of an accelerator: ``has_arrived`` says if the copy is there. A CPU has no events."""

    def __init__(self) -> None:
        self.has_arrived = False
        self.waited = False

    def query(self) -> bool:
        return self.has_arrived

    def synchronize(self) -> None:
        self.waited = self.has_arrived = True


def test_only_the_end_of_a_run_waits_for_measures_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    monkeypatch.setattr(chart_module, "_SECONDS_BETWEEN_MESSAGES", 0.0)
    events: list[Event] = []

    def start_copy(measured: list[Any]) -> tuple[list[Any], Any]:
        if events:
            events[-1].has_arrived = True  # the event of the step before
        events.append(Event())
        return measured, events[-1]

    monkeypatch.setattr(chart_module, "_start_copy", start_copy)
    sample(model, "sd15", steps=4)
    assert [event.waited for event in events] == [False, False, False, True]
    charts = [data for event, data in server.messages if event == messages.CHART]
    assert [[point[0] for point in data["points"][NODE]] for data in charts] == [[], [0], [1], [2], [3]]


def test_the_blocks_of_a_model_are_sent_before_the_blocks_input_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch)
    monkeypatch.setattr(messages, "_blocks", {})
    config = host.pack_module("gag_core").GuidanceConfig()
    with pytest.raises(ValueError, match="is out of range"):
        guided_model.guide_model(
            host.build_model("sd15"), config, BROWSER, start_percent=0.0, end_percent=1.0, node_id=NODE, blocks="d99"
        )
    ((event, data),) = server.messages
    assert event == messages.BLOCKS
    assert data["parts"] == {"d": [1] * 2, "m": [1], "u": [1] * 4}
    assert messages._blocks == {(TAB, "", NODE): {key: data[key] for key in ("parts", "default")}}


def test_presets_are_sent_with_all_their_settings() -> None:
    presets = host.pack_module("nodes.presets").PRESETS
    sent = json.loads(asyncio.run(routes._get_setup(None)).text)["presets"]
    assert list(sent) == list(presets)
    for name, settings in sent.items():
        assert settings == presets[name].fields
        assert {"strength", "start_percent", "end_percent", "adapt_to_cfg"} <= set(settings)


def test_the_blocks_of_at_most_256_nodes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch)
    monkeypatch.setattr(messages, "_blocks", {})
    layer = host.pack_module("nodes.patching.families").Layer("input", 0)
    for node_id in range(300):
        messages.send_blocks(str(node_id), {"d": [[layer]]}, frozenset({layer}))
    assert len(messages._blocks) == 256
    assert (TAB, "", "299") in messages._blocks
    assert (TAB, "", "43") not in messages._blocks


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Guided 4 of 4 attentions in 2 of 4 calls.", "Guided 4 of 4 attentions in 2 of 4 calls."),
        ("<img src=x onerror=alert(1)>", "‹img src=x onerror=alert(1)›"),
        ("&lt;img&gt; &#60;", "＆lt;img＆gt; ＆#60;"),
        ("[[a|javascript:alert(1)]]", "[ [a|javascript:alert(1)]]"),
        ("[[[a|javascript:alert(1)]]]", "[ [ [a|javascript:alert(1)]]]"),
        ("see https://a.example/x", "see https:∕∕a.example/x"),
        ("www.a.example WWW.a.example", "www․a.example WWW․a.example"),
        ("__LNK0__ ___LNK1", "_ _LNK0__ __ _LNK1"),
        ("half \ud83d of it, \udfff", "half \\ud83d of it, \\udfff"),
    ],
)
def test_a_text_on_a_node_has_no_markup(text: str, shown: str) -> None:
    assert messages.without_markup(text) == shown


@pytest.mark.parametrize("unit", ["a", "<", "[", "[[", "_", "__LNK", "www.", "://", "&", "\ud800", "[[a|b]]", "\0"])
def test_a_text_on_a_node_is_short_and_can_be_encoded(unit: str) -> None:
    start = time.perf_counter()
    shown = messages.without_markup(unit * (10**6 // len(unit)))
    assert time.perf_counter() - start < 1.0
    assert 0 < len(shown) <= 4000
    shown.encode()
    for pattern in ("<", ">", "&", "[[", "://", "www.", "__LNK"):
        assert pattern not in shown
    for end in ("[[", "__LNK", "www.", "://"):  # nothing that the shortening leaves over
        assert end not in messages.without_markup("a" * 3999 + unit + end)


def test_a_tab_proves_itself_with_the_token_that_was_sent_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch)
    monkeypatch.setattr(listeners, "_tokens", {})
    assert not listeners.is_tab("another", "")
    assert server.messages == []
    for wrong in ("", "x" * 32, "\ud800", "a" * 10**6):
        assert not listeners.is_tab(TAB, wrong)
    ((_, token),) = {(event, data["token"]) for event, data in server.messages}
    assert {event for event, _ in server.messages} == {messages.TOKEN}
    assert listeners.is_tab(TAB, token)
    assert not listeners.is_tab("another", token)
    server.sockets[TAB] = object()  # the tab was loaded again
    assert not listeners.is_tab(TAB, token)
    renewed = server.messages[-1][1]["token"]
    assert renewed != token
    assert listeners.is_tab(TAB, renewed)
    server.sockets.clear()
    assert not listeners.is_tab(TAB, renewed)
    assert listeners._tokens == {}


def test_without_a_server_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server", raising=False)
    monkeypatch.setattr(listeners, "_listeners", {TAB: listeners.Listener(None, WORKFLOW, frozenset({NODE}))})
    assert not listeners.is_listening(NODE)
    routes.add_routes()
    sample(guided(host.build_model("sd15")), "sd15")


NESTED: Any = {}
for _ in range(900):
    NESTED = {"workflow": [NESTED]}
NO_IDS: list[Any] = [None, [], {}, 7, "x" * 201]
NO_OBJECTS: list[Any] = [None, [], ["id"], "text", 7, True, {}, NESTED]


@pytest.mark.parametrize(
    "extra_data",
    [
        *NO_OBJECTS,
        *({"extra_pnginfo": value} for value in NO_OBJECTS),
        *({"extra_pnginfo": {"workflow": value}} for value in NO_OBJECTS),
        *({"extra_pnginfo": {"workflow": {"id": value}}} for value in NO_IDS),
    ],
)
def test_a_workflow_without_a_proper_id_has_none(extra_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workflow_id_of(extra_data, monkeypatch) is None


def test_a_workflow_has_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workflow_id_of({"extra_pnginfo": {"workflow": {"id": "some id"}}}, monkeypatch) == "some id"


def workflow_id_of(extra_data: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    messages = host.pack_module("nodes.panel.messages")
    queue = SimpleNamespace(currently_running={0: (0, "prompt id", {}, extra_data, [])})
    monkeypatch.setattr(messages, "running_server", lambda: SimpleNamespace(prompt_queue=queue))
    return messages.workflow_id()
