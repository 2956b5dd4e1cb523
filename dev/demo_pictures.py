# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev/demo_pictures.py``: every picture that shows the demo model, made by its workflows on a real server.

They are the README's comparison, the pictures in the help pages and the thumbnails of the demo's workflows. Run it when
the demo's weights have changed.
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
from comfy_server import ComfyServer, Json, RunResult, to_api
from demo import BACKGROUND, PROMPTS, batch_sheet, enlarged, lettering, run_demo, sheet_of

HELP = ROOT / "web" / "docs"
WORKFLOWS = ROOT / "workflows"
HELP_WIDTH, THUMBNAIL_WIDTH, README_WIDTH = 760, 660, 1600
MOST_BYTES = 78_000
# What is in the help pages: the workflow, the node whose pictures are shown, and what each is called; None is left out.
HELP_PICTURES = {
    "gag_demo_probe": ("GAGReport", ("GAGReport", None, "GAGReport-words")),
    "gag_demo_schedule": ("GAGSchedule", ("GAGSchedule",)),
    "gag_demo_sweep": ("GAGGrid", ("GAGGrid",)),
}


def main() -> int:
    """Make all pictures."""
    argparse.ArgumentParser(description="Make the pictures that show the demo model.").parse_args()
    comparisons()
    with ComfyServer() as server:
        info = server.object_info()
        for file in sorted(WORKFLOWS.glob("gag_demo_*.json")):
            workflow = json.loads(file.read_text(encoding="utf-8"))
            prompt = to_api(workflow, info)
            result = server.run(prompt)
            if result.status != "success":
                print(f"demo_pictures: {file.stem}: {result.error}")
                return 1
            titles = {str(node["id"]): node.get("title", "") for node in workflow["nodes"]}
            showing = [node_id for node_id in titles if "images" in result.outputs.get(node_id, {})]
            shown = {node_id: pictures_of(server, result, node_id) for node_id in showing}
            # Of a report the last page alone, the words, can be made out in so small a picture.
            small = {i: shown[i][-1:] if prompt[i]["class_type"] == "GAGReport" else shown[i] for i in showing}
            thumbnail(side_by_side([(titles[node_id], small[node_id]) for node_id in showing]), file.stem)
            if file.stem in HELP_PICTURES:
                node_type, names = HELP_PICTURES[file.stem]
                for name, picture in zip(names, shown[shown_by(prompt, node_type, set(shown))], strict=True):
                    if name:
                        save(picture, HELP / f"{name}.png", HELP_WIDTH)
    return 0


def comparisons() -> None:
    """The comparison that ``dev.py demo`` makes, whole for the README and in parts."""
    workflow = WORKFLOWS / "gag_demo.json"
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder, "demo.png")
        run_demo(workflow, PROMPTS, None, None, sheet)
        save(Image.open(sheet), ROOT / "assets" / "demo.png", README_WIDTH)
        run_demo(workflow, PROMPTS[:2], ["gentle", "paper"], None, sheet)
        save(Image.open(sheet), HELP / "GAGuidance.png", HELP_WIDTH)
        thumbnail(Image.open(sheet), workflow.stem)


def pictures_of(server: ComfyServer, result: RunResult, node_id: str) -> list[Image.Image]:
    """What one node showed."""
    only = RunResult(**{**vars(result), "outputs": {node_id: result.outputs[node_id]}})
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in server.images(only)]


def shown_by(prompt: Json, node_type: str, showing: set[str]) -> str:
    """The first node of a type if it shows anything, else the node behind it that does."""
    first = next(node_id for node_id, node in prompt.items() if node["class_type"] == node_type)
    behind = (node_id for node_id, node in prompt.items() if [first, 0] in node["inputs"].values())
    return next(node_id for node_id in (first, *behind) if node_id in showing)


def side_by_side(results: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """What each node showed, under its title."""
    cells = [batch_sheet([enlarged(picture) for picture in pictures]) for _, pictures in results]
    heads = [
        lettering(title, cell.width) if title else Image.new("RGB", (1, 1), BACKGROUND)
        for (title, _), cell in zip(results, cells, strict=True)
    ]
    return sheet_of([heads, cells], gap=8)


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
    """Save a picture of at most this width."""
    # Few colours are enough for plots and shapes, and make a small file.
    narrowed(picture, width).quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"demo_pictures: wrote {path.relative_to(ROOT)}")


def narrowed(picture: Image.Image, width: int) -> Image.Image:
    """The picture, no wider than this."""
    height = round(picture.height * min(1.0, width / picture.width))
    return picture.convert("RGB").resize((min(width, picture.width), height), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
