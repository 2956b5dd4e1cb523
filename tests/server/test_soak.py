# SPDX-License-Identifier: GPL-3.0-or-later
"""200 graphs on one server, of several families, with errors and interrupts between them, leave nothing behind.

Each result equals that of a fresh server bit for bit, and memory does not grow.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from comfy_server import ComfyServer, Json, RunResult

NODES = Path(__file__).with_name("soak_nodes.py")
GRAPHS = 200
WARM_UP = 50
GROWTH = 32 * 2**20
SAMPLER = "sampler"


def simple(**inputs: Any) -> Json:
    settings = {"preset": "no CFG", "strength": 1.0}
    return {"class_type": "GAGuidance", "inputs": {**settings, **inputs}}


def advanced(**inputs: Any) -> Json:
    settings = {
        "rule": "gag",
        "guidance_scale": 4.0,
        "norm_threshold": 2.0,
        "norm_mode": "absolute",
        "orthogonal_scale": 0.5,
        "alpha": 1.5,
        "strength": 1.0,
        "merge_heads": False,
        "apply_to": "both",
        "blocks": "",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "adapt_to_cfg": False,
        "verbose": True,
    }
    return {"class_type": "GAGuidanceAdvanced", "inputs": {**settings, **inputs}}


OFF: list[Json] = []
GUIDANCES = [
    OFF,
    [simple()],
    [simple(preset="paper")],
    [advanced(rule="pladis", guidance_scale=2.0)],
    [advanced(alpha=2.0, merge_heads=True, apply_to="positive")],
    [advanced(end_percent=0.5), advanced(start_percent=0.5)],
]
FAMILIES = ("demo", "flux", "wan")
# Wrong nodes, and a part of the error message for each.
ERRORS = [
    (advanced(blocks="sideways"), "blocks: 'sideways' names a part"),
    (advanced(blocks="!?,"), "blocks: '!?' is not a block"),
    (advanced(start_percent=0.9, end_percent=0.1), "the start not after the end, got 0.9 and 0.1."),
]


@dataclass(frozen=True)
class Case:
    """One graph: a family, its GAG nodes, a seed and the number of steps."""

    family: str
    guidances: list[Json] = field(default_factory=list)
    seed: int = 1
    steps: int = 2

    def graph(self, tidy: bool = False) -> Json:
        """Return the graph in API form. ``tidy`` makes the server collect garbage at the end."""
        nodes: Json = {}
        if self.family == "demo":
            nodes["model"] = {"class_type": "GAGDemoLoader", "inputs": {}}
            for name, text in (("positive", "a red circle above a blue square"), ("negative", "")):
                nodes[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": text}}
            size = {"width": 256, "height": 256, "batch_size": 1}
            nodes["latent"] = {"class_type": "EmptyLatentImage", "inputs": size}
        else:
            nodes["model"] = {"class_type": "SoakModel", "inputs": {"name": self.family}}
            # The prompts have two lengths, so the host repeats them to a common length.
            for name, tokens in (("positive", 14), ("negative", 7)):
                nodes[name] = {"class_type": "SoakPrompt", "inputs": {"seed": tokens, "tokens": tokens}}
            nodes["latent"] = {"class_type": "SoakLatent", "inputs": {"name": self.family}}
        model = "model"
        for index, guidance in enumerate(self.guidances):
            name = f"guidance {index}"
            nodes[name] = {**guidance, "inputs": {"model": [model, 0], **guidance["inputs"]}}
            model = name
        nodes[SAMPLER] = {
            "class_type": "KSampler",
            "inputs": {
                "model": [model, 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": self.seed,
                "steps": self.steps,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        }
        nodes["digest"] = {"class_type": "SoakDigest", "inputs": {"samples": [SAMPLER, 0], "tidy": tidy}}
        return nodes


CASES = [Case(family, guidances, seed) for seed, family in enumerate(FAMILIES, start=1) for guidances in GUIDANCES]


def digest(result: RunResult) -> str:
    """Return the digest of a run's latent; the sampler must have run."""
    assert result.status == "success", result.error
    ran = {data["node"] for event, data in result.messages if event == "executing"}
    assert SAMPLER in ran, "the result came from the server's cache"
    assert result.outputs["digest"]["finite"] == [True]
    return str(result.outputs["digest"]["digest"][0])


def interrupted(server: ComfyServer, case: Case) -> RunResult:
    """Run a graph and interrupt it after its first step."""
    stopped: list[Any] = []

    def stop(event: str, data: Any) -> None:
        if event == "progress" and not stopped:
            stopped.append(data)
            server.interrupt()

    return server.run(case.graph(), on_progress=stop)


@pytest.fixture(scope="module")
def fresh() -> dict[int, str]:
    """The digest of each case on a server that has not run it before."""
    with ComfyServer(cpu=True, node_files=[NODES]) as server:
        return {index: digest(server.run(case.graph())) for index, case in enumerate(CASES)}


def test_200_graphs_on_one_server_leave_nothing_behind(fresh: dict[int, str]) -> None:
    choose = random.Random(0)
    done: Counter[str] = Counter()
    sizes: list[int] = []
    last = -1
    with ComfyServer(cpu=True, node_files=[NODES]) as server:
        for number in range(1, GRAPHS + 1):
            measured = number in (WARM_UP, GRAPHS)
            action = "run" if measured else choose.choices(["run", "error", "interrupt"], [7, 1, 1])[0]
            done[action] += 1
            if action == "run":
                # The last case is not chosen again, because the server would take it from its cache.
                last = choose.choice([case for case in range(len(CASES)) if case != last])
                assert digest(server.run(CASES[last].graph(tidy=measured))) == fresh[last], CASES[last]
            elif action == "error":
                guidance, sentence = choose.choice(ERRORS)
                result = server.run(Case(choose.choice(FAMILIES), [simple(), guidance]).graph())
                assert result.status == "error"
                assert sentence in result.error
            else:
                case = Case(choose.choice(FAMILIES), choose.choice(GUIDANCES), seed=1000 + number, steps=2000)
                assert interrupted(server, case).status == "interrupted"
            if measured:
                sizes.append(psutil.Process(server.pid).memory_info().rss)
        for index, case in enumerate(CASES):
            if case.guidances == OFF and index != last:
                assert digest(server.run(case.graph())) == fresh[index], "guidance is left although GAG is off"
    assert min(done[action] for action in ("run", "error", "interrupt")) >= 15
    grown = sizes[1] - sizes[0]
    assert grown < GROWTH, f"{grown / 2**20:.0f} MiB more in use after {GRAPHS} graphs than after {WARM_UP}"
