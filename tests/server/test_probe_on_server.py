# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo workflow of the probe on a real server: its report is on the node and in a file, and belongs to that run."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from comfy_server import ComfyServer, Json, RunResult, to_api

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "gag_12_probe.json"
BYPASSED = 4
_seeds = iter(range(7_000, 8_000))


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> Json:
    return server.object_info()


def run(server: ComfyServer, object_info: Json, seed: int, **changes: object) -> tuple[RunResult, Json]:
    """Run the demo workflow with a seed, with other inputs of the probe, and without GAG or without the probe."""
    workflow: Json = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"] == "GAGuidance" and changes.get("without_gag"):
            node["mode"] = BYPASSED
    prompt = to_api(workflow, object_info)
    decoded = [id_of(prompt, "VAEDecode"), 0]
    prompt["saved"] = {"class_type": "SaveImage", "inputs": {"images": decoded, "filename_prefix": "GAG_probe"}}
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["seed"] = seed
        if node["class_type"] == "GAGProbe":
            node["inputs"].update({name: value for name, value in changes.items() if name in node["inputs"]})
    if changes.get("without_probe"):
        sampler = next(node for node in prompt.values() if node["class_type"] == "KSampler")
        probe = prompt.pop(sampler["inputs"]["model"][0])
        sampler["inputs"]["model"] = probe["inputs"]["model"]
        report = next(key for key, node in prompt.items() if node["class_type"] == "GAGReport")
        del prompt[report]
    return server.run(prompt), prompt


def id_of(prompt: Json, node_type: str) -> str:
    return next(key for key, node in prompt.items() if node["class_type"] == node_type)


def pixels(server: ComfyServer, result: RunResult) -> list[bytes]:
    """Return the pixels of the pictures in the output folder."""
    return [Image.open(io.BytesIO(data)).tobytes() for data in server.images(result)]


def report_of(server: ComfyServer, result: RunResult, prompt: Json) -> Json:
    """Return the contents of the JSON file that the node names."""
    shown = result.outputs[id_of(prompt, "GAGReport")]
    _, path = shown["text"]
    data: Json = json.loads((server.base / path).read_text(encoding="utf-8"))
    return data


def test_the_report_belongs_to_the_run_before_it(server: ComfyServer, object_info: Json) -> None:
    seed = next(_seeds)
    result, prompt = run(server, object_info, seed)
    assert result.status == "success", result.error
    data = report_of(server, result, prompt)
    summary, _ = result.outputs[id_of(prompt, "GAGReport")]["text"]
    assert summary == data["summary"]
    assert summary.startswith("Guidance acted in 4 of the model's 5 attentions and in ")
    assert data["layers"] == ["d0", "d1", "m0", "u0", "u1"]
    assert len(data["step_sigmas"]) == 12
    assert data["words"] == ["red", "circle", "blue", "square"]
    pages = [entry for entry in result.outputs[id_of(prompt, "GAGReport")]["images"] if entry["type"] == "temp"]
    assert len(pages) == 1, "the words"
    shown_texts = {data["node"]: data["text"] for event, data in result.messages if event == "progress_text"}
    assert shown_texts[id_of(prompt, "GAGProbe")] == "Measured 5 attentions in 12 model calls."
    assert shown_texts[id_of(prompt, "GAGReport")].startswith("Guidance acted in 4 of the model's 5 attentions")

    # The host does not run the probe's node again, and still another seed has other measures.
    again, prompt = run(server, object_info, next(_seeds))
    assert report_of(server, again, prompt)["measures"] != data["measures"]


def test_the_probe_does_not_change_the_pictures(server: ComfyServer, object_info: Json) -> None:
    seed = next(_seeds)
    with_probe, prompt = run(server, object_info, seed)
    without, _ = run(server, object_info, seed, without_probe=True)
    assert without.status == with_probe.status == "success", without.error
    pages = len(result_images(with_probe, id_of(prompt, "GAGReport")))
    assert pages == 1
    saved = result_images(with_probe, id_of(prompt, "SaveImage"))
    assert len(saved) == 2
    assert pixels(server, without) == pixels_of(server, with_probe, id_of(prompt, "SaveImage"))


def result_images(result: RunResult, node: str) -> list[Json]:
    images: list[Json] = result.outputs[node].get("images", [])
    return images


def pixels_of(server: ComfyServer, result: RunResult, node: str) -> list[bytes]:
    only = RunResult(result.prompt_id, result.status, result.error, {node: result.outputs[node]}, [])
    return pixels(server, only)


def test_without_gag_the_report_is_about_the_default_preset(server: ComfyServer, object_info: Json) -> None:
    result, prompt = run(server, object_info, next(_seeds), without_gag=True)
    assert result.status == "success", result.error
    summary = report_of(server, result, prompt)["summary"]
    assert summary.startswith("No guidance acted; the numbers are for the preset auto at strength ")


def test_equal_probes_of_two_models_have_their_own_reports(server: ComfyServer, object_info: Json) -> None:
    """The host would otherwise reuse the output of an equal node from its cache."""
    seed = next(_seeds)
    _, graph = run(server, object_info, seed)
    gag, probe, sampler, report = (
        id_of(graph, node_type) for node_type in ("GAGuidance", "GAGProbe", "KSampler", "GAGReport")
    )
    loader = graph[gag]["inputs"]["model"]
    for copy_name, strength in (("first", 0.25), ("second", 2.0)):
        nodes = {
            name: copy.deepcopy(graph[node])
            for name, node in (("gag", gag), ("probe", probe), ("sampler", sampler), ("report", report))
        }
        nodes["probe"]["inputs"].update(model=loader, words="")
        nodes["gag"]["inputs"].update(model=[f"{copy_name} probe", 0], strength=strength)
        nodes["sampler"]["inputs"]["model"] = [f"{copy_name} gag", 0]
        nodes["report"]["inputs"].update(probe=[f"{copy_name} probe", 1], latent=[f"{copy_name} sampler", 0])
        nodes["report"]["inputs"].pop("images")
        graph |= {f"{copy_name} {name}": node for name, node in nodes.items()}
    for prefix in ("one", "two"):  # in the second run only the first report runs again
        graph["first report"]["inputs"]["filename_prefix"] = prefix
        result = server.run(graph)
        assert result.status == "success", result.error
        _, path = result.outputs["first report"]["text"]
        data = json.loads((server.base / path).read_text(encoding="utf-8"))
        assert set(data["strengths"]) == {0.25}


def test_a_word_that_is_not_in_the_prompt_is_refused_in_a_sentence(server: ComfyServer, object_info: Json) -> None:
    result, _ = run(server, object_info, next(_seeds), words="red, dog")
    assert result.status == "error"
    assert 'words: "dog" is not in the prompt; write words as they stand there, with commas between.' in result.error
