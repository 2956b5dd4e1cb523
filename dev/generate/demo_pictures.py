# SPDX-License-Identifier: GPL-3.0-or-later
"""Draw every picture that shows the demo models, by running their workflows on a real server.

The pictures are the README's comparison, those in the help pages and the thumbnails of the demo workflows. Run
``python dev.py run generate.demo_pictures`` when the weights of the demo models or a demo workflow have changed.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

from PIL import Image

from comfy_host import ROOT
from comfy_server import ComfyError, ComfyServer, Json, RunResult, to_api
from demo import PROMPTS, comparison, in_grids, sheet_of
from generate.thumbnails import framed, number_of

HELP = ROOT / "web" / "docs"
WORKFLOWS = ROOT / "workflows"
HELP_WIDTH, README_WIDTH = 760, 1600
MOST_BYTES = 78_000
# Prompts and seeds of the README's picture, chosen to show a difference. The first is the demo workflow's own.
README_PICTURES = [
    ("a white circle right of a blue triangle", 13),
    ("a yellow cross below a purple square", 1),
    ("three blue circles", 1),
]
THUMBNAIL_TITLES = {
    "gag_01_demo": "Start here: without GAG and with it",
    "gag_11_sweep": "A sweep over one setting",
    "gag_12_probe": "Where the model reads each word",
}
# Pictures of the help pages by workflow: the node that shows them, and a name for each; None leaves a picture out.
HELP_PICTURES = {
    "gag_11_sweep": ("GAGGrid", ("GAGGrid",)),
    "gag_12_probe": ("GAGReport", ("GAGReport-words", "GAGReport", None)),
}
SCHEDULE: Json = {
    "class_type": "GAGSchedule",
    "inputs": {
        "kind": "linear",
        "over": "steps",
        "start_value": 1.0,
        "end_value": 0.0,
        "start": 0.0,
        "end": 0.6,
    },
}


def main() -> int:
    """Draw all pictures."""
    argparse.ArgumentParser(description="Draw the pictures that show the demo models.").parse_args()
    with ComfyServer() as server:
        comparisons(server)
        schedule(server)
        for name in HELP_PICTURES:
            of_workflow(server, name)
    return 0


def comparisons(server: ComfyServer) -> None:
    """Draw comparisons without GAG and with it: for the README, for the help page, and the demo's thumbnail."""
    workflow = workflow_of("gag_01_demo")
    table = comparison(server, workflow, list(README_PICTURES), ["auto"])
    columns = [list(column) for column in zip(*table, strict=True)]  # one column for each prompt
    save(sheet_of(columns), ROOT / "assets" / "demo.png", README_WIDTH)
    prompts: list[tuple[str, int | None]] = [(text, None) for text in PROMPTS[:2]]
    by_preset = comparison(server, workflow, prompts, ["auto", "no CFG", "paper"])
    save(sheet_of(by_preset), HELP / "GAGuidance.png", HELP_WIDTH)
    thumbnail(sheet_of([table[0]]), "gag_01_demo")


def schedule(server: ComfyServer) -> None:
    """Draw the curve on GAG Schedule."""
    prompt = to_api(workflow_of("gag_01_demo"), server.object_info())
    prompt["schedule"] = SCHEDULE
    for node in prompt.values():
        if node["class_type"] == "GAGuidance":
            node["inputs"]["schedule"] = ["schedule", 0]
    save(pictures_by_node(server, prompt)["schedule"][0], HELP / "GAGSchedule.png", HELP_WIDTH)


def of_workflow(server: ComfyServer, name: str) -> None:
    """Draw a workflow's pictures for the help pages, and its thumbnail."""
    workflow = workflow_of(name)
    prompt = to_api(workflow, server.object_info())
    for node in prompt.values():
        if node["class_type"] == "GAGReport":
            node["inputs"]["pages"] = "all"
    titles = {str(node["id"]): node.get("title", "") for node in workflow["nodes"]}
    shown = pictures_by_node(server, in_grids(prompt, {i: titles[i] for i in prompt if not is_grid(prompt, i)}))
    # The first picture stands for a report, because its words are all that can be read in so small a picture.
    thumbnail(sheet_of([[shown[node_id][0] for node_id in titles if node_id in shown]]), name)
    node_type, names = HELP_PICTURES[name]
    for picture_name, picture in zip(names, shown[showing_node(prompt, node_type, set(shown))], strict=True):
        if picture_name:
            save(picture, HELP / f"{picture_name}.png", HELP_WIDTH)


def workflow_of(name: str) -> Json:
    """Return a workflow, as its file has it."""
    workflow: Json = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    return workflow


def is_grid(prompt: Json, node_id: str) -> bool:
    """True if the pictures that a node saves come from a GAG Grid already."""
    link = prompt[node_id]["inputs"].get("images")
    return isinstance(link, list) and prompt[link[0]]["class_type"] == "GAGGrid"


def pictures_by_node(server: ComfyServer, prompt: Json) -> dict[str, list[Image.Image]]:
    """Run a prompt and return the pictures of each node that shows any."""
    result = server.run(prompt)
    if result.status != "success":
        raise ComfyError(f"ComfyUI could not finish the pictures: {result.error or result.status}")
    shown = {}
    for node_id, output in result.outputs.items():
        if "images" in output:
            of_node = RunResult(**{**vars(result), "outputs": {node_id: output}})
            shown[node_id] = [Image.open(io.BytesIO(data)).convert("RGB") for data in server.images(of_node)]
    return shown


def showing_node(prompt: Json, node_type: str, showing: set[str]) -> str:
    """Return the id of the first node of a type if it shows pictures, else of the node behind it that does."""
    first = next(node_id for node_id, node in prompt.items() if node["class_type"] == node_type)
    behind = (node_id for node_id, node in prompt.items() if [first, 0] in node["inputs"].values())
    return next(node_id for node_id in (first, *behind) if node_id in showing)


def thumbnail(picture: Image.Image, name: str) -> None:
    """Save a workflow's thumbnail with its number and title, small enough to be loaded with many others."""
    small = framed(picture, number_of(name), THUMBNAIL_TITLES[name])
    path = WORKFLOWS / f"{name}.jpg"
    for quality in range(90, 20, -10):
        small.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            break
    print(f"demo_pictures: wrote {path.relative_to(ROOT)}")


def save(picture: Image.Image, path: Path, width: int) -> None:
    """Save a picture of at most this width, in few colours: enough for plots and shapes, and a small file."""
    small = narrowed(picture, width)
    # MAXCOVERAGE keeps colours that few pixels have, and k-means shifts the others to where most pixels are.
    palette = Image.Quantize.MAXCOVERAGE
    small.quantize(256, palette, kmeans=4, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"demo_pictures: wrote {path.relative_to(ROOT)}")


def narrowed(picture: Image.Image, width: int) -> Image.Image:
    """Return the picture, scaled down to this width if it is wider."""
    height = round(picture.height * min(1.0, width / picture.width))
    return picture.convert("RGB").resize((min(width, picture.width), height), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
