# SPDX-License-Identifier: GPL-3.0-or-later
"""Workflows with a sweep and with a schedule on a real server: one run makes all pictures."""

from __future__ import annotations

import copy
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from comfy_server import ComfyServer, Json, RunResult, to_api

ROOT = Path(__file__).resolve().parents[2]
_seeds = itertools.count(5000)


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> Json:
    return server.object_info()


def workflow(name: str, object_info: Json) -> Json:
    """Return a workflow in API form, with an unused seed and four steps."""
    flow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    graph = to_api(flow, object_info)
    for node in graph.values():
        if "seed" in node["inputs"]:
            node["inputs"].update(seed=next(_seeds), steps=4)
    return graph


def id_of(graph: Json, node_type: str) -> str:
    """Return the id of the only node of a type."""
    (found,) = (node_id for node_id, node in graph.items() if node["class_type"] == node_type)
    return found


def pictures(server: ComfyServer, result: RunResult) -> list[Image.Image]:
    assert result.status == "success", result.error
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in server.images(result)]


def texts(result: RunResult, node: str) -> list[str]:
    return [data["text"] for event, data in result.messages if event == "progress_text" and data["node"] == node]


def test_one_run_makes_all_pictures_and_each_equals_one_set_by_hand(server: ComfyServer, object_info: Json) -> None:
    graph = workflow("gag_11_sweep", object_info)
    sweep, sampler, decode = (id_of(graph, node_type) for node_type in ("GAGSweep", "KSampler", "VAEDecode"))
    graph[sweep]["inputs"].update(
        field="guidance_scale", values="2, 10", field_2="orthogonal_scale", values_2="0, 1", include_off=True
    )
    # GAG (advanced) sets the same by hand below.
    inputs = {"model": graph[sweep]["inputs"]["model"], "preset": "paper", "strength": 1.0}
    graph["gag"] = {"class_type": "GAGuidance", "inputs": inputs}
    graph[sweep]["inputs"]["model"] = ["gag", 0]
    paper = {"rule": "gag", "norm_threshold": 15.0, "norm_mode": "absolute", "adapt_to_cfg": False}
    with_each = copy.deepcopy(graph)
    # Save each picture of the sampler beside the grid.
    with_each["all"] = {"class_type": "SaveImage", "inputs": {"images": [decode, 0], "filename_prefix": "each"}}
    result = server.run(with_each)
    assert len(texts(result, sweep)) == 4
    assert set(texts(result, sweep)) == {"Guided 4 of 4 attentions in 4 of 4 calls."}
    found = pictures(server, result)
    (grid,) = (picture for picture in found if picture.width > 256)
    each = [picture for picture in found if picture.width == 256]
    batch = graph[id_of(graph, "EmptyLatentImage")]["inputs"]["batch_size"]
    assert len(each) == 5 * batch

    by_hand: list[Image.Image] = []
    settings: list[dict[str, float] | None] = [None]
    settings += [{"guidance_scale": scale, "orthogonal_scale": part} for scale in (2.0, 10.0) for part in (0.0, 1.0)]
    for setting in settings:
        single = copy.deepcopy(graph)
        model: list[Any] = [id_of(graph, "GAGDemoLoader"), 0]
        if setting is not None:
            defaults = {
                name: spec[1]["default"]
                for name, spec in object_info["GAGuidanceAdvanced"]["input"]["required"].items()
                if "default" in spec[1]
            }
            inputs = {**defaults, **paper, "model": model, **setting}
            single["by hand"] = {"class_type": "GAGuidanceAdvanced", "inputs": inputs}
            model = ["by hand", 0]
        single[sampler]["inputs"]["model"] = model
        for node_type in ("GAGGrid", "GAGSweep", "SaveImage"):
            del single[id_of(single, node_type)]
        single["save"] = {"class_type": "SaveImage", "inputs": {"images": [decode, 0], "filename_prefix": "one"}}
        by_hand += pictures(server, server.run(single))
    assert [picture.tobytes() for picture in each] == [picture.tobytes() for picture in by_hand]
    assert len({picture.tobytes() for picture in each}) == len(each)

    # The grid has each picture as it is: the picture without GAG in the first row, then two rows of two.
    corners = [corner_of(grid, picture) for picture in each[::batch]]
    assert [top for _, top in corners] == sorted(top for _, top in corners)
    assert len({top for _, top in corners}) == 3
    assert corners[0][0] == corners[1][0] == corners[3][0] < corners[2][0] == corners[4][0]


def corner_of(grid: Image.Image, picture: Image.Image) -> tuple[int, int]:
    """Return left and top of a picture in the grid."""
    found = [
        (left, top)
        for top in range(grid.height - 255)
        for left in range(grid.width - 255)
        if grid.getpixel((left, top)) == picture.getpixel((0, 0))
        and grid.getpixel((left + 255, top + 255)) == picture.getpixel((255, 255))
        and grid.crop((left, top, left + 256, top + 256)).tobytes() == picture.tobytes()
    ]
    assert len(found) == 1
    return found[0]


def test_the_workflow_of_a_sweep_makes_its_grid(server: ComfyServer, object_info: Json) -> None:
    graph = workflow("gag_11_sweep", object_info)
    result = server.run(graph)
    (grid,) = pictures(server, result)
    assert grid.width > 1000 and grid.height > 1000
    (values,) = (node["inputs"]["values"] for node in graph.values() if node["class_type"] == "GAGSweep")
    assert len(texts(result, id_of(graph, "GAGSweep"))) == len(values.split(","))


def test_each_picture_of_a_sweep_has_its_report(server: ComfyServer, object_info: Json) -> None:
    graph = workflow("gag_11_sweep", object_info)
    sweep = graph[id_of(graph, "GAGSweep")]["inputs"]
    graph["probe"] = {"class_type": "GAGProbe", "inputs": {"model": sweep["model"], "words": ""}}
    sweep.update(model=["probe", 0], field="strength", values="0.5, 1, 2", field_2="none", include_off=True)
    graph["report"] = {
        "class_type": "GAGReport",
        "inputs": {"probe": ["probe", 1], "latent": [id_of(graph, "KSampler"), 0], "filename_prefix": "sweep"},
    }
    result = server.run(graph)
    assert result.status == "success", result.error
    shown = result.outputs["report"]["text"]
    for index, strength in enumerate([0.0, 0.5, 1.0, 2.0]):
        summary, path = shown[2 * index : 2 * index + 2]
        assert summary.startswith(f"Run {index + 1} of 4. ")
        data = json.loads((server.base / path).read_text(encoding="utf-8"))
        assert set(data["strengths"]) == {strength}


@pytest.fixture
def scheduled(object_info: Json) -> Json:
    """The demo workflow, with a schedule for its GAG node and an unused seed for both samplers."""
    graph = workflow("gag_01_demo", object_info)
    inputs = {"kind": "linear", "over": "steps", "start_value": 1.0, "end_value": 0.0, "start": 0.0, "end": 0.6}
    graph["schedule"] = {"class_type": "GAGSchedule", "inputs": inputs}
    graph[id_of(graph, "GAGuidance")]["inputs"].update(preset="no CFG", schedule=["schedule", 0])
    seed = next(_seeds)
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["seed"] = seed
    return graph


def test_a_schedule_shows_its_curve_and_counts_the_steps(server: ComfyServer, scheduled: Json) -> None:
    result = server.run(scheduled)
    assert result.status == "success", result.error
    (shown,) = result.outputs["schedule"]["images"]
    assert shown["type"] == "temp"
    # The steps are at 0, 1/3, 2/3 and 1 of the run; from 0.6 on the factor is 0.
    assert texts(result, id_of(scheduled, "GAGuidance")) == ["Guided 4 of 4 attentions in 2 of 4 calls."]


def test_a_schedule_of_0_gives_the_picture_without_gag_and_the_node_says_so(
    server: ComfyServer, scheduled: Json
) -> None:
    scheduled["schedule"]["inputs"].update(kind="constant", end_value=0.0)
    result = server.run(scheduled)
    assert texts(result, id_of(scheduled, "GAGuidance")) == ["Nothing guided: its schedule is 0."]
    assert "GAG guided nothing in this run: its schedule is 0 in all steps of the run." in server.log()
    saved = [
        output["images"]
        for node_id, output in result.outputs.items()
        if scheduled[node_id]["class_type"] == "SaveImage"
    ]
    assert len(saved) == 2
    plain, off = (pictures_of(server, images) for images in saved)
    assert plain == off


def pictures_of(server: ComfyServer, images: list[Json]) -> list[bytes]:
    result = RunResult("", "success", "", {"one": {"images": images}}, [])
    return [picture.tobytes() for picture in pictures(server, result)]


def test_bad_values_give_an_error_of_one_sentence_on_the_node(server: ComfyServer, object_info: Json) -> None:
    graph = workflow("gag_11_sweep", object_info)
    sweep = id_of(graph, "GAGSweep")
    graph[sweep]["inputs"]["values"] = "1, two"
    result = server.run(graph)
    assert result.status == "error"
    (error,) = (data for event, data in result.messages if event == "execution_error")
    assert error["node_id"] == sweep
    assert "guidance_scale must be values such as 1, 2, 5 or 0..10 in 6, got 'two'." in error["exception_message"]
