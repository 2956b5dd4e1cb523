# SPDX-License-Identifier: GPL-3.0-or-later
"""GAG Score on a real server: the demo workflow counts right pictures, and a sweep compares its settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comfy_server import ComfyServer, Json, to_api

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def graph(server: ComfyServer) -> Json:
    """The demo workflow in API form, with an unused seed and four steps."""
    flow = json.loads((ROOT / "workflows" / "gag_demo_score.json").read_text(encoding="utf-8"))
    found = to_api(flow, server.object_info())
    for node in found.values():
        if "seed" in node["inputs"]:
            node["inputs"].update(seed=20261130, steps=4)
    found["4"]["inputs"]["batch_size"] = 6
    return found


def shown(server: ComfyServer, graph: Json) -> str:
    """Run a graph, and return the text of GAG Score, which must be the same on the node and in the output."""
    result = server.run(graph)
    assert result.status == "success", result.error
    (node_id,) = (node_id for node_id, node in graph.items() if node["class_type"] == "GAGScore")
    (text,) = result.outputs[node_id]["text"]
    assert text in [data["text"] for event, data in result.messages if event == "progress_text"]
    return str(text)


def test_the_demo_workflow_counts_pairs(server: ComfyServer, graph: Json) -> None:
    first, *_ = shown(server, graph).splitlines()
    assert "of 6 pictures right; baseline " in first and "; on 6 pairs " in first


def test_a_sweep_is_compared_with_its_pictures_without_gag(server: ComfyServer, graph: Json) -> None:
    sweep = {"model": ["6", 0], "field": "guidance_scale", "values": "1, 10", "field_2": "none", "values_2": ""}
    swept = {node_id: node for node_id, node in graph.items() if node_id not in ("9", "10")}
    swept["sweep"] = {"class_type": "GAGSweep", "inputs": {**sweep, "include_off": True}}
    swept["7"] = {**graph["7"], "inputs": {**graph["7"]["inputs"], "model": ["sweep", 0]}}
    inputs = {name: value for name, value in graph["11"]["inputs"].items() if name != "baseline"}
    swept["11"] = {**graph["11"], "inputs": {**inputs, "labels": ["sweep", 1]}}
    off, one, ten, about = shown(server, swept).splitlines()
    assert off.startswith("without GAG: ") and one.startswith("guidance_scale 1: ")
    assert ten.startswith("guidance_scale 10: ") and "; without GAG " in ten and "on 6 pairs " in ten
    assert "corrected for 2 comparisons" in about
