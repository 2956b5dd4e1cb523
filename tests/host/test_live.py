# SPDX-License-Identifier: GPL-3.0-or-later
"""What is measured for an open chart, in the host's sampler; the server that sends it is stood in for.

tests/server has the real one.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

import host_process as host
from transformers_of_host import TRANSFORMERS

live = host.pack_module("nodes.live")
patch = host.pack_module("nodes.patch")
recording = host.pack_module("nodes.recording")
MEASURES = list(host.pack_module("gag_core.measures").MEASURES)
NODE = "7"
TAB = "tab"
WORKFLOW = "workflow"
# One of each way to find the text: attn2, wrapped blocks, a module of its own, a stream that is measured.
MODELS = ["sd15", "sdxl", "flux", "wan-t2v", "mochi"]


class Server:
    """As much of the host's server as messages need: one tab, which queued the run, and has a chart open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
        self.client_id = TAB
        self.sockets = {TAB: object()}
        self.messages: list[tuple[str, dict[str, Any]]] = []
        module = SimpleNamespace(PromptServer=SimpleNamespace(instance=self))
        monkeypatch.setitem(live.sys.modules, "server", module)
        listener = live._Listener(self.sockets[TAB], WORKFLOW, frozenset(nodes))
        monkeypatch.setattr(live, "_listeners", {TAB: listener} if nodes else {})

    def send_sync(self, event: str, data: dict[str, Any], client: str) -> None:
        assert client == TAB
        self.messages.append((event, data))

    def points(self) -> dict[int, list[float]]:
        """Of the last run: the latest numbers of each step."""
        charts = [data for event, data in self.messages if event == live.CHART]
        last = max((data["run"] for data in charts), default=0)
        found: dict[int, list[float]] = {}
        for data in charts:
            if data["run"] == last:
                found.update({step: values for step, *values in data["points"][NODE]})
        return found


def guided(model: Any, **inputs: Any) -> Any:
    (out,) = host.run_advanced(model=model, **inputs)
    return named(out)


def named(model: Any) -> Any:
    """The same as if the node had an id, which it has in a graph."""
    guidances = patch.patch_of(model).guidances
    return patch.with_guidances(model, tuple(replace(guidance, node_id=NODE) for guidance in guidances))


def sample(model: Any, name: str, **settings: Any) -> Tensor:
    if name in TRANSFORMERS and name not in host.CONFIGS:
        return TRANSFORMERS[name].sample(model, **settings)
    return host.sample(model, name, **settings)


def build(name: str) -> Any:
    import companions

    return companions.build(name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("apply_to", ["both", "positive"])
def test_the_numbers_are_the_probes_and_the_picture_is_the_same(
    name: str, apply_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"guidance_scale": 2.0, "norm_threshold": 0.7, "strength": 0.8, "apply_to": apply_to}
    model = guided(build(name), **settings)
    Server(monkeypatch)
    plain = sample(model, name, cfg=4.0)
    server = Server(monkeypatch, NODE)
    assert torch.equal(sample(model, name, cfg=4.0), plain)
    points = server.points()
    watched, probe = host.run_node("GAGProbe", model=model)
    both = Server(monkeypatch, NODE)
    assert torch.equal(sample(watched, name, cfg=4.0), plain)
    result = probe.result
    assert sorted(points) == sorted(both.points()) == [0, 1]
    for step, values in points.items():
        seen = result.values[:, :, step][result.guided[:, :, step]].mean(dim=0)
        wanted = [float(seen[MEASURES.index(measure)]) for measure in live.CHARTED]
        assert values == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        # With a probe beside it the same samples are used by both.
        assert both.points()[step] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert any(values[0] > 0.0 for values in points.values())


@pytest.mark.usefixtures("traceable_attention")
def test_opening_a_chart_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import companions

    model = companions.compiled_carelessly(guided(build("wan-t2v"), start_percent=0.0))
    Server(monkeypatch)
    plain = sample(model, "wan-t2v")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    server = Server(monkeypatch, NODE)
    assert torch.equal(sample(model, "wan-t2v"), plain)
    assert server.points()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("nodes", [(), ("8",)], ids=["nobody", "another node"])
def test_nothing_is_measured_without_a_listener(nodes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured for nobody")

    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, *nodes)
    monkeypatch.setattr(recording.CallRecording, "__init__", never)
    monkeypatch.setattr(live.Chart, "add", never)
    sample(model, "sd15")
    assert [event for event, _ in server.messages] == [live.REPORT]
    # The same would be noticed.
    Server(monkeypatch, NODE)
    with pytest.raises(AssertionError, match="measured for nobody"):
        sample(model, "sd15")


@pytest.mark.parametrize(("running", "seen"), [(WORKFLOW, True), (None, True), ("another", False)])
def test_a_chart_is_one_of_its_workflow(running: str | None, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tab may show another workflow meanwhile, whose nodes have the same ids."""
    server = Server(monkeypatch, NODE)
    workflow = {} if running is None else {"workflow": {"id": running}}
    item: tuple[Any, ...] = (0, "prompt", {}, {"extra_pnginfo": workflow}, [])
    monkeypatch.setattr(server, "prompt_queue", SimpleNamespace(currently_running={0: item}), raising=False)
    sample(guided(host.build_model("sd15")), "sd15")
    assert bool(server.points()) == seen
    assert {data["workflow"] for event, data in server.messages} == {running}


def test_what_is_not_a_number_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the whole message would be no JSON."""
    server = Server(monkeypatch, NODE)
    chart = live.Chart()
    good, bad = torch.ones(len(MEASURES)), torch.full((len(MEASURES),), float("nan"))
    chart.sums[NODE] = {0: (good, 1), 1: (bad, 1), 2: (2 * good, 1)}
    chart.news[NODE] = {2, 1, 0}
    chart.finish(3)
    ((_, data),) = server.messages
    assert data["points"] == {NODE: [[0, 1.0, 1.0, 1.0], [2, 2.0, 2.0, 2.0]]}


@pytest.mark.parametrize("end", ["closed", "gone", "anew"])
def test_it_ends_with_the_chart_or_the_tab_in_the_middle_of_a_run(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    monkeypatch.setattr(live, "_SECONDS_BETWEEN_MESSAGES", 0.0)
    add = live.Chart.add
    steps: list[int] = []

    def noted(chart: Any, guidance: Any, recorded: Any, reached: Any, at: Any) -> None:
        steps.append(at.done)
        add(chart, guidance, recorded, reached, at)

    def close(step: int, *_: Any) -> None:
        if step != 1:
            return
        if end == "closed":
            live._listeners.clear()
        elif end == "gone":
            del server.sockets[TAB]
        else:
            server.sockets[TAB] = object()

    monkeypatch.setattr(live.Chart, "add", noted)
    sample(model, "sd15", steps=5, callback=close)
    assert steps == [0, 1]
    assert sorted(server.points()) == [0, 1]


def test_messages_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    def a_tenth(*_: Any) -> None:
        now[0] += 0.1

    sample(model, "sd15", steps=10, callback=a_tenth)
    charts = [data for event, data in server.messages if event == live.CHART]
    # After steps 0, 3, 6, 9; the end has nothing new.
    assert [[point[0] for point in data["points"][NODE]] for data in charts] == [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_further_calls_in_a_step_belong_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    sample(model, "sd15", steps=4, sampler="heun")
    assert sorted(server.points()) == [0, 1, 2, 3]


def test_where_nothing_is_guided_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"), start_percent=0.5)
    server = Server(monkeypatch, NODE)
    sample(model, "sd15", steps=6)
    steps = sorted(server.points())
    assert steps
    assert steps[0] >= 2
    assert steps[-1] == 5


def test_each_run_has_a_number_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    sample(model, "sd15")
    sample(model, "sd15")
    assert len({data["run"] for event, data in server.messages if event == live.CHART}) == 2


class Device:
    """Stands in for an accelerator's events, which this machine has none of: a copy is there when it says so."""

    def __init__(self) -> None:
        self.there = False
        self.waited = False

    def query(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        self.waited = self.there = True


def test_numbers_still_on_their_way_are_waited_for_at_the_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = guided(host.build_model("sd15"))
    server = Server(monkeypatch, NODE)
    monkeypatch.setattr(live, "_SECONDS_BETWEEN_MESSAGES", 0.0)
    events: list[Device] = []

    def on_their_way(measured: list[Any]) -> tuple[list[Any], Any]:
        if events:
            events[-1].there = True  # that of the step before
        events.append(Device())
        return measured, events[-1]

    monkeypatch.setattr(live, "_on_their_way", on_their_way)
    sample(model, "sd15", steps=4)
    assert [event.waited for event in events] == [False, False, False, True]
    charts = [data for event, data in server.messages if event == live.CHART]
    assert [[point[0] for point in data["points"][NODE]] for data in charts] == [[0], [1], [2], [3]]


def test_the_blocks_of_a_model_are_told_before_its_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch)
    monkeypatch.setattr(live, "_blocks", {})
    guidance = host.pack_module("nodes.guidance")
    config = host.pack_module("gag_core").GuidanceConfig()
    with pytest.raises(ValueError, match="is out of range"):
        guidance.guide(host.build_model("sd15"), config, start_percent=0.0, end_percent=1.0, node_id=NODE, blocks="d99")
    ((event, data),) = server.messages
    assert event == live.BLOCKS
    assert data["parts"] == {"d": [1] * 2, "m": [1], "u": [1] * 4}
    assert live._blocks == {("", NODE): {key: data[key] for key in ("parts", "default")}}


def test_presets_are_sent_as_they_are_but_for_the_strength() -> None:
    presets = host.pack_module("nodes.presets").PRESETS
    sent = json.loads(asyncio.run(live._get_presets(None)).text)
    assert list(sent) == list(presets)
    for name, settings in sent.items():
        assert replace(presets[name], **settings) == presets[name]
        assert set(settings) == set(vars(presets[name])) - {"strength"}


def test_no_more_is_remembered_than_a_number_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch)
    monkeypatch.setattr(live, "_blocks", {})
    layer = host.pack_module("nodes.families").Layer("input", 0)
    for number in range(300):
        live.tell_blocks(str(number), {"d": [[layer]]}, frozenset({layer}))
    assert len(live._blocks) == 256
    assert ("", "299") in live._blocks
    assert ("", "43") not in live._blocks


def test_without_a_server_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(live.sys.modules, "server", raising=False)
    monkeypatch.setattr(live, "_listeners", {TAB: live._Listener(None, WORKFLOW, frozenset({NODE}))})
    assert not live.listening(NODE)
    live.add_routes()
    sample(guided(host.build_model("sd15")), "sd15")
