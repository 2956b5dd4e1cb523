# SPDX-License-Identifier: GPL-3.0-or-later
"""Draw every picture that shows the demo models, by running their workflows on a real server.

The pictures are the README's comparison, those in the help pages and the thumbnails of the demo workflows. Run
``python dev.py run generate.demo_pictures`` when the weights of the demo models have changed.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

from comfy_host import ROOT
from comfy_server import ComfyError, ComfyServer, Json, RunResult, to_api
from demo import PROMPTS, in_grids, run_demo, sheet_of

HELP = ROOT / "web" / "docs"
WORKFLOWS = ROOT / "workflows"
HELP_WIDTH, THUMBNAIL_WIDTH, README_WIDTH = 760, 660, 1600
MOST_BYTES = 78_000
# Pictures of the help pages by workflow: the node that shows them, and a name for each; None leaves a picture out.
HELP_PICTURES = {
    "gag_demo_probe": ("GAGReport", ("GAGReport-words", "GAGReport", None)),
    "gag_demo_schedule": ("GAGSchedule", ("GAGSchedule",)),
    "gag_demo_sweep": ("GAGGrid", ("GAGGrid",)),
}


def main() -> int:
    """Draw all pictures."""
    argparse.ArgumentParser(description="Draw the pictures that show the demo models.").parse_args()
    comparisons()
    with ComfyServer() as server:
        info = server.object_info()
        for file in sorted(WORKFLOWS.glob("gag_demo_*.json")):
            workflow = json.loads(file.read_text(encoding="utf-8"))
            prompt = to_api(workflow, info)
            for node in prompt.values():
                if node["class_type"] == "GAGReport":
                    node["inputs"]["pages"] = "all"
            titles = {str(node["id"]): node.get("title", "") for node in workflow["nodes"]}
            shown = pictures_by_node(server, in_grids(prompt, {i: titles[i] for i in prompt if not is_grid(prompt, i)}))
            # The first picture stands for a report, because its words are all that can be read in so small a picture.
            thumbnail(sheet_of([[shown[node_id][0] for node_id in titles if node_id in shown]]), file.stem)
            if file.stem in HELP_PICTURES:
                node_type, names = HELP_PICTURES[file.stem]
                for name, picture in zip(names, shown[showing_node(prompt, node_type, set(shown))], strict=True):
                    if name:
                        save(picture, HELP / f"{name}.png", HELP_WIDTH)
    return 0


def comparisons() -> None:
    """Draw the comparison of ``dev.py demo``: all of it for the README, parts for the help page and the thumbnail."""
    workflow = WORKFLOWS / "gag_demo.json"
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder, "demo.png")
        run_demo(workflow, PROMPTS, None, None, sheet)
        save(Image.open(sheet), ROOT / "assets" / "demo.png", README_WIDTH)
        run_demo(workflow, PROMPTS[:2], ["auto", "no CFG", "paper"], None, sheet)
        save(Image.open(sheet), HELP / "GAGuidance.png", HELP_WIDTH)
        thumbnail(Image.open(sheet), workflow.stem)


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
    """Save a workflow's thumbnail, small enough to be loaded with many others."""
    small = narrowed(picture, THUMBNAIL_WIDTH)
    path = WORKFLOWS / f"{name}.jpg"
    for quality in range(90, 20, -10):
        small.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            break
    print(f"demo_pictures: wrote {path.relative_to(ROOT)}")


def save(picture: Image.Image, path: Path, width: int) -> None:
    """Save a picture of at most this width, in few colours: enough for plots and shapes, and a small file."""
    narrowed(picture, width).quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"demo_pictures: wrote {path.relative_to(ROOT)}")


def narrowed(picture: Image.Image, width: int) -> Image.Image:
    """Return the picture, scaled down to this width if it is wider."""
    height = round(picture.height * min(1.0, width / picture.width))
    return picture.convert("RGB").resize((min(width, picture.width), height), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
