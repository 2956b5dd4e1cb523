# SPDX-License-Identifier: GPL-3.0-or-later
"""The example workflows and the help pages fit the current nodes, and the server offers them."""

from __future__ import annotations

import copy
import http.client
import io
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from comfy_server import ComfyServer, Json, RunResult, to_api

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
DEMO = ROOT / "workflows" / "gag_01_demo.json"
DEMOS = ("gag_01_demo", "gag_11_sweep", "gag_12_probe")  # these run with the demo model, the others with large ones
CATEGORIES = ("GAG/", "model/patch/GAG")
GUIDANCE = ("GAGuidance", "GAGuidanceAdvanced", "GAGAnderson", "GAGSweep")
NOTES = ("Note", "MarkdownNote")  # known to the front end only
# First tested release of ComfyUI that has all nodes and the model of a workflow. The workflow's note names it too. The
# other workflows run in every release that the pack supports.
SINCE = {
    "gag_08_z_image_turbo": "0.3.75",
    "gag_10_nag_flux_schnell": "0.20.0",
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
MOST_WORKFLOWS = 12
MOST_WIDTH, MOST_HEIGHT = 1400, 900  # of a graph, so that it can be read on a laptop's screen
OPEN_PANEL = 200  # height that a chart adds to a GAG node
# Of the front end: the first slot's distance from the top, the distance of slots, and that of widgets.
FIRST_SLOT, SLOT, WIDGET = 14, 20, 24
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
        "gag_01_demo",
        "gag_02_sd15",
        "gag_03_sdxl",
        "gag_04_sdxl_lightning",
        "gag_05_flux_dev",
        "gag_06_flux_kontext",
        "gag_07_qwen_image",
        "gag_08_z_image_turbo",
        "gag_09_wan_t2v",
        "gag_10_nag_flux_schnell",
        "gag_11_sweep",
        "gag_12_probe",
    ]


def test_templates_are_few_and_numbered_in_the_order_in_which_to_read_them() -> None:
    """The server lists a folder in the order of the disk, and the front end sorts by name if asked to."""
    assert len(WORKFLOWS) <= MOST_WORKFLOWS
    numbers = [path.stem.split("_")[1] for path in WORKFLOWS]
    assert numbers == [f"{index:02}" for index in range(1, len(WORKFLOWS) + 1)]


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
def test_a_workflow_fits_on_a_screen(path: Path) -> None:
    boxes = [_box(node) for node in _load(path)["nodes"]]
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    assert max(rights) - min(lefts) <= MOST_WIDTH
    assert max(bottoms) - min(tops) <= MOST_HEIGHT


@every_workflow
def test_below_a_gag_node_is_room_for_its_chart(path: Path) -> None:
    nodes = _load(path)["nodes"]
    for gag in nodes:
        if gag["type"] in ("GAGuidance", "GAGuidanceAdvanced"):
            left, _, right, bottom = _box(gag)
            for other in nodes:
                other_left, top, other_right, _ = _box(other)
                beside = other_right <= left or other_left >= right
                assert other is gag or beside or not bottom <= top < bottom + OPEN_PANEL, other["type"]


@every_workflow
def test_links_run_to_the_right_and_behind_no_node(path: Path) -> None:
    workflow = _load(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, slot, target, index, _ in workflow["links"]:
        curve = _curve(nodes[source], slot, nodes[target], index)
        name = f"{nodes[source]['type']} ({source}) to {nodes[target]['type']} ({target})"
        assert curve[0][0] < curve[-1][0], name
        for node in nodes.values():
            assert not any(_is_inside(point, _box(node)) for point in curve), f"{name} behind {node['type']}"


@every_workflow
def test_a_note_explains_the_workflow(path: Path) -> None:
    text = _notes(path)
    assert "GAG" in text
    if path.stem in SINCE:
        assert "or later" in text, "the note does not say which ComfyUI it needs"


@every_workflow
def test_notes_can_be_read_in_every_front_end(path: Path) -> None:
    """Front ends with Vue nodes show inline code in a colour that cannot be read on a note."""
    assert "`" not in _notes(path)
    assert "| --- |" not in _notes(path)


@every_workflow
def test_the_note_names_every_model_file(path: Path) -> None:
    text = _notes(path)
    for model in (model for node in _load(path)["nodes"] for model in _models(node)):
        if model["directory"] == "checkpoints" and "**models/checkpoints**" in text:
            continue
        assert f"**{model['name']}**" in text
        assert f" in {model['directory']}" in text


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
    # Some compare with a sampler without guidance.
    assert any(guided)
    assert all(guided) or len(guided) == 2


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


@pytest.mark.parametrize("name", ["gag_01_demo", "gag_02_sd15", "gag_03_sdxl", "gag_05_flux_dev"])
def test_pictures_without_gag_and_with_it_differ_in_guidance_alone(name: str, object_info: Json) -> None:
    prompt = to_api(_load(ROOT / "workflows" / f"{name}.json"), object_info)
    with_gag, without = (node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler")
    (gag,) = (node_id for node_id, node in prompt.items() if node["class_type"] == "GAGuidance")
    assert with_gag["model"] == [gag, 0]
    assert without == {**with_gag, "model": prompt[gag]["inputs"]["model"]}


def test_the_demo_makes_pictures_with_gag_and_without(server: ComfyServer, object_info: Json) -> None:
    workflow = _load(DEMO)
    for sampler in (node for node in workflow["nodes"] if node["type"] == "KSampler"):
        sampler["widgets_values"][0] = SEED
    (gag,) = (node for node in workflow["nodes"] if node["type"] in GUIDANCE)
    bypassed = copy.deepcopy(workflow)
    (other,) = (node for node in bypassed["nodes"] if node["id"] == gag["id"])
    other["mode"] = BYPASSED

    guided_pictures, guided_run = _pictures_of_run(server, workflow, object_info)
    plain_run = server.run(to_api(bypassed, object_info))
    plain_pictures = [Image.open(io.BytesIO(data)) for data in server.images(plain_run)]

    # Four pictures each; without GAG the two samplers make the same.
    assert len(guided_pictures) == len(plain_pictures) == 8
    counts = [Counter(picture.tobytes() for picture in found) for found in (guided_pictures, plain_pictures)]
    assert set(counts[0].values()) == {1}
    assert set(counts[1].values()) == {2}
    assert len(counts[0] & counts[1]) == 4
    (text,) = _progress_texts(guided_run)
    assert text["node"] == str(gag["id"])
    assert text["text"] == "Guided 4 of 4 attentions in 12 of 12 calls."
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


def _notes(path: Path) -> str:
    return "".join(node["widgets_values"][0] for node in _load(path)["nodes"] if node["type"] in NOTES)


def _box(node: Json) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a node with its title."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE_HEIGHT, left + width, top + height


def _is_inside(point: tuple[float, float], box: tuple[float, float, float, float], margin: float = 3.0) -> bool:
    (x, y), (left, top, right, bottom) = point, box
    return left + margin < x < right - margin and top + margin < y < bottom - margin


def _curve(source: Json, slot: int, target: Json, index: int) -> list[tuple[float, float]]:
    """Return points of a link as the front end draws it: a Bezier curve that leaves and arrives horizontally."""
    entry = target["inputs"][index]
    sockets = [one for one in target["inputs"] if "widget" not in one]
    if entry in sockets:
        height = FIRST_SLOT + SLOT * sockets.index(entry)
    else:
        widgets = [one for one in target["inputs"] if "widget" in one]
        height = SLOT * max(len(sockets), len(target["outputs"])) + WIDGET * widgets.index(entry) + SLOT
    start = source["pos"][0] + source["size"][0], source["pos"][1] + FIRST_SLOT + SLOT * slot
    end = target["pos"][0], target["pos"][1] + height
    reach = math.dist(start, end) / 4
    corners = [start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end]
    shares = [[(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3] for t in (k / 40 for k in range(41))]
    sums = [[sum(a * b[axis] for a, b in zip(share, corners, strict=True)) for axis in (0, 1)] for share in shares]
    return [(x, y) for x, y in sums]


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
