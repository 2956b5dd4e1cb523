# SPDX-License-Identifier: GPL-3.0-or-later
"""ComfyUI from 0.34 on: stored attention, tensor containers, and the allocation recorder.

The pinned host has none of them. Stand-ins behave as the source of newer hosts does: ``wrap_attn`` in
comfy/ldm/modules/attention.py, and ``pause_malloc_graph`` in comfy/model_prefetch.py.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from torch import Tensor

import host_process as host
import reference
from recorder import record_calls
from tolerances import assert_close

PAPER = host.pack_module("nodes.presets").PRESETS["paper"].config
attention = host.pack_module("nodes.patching.host_attention")


class StoredAttention:
    """Stand-in for an INT8 attention that a checkpoint stores for a module. It halves the output."""

    def __init__(self) -> None:
        self.calls = 0

    def function(self, *args: Any, **kwargs: Any) -> Tensor:
        # It is one of the host's wrapped functions: without this parameter it would call the override again.
        assert kwargs.pop("_inside_attn_wrapper")
        self.calls += 1
        out: Tensor = host_attention.attention_basic(*args, _inside_attn_wrapper=True, **kwargs)
        return 0.5 * out


def test_a_stored_attention_computes_unguided_calls_and_the_base_of_guided_ones() -> None:
    model = host.build_model("sd15")
    stored = StoredAttention()
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith(("attn1", "attn2")):
            # In newer hosts this is a module, in which no function is stored.
            own = getattr(module, "comfy_attention", None)
            if own is None:
                module.comfy_attention = stored
            else:
                own.function = stored.function
    with record_calls(model) as calls:
        host.sample(host.run_advanced(model=model)[0], "sd15", steps=1)
    assert stored.calls == len(calls) > 0
    for call in calls:
        plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
        is_guided = call.module.endswith("attn2") and ".middle_block" not in call.module
        change = reference.guided_attention(call.q, call.k, call.v, PAPER) - plain if is_guided else 0.0
        assert_close(call.out, 0.5 * plain + change, error=3e-4 * float(call.v.abs().max()))


class Container:
    """Stand-in for ``AttentionTensorContainer``: a tensor that can be taken once."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def take(self) -> Tensor:
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "the container has been emptied before"
        return tensor


class Previous:
    """Stand-in for the override of a node that chooses an attention backend; it takes containers."""

    def __init__(self) -> None:
        self.containers: list[Any] = []

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("tensors were taken out of their containers")

    def container_function(self, *args: Any, **kwargs: Any) -> Tensor:
        self.containers += args[:3]
        return torch.zeros(1)


def test_calls_that_are_not_guided_keep_their_containers() -> None:
    previous = Previous()
    override = attention.offered(lambda *_: torch.ones(1), previous, lambda: False)
    containers = [Container(torch.zeros(1, 2, 4)) for _ in range(3)]
    assert override.container_function(*containers, 2) == 0
    assert previous.containers == containers
    assert all(container.tensor is not None for container in containers)


def test_guided_calls_take_the_tensors_once_and_say_that_they_are_inside() -> None:
    seen: dict[str, Any] = {}

    def ours(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.update(kwargs, function=function, args=args)
        return torch.ones(1)

    override = attention.offered(ours, Previous(), lambda: True)
    containers = [Container(torch.full((1, 2, 4), float(i))) for i in range(3)]
    assert override.container_function(*containers, 2, mask=None) == 1
    assert [float(tensor.max()) for tensor in seen["args"][:3]] == [0.0, 1.0, 2.0]
    assert seen["_inside_attn_wrapper"]
    assert seen["function"] is host_attention.optimized_attention
    assert all(container.tensor is None for container in containers)


def test_without_such_a_previous_override_no_containers_are_offered() -> None:
    for previous in (None, lambda *_: torch.zeros(1)):
        assert not hasattr(attention.offered(lambda *_: torch.ones(1), previous, lambda: True), "container_function")


class Graph:
    """Stand-in for the recorder of one thread: it counts pauses."""

    def __init__(self) -> None:
        self._comfy_active = True
        self.paused = 0
        self.pauses = 0

    def pause(self, sync: bool = False) -> None:
        self.paused += 1
        self.pauses += 1
        assert self.paused == 1, "pauses are not nested"

    def resume(self, sync: bool = False) -> None:
        self.paused -= 1


@pytest.fixture(params=["from 0.35", "first 0.34"])
def graph(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """Recorder of this thread, under the names of either kind of host."""
    recorder = Graph()
    graphs = {threading.get_ident(): recorder}

    @contextmanager
    def pause_malloc_graph() -> Iterator[None]:
        recorder.pause()
        try:
            yield
        finally:
            recorder.resume()

    if request.param == "from 0.35":
        module = SimpleNamespace(MALLOC_GRAPHS=graphs, pause_malloc_graph=pause_malloc_graph)
    else:
        module = SimpleNamespace(ACTIVE_MALLOC_GRAPHS=graphs)
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
    return recorder


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_what_a_probe_keeps_is_copied_while_the_recorder_is_paused(
    name: str, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = host.pack_module("nodes.patching.recorder")
    add_sample = recorder.CallRecording._add_sample
    kept = 0

    def checked(recording: Any, layer: Any, groups: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> None:
        nonlocal kept
        assert graph.paused == 1
        add_sample(recording, layer, groups, q, k, v, *args)
        sample = recording.waiting[-1]
        storages = {tensor.untyped_storage().data_ptr() for tensor in (q, k, v)}
        assert not storages & {tensor.untyped_storage().data_ptr() for tensor in (sample.q, sample.k, sample.v)}
        kept += 1

    monkeypatch.setattr(recorder.CallRecording, "_add_sample", checked)
    model, probe = host.run_node("GAGProbe", model=host.build_model(name))
    host.sample(model, name, steps=1)
    assert kept == graph.pauses > 0
    assert graph.paused == 0
    assert probe.result.layers


def test_kernels_are_checked_while_the_recorder_is_paused(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of a check live in one block only, so they must not be recorded. The call itself is recorded."""
    guard, eager = (host.pack_module(f"gag_core.{name}") for name in ("triton.guard", "eager"))
    config = host.pack_module("gag_core").GuidanceConfig()
    monkeypatch.setattr(guard, "_programs", {})
    q = torch.randn(1, 2, 5, 8)
    paused = []

    def kernel(*args: Any, **options: Any) -> None:
        paused.append(graph.paused)
        eager.guide(*args, **options)

    def start() -> None:
        kernel(torch.empty_like(q), q, q, q, config, base=None, mask=None, scale=0.3)

    for _ in range(2):
        program = guard.program("fused", "one", "a case")
        assert guard.attempt(program, start, kernel, torch.empty_like(q), q, q, q, config, None, None, None)
    assert paused == [1, 0, 0] and graph.paused == 0


def test_an_inactive_recorder_is_not_paused(graph: Graph) -> None:
    graph._comfy_active = False
    sys.modules["comfy.model_prefetch"].__dict__.pop("ACTIVE_MALLOC_GRAPHS", None)
    model, _ = host.run_node("GAGProbe", model=host.build_model("sd15"))
    host.sample(model, "sd15", steps=1)
    assert graph.pauses == 0
