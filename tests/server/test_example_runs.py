# SPDX-License-Identifier: GPL-3.0-or-later
"""The example workflows on a server that has stand-ins for their models (see standins.py).

Where no small stand-in is possible, the file is empty. The server then checks the graph, and its loaders fail.
"""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import standins
from comfy_server import ComfyServer, Json, RunResult, to_api

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}
BYPASSED = 4
# Workflows whose models have stand-ins, and the number of guided attentions of each GAG node.
RUN = {
    "gag_02_sd15": [3],
    "gag_03_sdxl": [21],
    "gag_04_sdxl_lightning": [21],
    "gag_09_wan_t2v": [2],
}
# The other workflows. Those of the demo model need no files.
DEMOS = ("gag_01_demo", "gag_11_sweep", "gag_12_probe")
CHECKED = [name for name in WORKFLOWS if name not in RUN and name not in DEMOS]
# Sizes and lengths that are small enough for a test.
SMALL = {"width": 128, "height": 128, "length": 5, "steps": 6}
LOADERS = ("CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("models")
    for name, make in standins.FILES.items():
        standins.write(base / "models" / name, make())
    for workflow in map(_load, WORKFLOWS.values()):
        for model in (model for node in workflow["nodes"] for model in node["properties"].get("models", [])):
            path = base / "models" / model["directory"] / model["name"]
            if not path.exists():
                standins.write(path, {})
    with ComfyServer(base, cpu=True, node_files=[Path(__file__).with_name("prompt_nodes.py")]) as running:
        running.upload_image("example.png", _drawing())  # this file comes with ComfyUI
        yield running


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> Json:
    return server.object_info()


@pytest.mark.parametrize("name", RUN)
def test_a_workflow_runs_and_is_guided(name: str, server: ComfyServer, object_info: Json) -> None:
    guided, plain = (server.run(_small(_graph(name, object_info, bypass))) for bypass in (False, True))
    for run in (guided, plain):
        assert run.status == "success", run.error
    texts = [data["text"] for event, data in guided.messages if event == "progress_text"]
    report = re.compile(r"Guided (\d+) of (\d+) attentions in (\d+) of (\d+) calls\.(?: Strength .*)?")
    counts = [report.fullmatch(text) for text in texts]
    assert [(int(count[1]), int(count[2])) for count in counts if count] == [(n, n) for n in RUN[name]], texts
    guided_calls, all_calls = (sum(int(count[part]) for count in counts if count) for part in (3, 4))
    assert 0 < guided_calls <= all_calls, texts  # beside CFG the first steps are not guided
    assert "lora key not loaded" not in server.log()
    first, second = _frames(server, guided), _frames(server, plain)
    assert first and len(first) == len(second)
    for one in first:
        assert max(one) - min(one) > 16, "the picture is empty"
    changed = [one != other for one, other in zip(first, second, strict=True)]
    samplers = sum(node["type"] == "KSampler" for node in _load(WORKFLOWS[name])["nodes"])
    # With two samplers, one makes the picture without GAG.
    assert sorted(changed) == ([False, True] if samplers == 2 else [True] * len(changed)), "guidance changed nothing"


@pytest.mark.parametrize("name", CHECKED)
def test_a_workflow_is_accepted_if_its_models_are_there(name: str, server: ComfyServer, object_info: Json) -> None:
    graph = _graph(name, object_info)
    result = server.run(graph)  # a graph that the server does not accept raises
    (error,) = (data for event, data in result.messages if event == "execution_error")
    assert graph[error["node_id"]]["class_type"] in LOADERS, result.error


def _load(path: Path) -> Json:
    workflow: Json = json.loads(path.read_text(encoding="utf-8"))
    return workflow


def _graph(name: str, object_info: Json, bypass: bool = False) -> Json:
    """Return a workflow in API form; ``bypass`` bypasses its GAG nodes."""
    workflow = _load(WORKFLOWS[name])
    if missing := {node["type"] for node in workflow["nodes"]} - set(object_info) - {"Note", "MarkdownNote"}:
        pytest.skip(f"this ComfyUI does not have {', '.join(sorted(missing))}")
    for node in workflow["nodes"]:
        if bypass and node["type"].startswith("GAG"):
            node["mode"] = BYPASSED
    return to_api(workflow, object_info)


def _small(graph: Json) -> Json:
    """Return a graph with fewer pixels and steps, and random prompts where the text encoder has no stand-in."""
    graph = copy.deepcopy(graph)
    for index, node in enumerate(graph.values()):
        for name, value in node["inputs"].items():
            if name in SMALL and not isinstance(value, list):
                node["inputs"][name] = SMALL[name]
        if node["class_type"] == "CLIPTextEncode" and graph[node["inputs"]["clip"][0]]["class_type"] == "CLIPLoader":
            node.update(class_type="RandomPrompt", inputs={"seed": index, "tokens": 16, "width": 4096})
    return {key: node for key, node in graph.items() if node["class_type"] != "CLIPLoader"}


def _frames(server: ComfyServer, run: RunResult) -> list[bytes]:
    """Return the pixels of each saved picture, and of each frame of a saved video."""
    saved = {
        node: {"images": [picture for picture in output.get("images", []) if picture["type"] == "output"]}
        for node, output in run.outputs.items()
    }
    frames: list[bytes] = []
    for data in server.images(replace(run, outputs=saved)):
        frames += (
            _frames_of_video(data) if data[4:8] == b"ftyp" else [Image.open(io.BytesIO(data)).convert("RGB").tobytes()]
        )
    return frames


def _frames_of_video(data: bytes) -> list[bytes]:
    import av

    with av.open(io.BytesIO(data)) as video:
        return [frame.to_image().convert("RGB").tobytes() for frame in video.decode(video=0)]


def _drawing() -> bytes:
    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).ellipse((60, 60, 200, 200), fill="navy")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
