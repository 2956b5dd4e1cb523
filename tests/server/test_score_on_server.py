# SPDX-License-Identifier: GPL-3.0-or-later
"""GAG Score on a real server: it counts right pictures of the demo, and compares the settings of a sweep."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from comfy_server import ComfyServer, Json, to_api

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def graph(server: ComfyServer) -> Json:
    """The demo workflow in API form with GAG Score behind it, with an unused seed, four steps and six pictures."""
    flow = json.loads((ROOT / "workflows" / "gag_01_demo.json").read_text(encoding="utf-8"))
    found = to_api(flow, server.object_info())
    for node in found.values():
        if "seed" in node["inputs"]:
            node["inputs"].update(seed=20261130, steps=4)
        if "batch_size" in node["inputs"]:
            node["inputs"]["batch_size"] = 6
    with_gag, without = (node_id for node_id, node in found.items() if node["class_type"] == "VAEDecode")
    (loader,) = (node_id for node_id, node in found.items() if node["class_type"] == "GAGDemoLoader")
    prompt = next(node["inputs"]["text"] for node in found.values() if node["class_type"] == "CLIPTextEncode")
    inputs = {"images": [with_gag, 0], "baseline": [without, 0], "prompt": prompt, "clip": [loader, 1]}
    found["score"] = {"class_type": "GAGScore", "inputs": inputs}
    return found


def shown(server: ComfyServer, graph: Json) -> str:
    """Run a graph, and return the text of GAG Score, which must be the same on the node and in the output."""
    result = server.run(graph)
    assert result.status == "success", result.error
    (node_id,) = (node_id for node_id, node in graph.items() if node["class_type"] == "GAGScore")
    (text,) = result.outputs[node_id]["text"]
    assert text in [data["text"] for event, data in result.messages if event == "progress_text"]
    return str(text)


def test_pictures_of_the_demo_are_counted_in_pairs(server: ComfyServer, graph: Json) -> None:
    first, *_ = shown(server, graph).splitlines()
    assert "of 6 pictures right; baseline " in first and "; on 6 pairs " in first


def test_a_sweep_is_compared_with_its_pictures_without_gag(server: ComfyServer, graph: Json) -> None:
    (gag,) = (node_id for node_id, node in graph.items() if node["class_type"] == "GAGuidance")
    sweep = {"model": [gag, 0], "field": "guidance_scale", "values": "1, 10", "field_2": "none", "values_2": ""}
    swept = copy.deepcopy(graph)
    swept["sweep"] = {"class_type": "GAGSweep", "inputs": {**sweep, "include_off": True}}
    for node in swept.values():
        if node["class_type"] == "KSampler" and node["inputs"]["model"] == [gag, 0]:
            node["inputs"]["model"] = ["sweep", 0]
    del swept["score"]["inputs"]["baseline"]
    swept["score"]["inputs"]["labels"] = ["sweep", 1]
    off, one, ten, about = shown(server, swept).splitlines()
    assert off.startswith("without GAG: ") and one.startswith("guidance_scale 1: ")
    assert ten.startswith("guidance_scale 10: ") and "; without GAG " in ten and "on 6 pairs " in ten
    assert "corrected for 2 comparisons" in about
