# SPDX-License-Identifier: GPL-3.0-or-later
"""The example workflows and the help pages fit the current nodes, and the server offers them."""

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
GUIDANCE = ("GAGuidance", "GAGuidanceAdvanced", "GAGAnderson", "GAGSweep")
NOTES = ("Note", "MarkdownNote")  # known to the front end only
# First tested release of ComfyUI that has all nodes and the model of a workflow. The workflow's note names it too. The
# other workflows run in every release that the pack supports.
SINCE = {
    "gag_and_nag_flux_schnell": "0.20.0",
    "gag_flux2_dev": "0.3.75",
    "gag_flux2_klein": "0.12.3",
    "gag_z_image_turbo": "0.3.75",
}
# Folder of the files that each input of a loader offers.
FOLDERS = {
    "ckpt_name": "checkpoints",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "control_net_name": "controlnet",
    "lora_name": "loras",
    "unet_name": "diffusion_models",
    "vae_name": "vae",
}
IN_COMFYUI = {"image": "example.png"}  # files that ComfyUI's input folder has from the start
TITLE_HEIGHT = 30
BYPASSED = 4
SEED = 20260302  # unused in other tests, so that every node runs

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> Json:
    return server.object_info()


@pytest.fixture(scope="module")
def pack_folder(object_info: Json) -> str:
    """The name under which the server serves the pack's files."""
    return str(object_info["GAGuidance"]["python_module"].split(".")[1])


def test_the_list_of_workflows_is_complete() -> None:
    assert [path.stem for path in WORKFLOWS] == [
        "gag_and_nag_flux_schnell",
        "gag_demo",
        "gag_demo_anderson",
        "gag_demo_compare",
        "gag_demo_few_step",
        "gag_demo_probe",
        "gag_demo_schedule",
        "gag_demo_score",
        "gag_demo_sweep",
        "gag_demo_transformer",
        "gag_flux2_dev",
        "gag_flux2_klein",
        "gag_flux_dev",
        "gag_flux_kontext",
        "gag_flux_schnell",
        "gag_qwen_image",
        "gag_sd15",
        "gag_sdxl",
        "gag_sdxl_controlnet",
        "gag_sdxl_lightning",
        "gag_wan22_t2v",
        "gag_z_image_turbo",
    ]


@every_workflow
def test_a_workflow_has_no_subgraphs_and_unique_ids(path: Path) -> None:
    workflow = _load(path)
    assert workflow["version"] == 0.4
    assert "definitions" not in workflow  # subgraphs, which slightly older front ends cannot read
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
    for link_id, source, slot, target, index, value_type in workflow["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][index]
        assert link_id in output["links"]
        assert link_id == entry["link"]
        assert output["type"] == value_type
        assert value_type in entry["type"].split(",")  # some inputs accept several types
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
def test_a_note_explains_the_workflow(path: Path) -> None:
    text = "".join(node["widgets_values"][0] for node in _load(path)["nodes"] if node["type"] in NOTES)
    assert "GAG" in text
    if path.stem in SINCE:
        assert "or later" in text, "the note does not say which ComfyUI it needs"


@every_workflow
def test_the_note_names_every_model_file(path: Path) -> None:
    nodes = _load(path)["nodes"]
    text = "".join(node["widgets_values"][0] for node in nodes if node["type"] in NOTES)
    for model in (model for node in nodes for model in _models(node)):
        if model["directory"] == "checkpoints" and "| file |" not in text:
            assert "`models/checkpoints`" in text
        else:
            assert f"`{model['name']}`" in text
            assert f"`{model['directory']}`" in text


@every_workflow
def test_a_workflow_fits_the_nodes_of_the_server(path: Path, server: ComfyServer, object_info: Json) -> None:
    workflow = _load(path)
    _skip_if_too_new(path, server, object_info)
    models = {model["name"] for node in workflow["nodes"] for model in _models(node)}
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            # Optional inputs may have been added after the workflow was saved.
            added = set(object_info[node["type"]]["input"].get("optional", {})) - set(_sockets(node))
            assert set(_sockets(node)) | added == set(_specs(object_info[node["type"]])), node["type"]
    prompt = to_api(workflow, object_info)
    for node_id, node in prompt.items():
        info = object_info[node["class_type"]]
        specs = _specs(info)
        specs |= _specs_of_options(node["inputs"], specs)
        assert set(info["input"].get("required", {})) <= set(node["inputs"]) <= set(specs)
        for name, value in node["inputs"].items():
            where = f"{node['class_type']} ({node_id}): {name}"
            if isinstance(value, list):
                source, slot = value
                assert object_info[prompt[source]["class_type"]]["output"][slot] in specs[name][0].split(","), where
            elif value not in models and IN_COMFYUI.get(name) != value:  # the server offers only files that exist
                _assert_valid(value, specs[name], where)


@every_workflow
def test_gag_is_between_loader_and_sampler(path: Path, server: ComfyServer, object_info: Json) -> None:
    _skip_if_too_new(path, server, object_info)
    prompt = to_api(_load(path), object_info)
    # Samplers and guiders are the nodes that take a model and do not return one.
    samplers = [
        node
        for node in prompt.values()
        if "model" in node["inputs"] and "MODEL" not in object_info[node["class_type"]]["output"]
    ]
    guided = []
    for sampler in samplers:
        above = []
        node = sampler
        while "model" in node["inputs"]:
            node = prompt[node["inputs"]["model"][0]]
            above.append(node["class_type"])
        guided.append(any(node_type in GUIDANCE for node_type in above[:-1]))
        assert above[-1] not in GUIDANCE
    # The demos may compare with a sampler without guidance.
    assert any(guided) if path.stem.startswith("gag_demo") else guided and all(guided)


@every_workflow
def test_loaders_have_the_sources_of_their_files(path: Path, object_info: Json) -> None:
    for node in _load(path)["nodes"]:
        files = [value for value in node.get("widgets_values", []) if str(value).endswith(".safetensors")]
        assert [model["name"] for model in _models(node)] == files, node["type"]
        for model in _models(node):
            assert set(model) == {"name", "url", "directory"}
            assert model["url"].startswith("https://huggingface.co/")
            assert "/resolve/main/" in model["url"]
            assert model["url"].endswith("/" + model["name"])
        if files:
            widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
            chosen = zip(widgets, node["widgets_values"], strict=True)
            folders = [FOLDERS[name] for name, value in chosen if value in files]
            assert [model["directory"] for model in _models(node)] == folders, node["type"]


def test_a_file_has_the_same_source_in_all_workflows() -> None:
    sources: dict[str, set[str]] = {}
    for model in (model for path in WORKFLOWS for node in _load(path)["nodes"] for model in _models(node)):
        sources.setdefault(model["name"], set()).add(model["url"])
    assert {name: urls for name, urls in sources.items() if len(urls) > 1} == {}


@every_workflow
def test_a_workflow_is_offered_as_a_template_with_a_thumbnail(
    path: Path, server: ComfyServer, pack_folder: str
) -> None:
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 80_000
    with Image.open(thumbnail) as picture:
        picture.load()
        assert picture.format == "JPEG"
        assert picture.width >= 500
    assert path.stem in json.loads(_get(server, "/api/workflow_templates"))[pack_folder]
    for file in (path, thumbnail):
        assert _get(server, f"/api/workflow_templates/{pack_folder}/{file.name}") == file.read_bytes()


def test_the_demo_runs_with_gag_and_with_gag_bypassed(server: ComfyServer, object_info: Json) -> None:
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
    assert text["text"] == "Guided 4 of 4 attentions in 12 of 12 calls. Strength was divided by 16, because CFG is 4."
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


def _skip_if_too_new(path: Path, server: ComfyServer, object_info: Json) -> None:
    """Skip a workflow whose nodes came with a later ComfyUI. Other workflows must have all their nodes."""
    missing = {node["type"] for node in _load(path)["nodes"]} - {*object_info, *NOTES}
    if missing and path.stem in SINCE and _number(server.version()) < _number(SINCE[path.stem]):
        pytest.skip(f"this ComfyUI does not have {', '.join(sorted(missing))} yet")


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _models(node: Json) -> list[dict[str, str]]:
    models: list[dict[str, str]] = node["properties"].get("models", [])
    return models


def _sockets(node: Json) -> list[str]:
    return [entry["name"] for entry in node["inputs"]]


def _specs(info: Json) -> dict[str, list[Any]]:
    """Return the inputs of a node type by name: [type or options, {settings}]."""
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def _specs_of_options(values: Json, specs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the inputs that belong to the chosen options, by their names on the server."""
    return {
        f"{name}.{inner_name}": inner
        for name, spec in specs.items()
        if spec[0] == "COMFY_DYNAMICCOMBO_V3"
        for option in spec[1]["options"]
        if option["key"] == values.get(name)
        for inner_name, inner in _specs({"input": option["inputs"]}).items()
    }


def _options(spec: list[Any]) -> list[Any] | None:
    """Return the options of a combo box; None for other inputs."""
    if isinstance(spec[0], list):
        return spec[0]
    if spec[0] == "COMFY_DYNAMICCOMBO_V3":  # an option may have its own inputs
        return [option["key"] for option in spec[1]["options"]]
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
    """Run a workflow as the front end does and return its pictures, which must have workflow and prompt embedded."""
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
    return [data for event, data in run.messages if event == "progress_text"]


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
