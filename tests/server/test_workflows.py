# SPDX-License-Identifier: GPL-3.0-or-later
"""The example workflows and the help pages: they fit the nodes as they are now, and the server offers them."""

from __future__ import annotations

import copy
import http.client
import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from comfy_server import ComfyServer, Json, RunResult, to_api

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
DEMO = ROOT / "workflows" / "gag_demo.json"
CATEGORIES = ("GAG/", "model/patch/GAG")
GUIDANCE = ("GAGuidance", "GAGuidanceAdvanced")
NOTES = ("Note", "MarkdownNote")  # known to the front end only
LATER_NODES = {"NAGuidance"}  # of ComfyUI, which the oldest ones that the pack runs on do not have
TITLE_HEIGHT = 30
BYPASSED = 4
SEED = 20260302  # no other test's, so that every node runs

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> Json:
    return server.object_info()


@pytest.fixture(scope="module")
def pack_folder(object_info: Json) -> str:
    """The name under which the server serves the pack's files."""
    return str(object_info["GAGuidance"]["python_module"].split(".")[1])


def test_there_is_a_workflow_for_every_family() -> None:
    assert [path.stem for path in WORKFLOWS] == [
        "gag_and_nag_flux_schnell",
        "gag_demo",
        "gag_flux_dev",
        "gag_flux_schnell",
        "gag_sd15",
        "gag_sdxl",
    ]


@every_workflow
def test_is_flat_and_has_unique_ids(path: Path) -> None:
    workflow = _load(path)
    assert workflow["version"] == 0.4
    assert "definitions" not in workflow  # subgraphs, which a front end that is a little older cannot read
    for ids, last in (
        ([node["id"] for node in workflow["nodes"]], workflow["last_node_id"]),
        ([link[0] for link in workflow["links"]], workflow["last_link_id"]),
    ):
        assert len(set(ids)) == len(ids)
        assert max(ids) <= last


@every_workflow
def test_links_agree_on_both_ends(path: Path) -> None:
    workflow = _load(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link_id, source, slot, target, place, kind in workflow["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert link_id in output["links"]
        assert link_id == entry["link"]
        assert output["type"] == entry["type"] == kind
    listed = Counter(link[0] for link in workflow["links"])
    leaving = Counter(link for node in nodes.values() for out in node.get("outputs", []) for link in out["links"])
    arriving = Counter(
        entry["link"] for node in nodes.values() for entry in node.get("inputs", []) if entry["link"] is not None
    )
    assert listed == leaving == arriving


@every_workflow
def test_nodes_do_not_overlap(path: Path) -> None:
    nodes = _load(path)["nodes"]
    for one, other in itertools.combinations(nodes, 2):
        apart = any(
            one["pos"][axis] + one["size"][axis] <= other["pos"][axis] - margin
            or other["pos"][axis] + other["size"][axis] <= one["pos"][axis] - margin
            for axis, margin in ((0, 0), (1, TITLE_HEIGHT))
        )
        assert apart, f"{one['type']} ({one['id']}) and {other['type']} ({other['id']}) overlap"


@every_workflow
def test_says_what_to_try(path: Path) -> None:
    assert any(node["type"] in NOTES and "GAG" in node["widgets_values"][0] for node in _load(path)["nodes"])


@every_workflow
def test_fits_the_nodes_of_the_server(path: Path, object_info: Json) -> None:
    workflow = _load(path)
    _skip_if_too_new(workflow, object_info)
    models = {model["name"] for node in workflow["nodes"] for model in _models(node)}
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            assert set(_sockets(node)) == set(_specs(object_info[node["type"]])), node["type"]
    prompt = to_api(workflow, object_info)
    for node_id, node in prompt.items():
        info = object_info[node["class_type"]]
        specs = _specs(info)
        assert set(info["input"].get("required", {})) <= set(node["inputs"]) <= set(specs)
        for name, value in node["inputs"].items():
            where = f"{node['class_type']} ({node_id}): {name}"
            if isinstance(value, list):
                source, slot = value
                assert object_info[prompt[source]["class_type"]]["output"][slot] == specs[name][0], where
            elif value not in models:  # the server offers only those that are there
                _assert_valid(value, specs[name], where)


@every_workflow
def test_gag_is_between_loader_and_sampler(path: Path, object_info: Json) -> None:
    workflow = _load(path)
    _skip_if_too_new(workflow, object_info)
    prompt = to_api(workflow, object_info)
    samplers = [node for node in prompt.values() if "sampler_name" in node["inputs"]]
    assert samplers
    for sampler in samplers:
        above = []
        node = sampler
        while "model" in node["inputs"]:
            node = prompt[node["inputs"]["model"][0]]
            above.append(node["class_type"])
        assert any(kind in GUIDANCE for kind in above[:-1])
        assert above[-1] not in GUIDANCE


@every_workflow
def test_loaders_say_where_their_files_come_from(path: Path, object_info: Json) -> None:
    for node in _load(path)["nodes"]:
        files = [value for value in node.get("widgets_values", []) if str(value).endswith(".safetensors")]
        assert [model["name"] for model in _models(node)] == files, node["type"]
        for model in _models(node):
            assert set(model) == {"name", "url", "directory"}
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith("/" + model["name"])


@every_workflow
def test_is_offered_as_a_template_with_a_thumbnail(path: Path, server: ComfyServer, pack_folder: str) -> None:
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 80_000
    with Image.open(thumbnail) as picture:
        picture.load()
        assert picture.format == "JPEG"
        assert picture.width >= 500
    assert path.stem in json.loads(_get(server, "/api/workflow_templates"))[pack_folder]
    for file in (path, thumbnail):
        assert _get(server, f"/api/workflow_templates/{pack_folder}/{file.name}") == file.read_bytes()


def test_demo_runs_with_gag_and_with_gag_bypassed(server: ComfyServer, object_info: Json) -> None:
    workflow = _load(DEMO)
    (sampler,) = (node for node in workflow["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][0] = SEED
    bypassed = copy.deepcopy(workflow)
    (gag,) = (node for node in bypassed["nodes"] if node["type"] in GUIDANCE)
    gag["mode"] = BYPASSED

    guided_pictures, guided_run = _pictures_of_run(server, workflow, object_info)
    plain_pictures, plain_run = _pictures_of_run(server, bypassed, object_info)

    assert len(guided_pictures) == len(plain_pictures) == 4
    for guided, plain in zip(guided_pictures, plain_pictures, strict=True):
        assert guided.size == plain.size
        assert guided.tobytes() != plain.tobytes()
    (text,) = _progress_texts(guided_run)
    assert text["node"] == str(gag["id"])
    assert text["text"].startswith("Guided 4 of 4 attentions in 12 of 12 calls")
    assert not _progress_texts(plain_run)


def test_every_node_has_a_help_page(server: ComfyServer, object_info: Json, pack_folder: str) -> None:
    ids = [node_id for node_id, info in object_info.items() if info["category"].startswith(CATEGORIES)]
    assert sorted(ids) == sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
    for node_id in ids:
        page = _get(server, f"/extensions/{pack_folder}/docs/{node_id}.md").decode()
        assert page.startswith(f"# {object_info[node_id]['display_name']}\n")
        for name, spec in _specs(object_info[node_id]).items():
            assert f"\n- **{name}**: " in page, f"{node_id} does not explain {name}"
            for option in _options(spec) or []:
                assert option in page, f"{node_id} does not mention {option} of {name}"


def test_every_input_and_output_has_a_tooltip(object_info: Json) -> None:
    for node_id, info in object_info.items():
        if info["category"].startswith(CATEGORIES):
            assert info["description"], node_id
            assert all(spec[1]["tooltip"] for spec in _specs(info).values()), node_id
            assert all(info["output_tooltips"]), node_id


def _load(path: Path) -> Json:
    workflow: Json = json.loads(path.read_text(encoding="utf-8"))
    return workflow


def _skip_if_too_new(workflow: Json, object_info: Json) -> None:
    if missing := {node["type"] for node in workflow["nodes"]} & LATER_NODES - set(object_info):
        pytest.skip(f"this ComfyUI does not have {', '.join(missing)} yet")


def _models(node: Json) -> list[dict[str, str]]:
    models: list[dict[str, str]] = node["properties"].get("models", [])
    return models


def _sockets(node: Json) -> list[str]:
    return [entry["name"] for entry in node["inputs"]]


def _specs(info: Json) -> dict[str, list[Any]]:
    """The inputs of a node type by name: [type or options, {settings}]."""
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def _options(spec: list[Any]) -> list[Any] | None:
    """What a combo box offers; None for other inputs."""
    if isinstance(spec[0], list):
        return spec[0]
    options: list[Any] | None = spec[1].get("options") if spec[0] == "COMBO" else None
    return options


def _assert_valid(value: object, spec: list[Any], where: str) -> None:
    options = _options(spec)
    if options is not None:
        assert value in options, where
        return
    settings = spec[1] if len(spec) > 1 else {}
    allowed: dict[str, type | tuple[type, ...]] = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    assert isinstance(value, allowed[spec[0]]), where
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        assert settings.get("min", value) <= value <= settings.get("max", value), where


def _pictures_of_run(server: ComfyServer, workflow: Json, object_info: Json) -> tuple[list[Image.Image], RunResult]:
    """Queue a workflow as the front end does; its pictures, each with the workflow and the prompt embedded in it."""
    prompt = to_api(workflow, object_info)
    run = server.run(prompt, workflow)
    assert run.status == "success", run.error
    pictures: list[Image.Image] = [Image.open(io.BytesIO(data)) for data in server.images(run)]
    for picture in pictures:
        assert picture.format == "PNG"
        assert json.loads(picture.info["workflow"]) == workflow
        assert json.loads(picture.info["prompt"]) == prompt
    return pictures, run


def _progress_texts(run: RunResult) -> list[dict[str, str]]:
    return [data for kind, data in run.messages if kind == "progress_text"]


def _get(server: ComfyServer, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, f"{path}: {answer.status}"
        return body
    finally:
        connection.close()
