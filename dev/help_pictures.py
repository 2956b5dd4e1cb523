# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev/help_pictures.py``: the pictures in the help pages, made by the demo's workflows on a real server."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from comfy_host import ROOT
from comfy_server import ComfyServer, Json, RunResult, to_api
from demo import PROMPTS, run_demo

HELP = ROOT / "web" / "docs"
WIDTH = 760
# A workflow, the node whose pictures are shown, and what each is called; None is left out.
PICTURES = (
    ("gag_demo_probe", "GAGReport", ("GAGReport", None, "GAGReport-words")),
    ("gag_demo_schedule", "GAGSchedule", ("GAGSchedule",)),
    ("gag_demo_sweep", "GAGGrid", ("GAGGrid",)),
)


def main() -> int:
    """Make all pictures."""
    argparse.ArgumentParser(description="Make web/docs/*.png by running the demo's workflows.").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder, "demo.png")
        run_demo(ROOT / "workflows" / "gag_demo.json", PROMPTS[:1], None, None, sheet)
        save(Image.open(sheet), "GAGuidance")
    with ComfyServer() as server:
        info = server.object_info()
        for workflow, node, names in PICTURES:
            prompt = to_api(json.loads((ROOT / "workflows" / f"{workflow}.json").read_text(encoding="utf-8")), info)
            result = server.run(prompt)
            if result.status != "success":
                print(f"help_pictures: {workflow}: {result.error}")
                return 1
            for name, picture in zip(names, pictures_of(server, result, prompt, node), strict=True):
                if name:
                    save(picture, name)
    return 0


def pictures_of(server: ComfyServer, result: RunResult, prompt: Json, node_type: str) -> Iterator[Image.Image]:
    """What the first node of a type showed; of one that shows nothing, what the node behind it did."""
    first = next(node_id for node_id, node in prompt.items() if node["class_type"] == node_type)
    behind = (node_id for node_id, node in prompt.items() if [first, 0] in node["inputs"].values())
    shown = next(node_id for node_id in (first, *behind) if "images" in result.outputs.get(node_id, {}))
    only = RunResult(**{**vars(result), "outputs": {shown: result.outputs[shown]}})
    return (Image.open(io.BytesIO(data)) for data in server.images(only))


def save(picture: Image.Image, name: str) -> None:
    """Save a picture for the help panel, which is narrow."""
    height = round(picture.height * min(1.0, WIDTH / picture.width))
    small = picture.convert("RGB").resize((min(WIDTH, picture.width), height), Image.Resampling.LANCZOS)
    # Few colours are enough for plots and shapes, and make a small file.
    small.quantize(128, dither=Image.Dither.NONE).save(HELP / f"{name}.png", optimize=True)
    print(f"help_pictures: wrote {(HELP / name).relative_to(ROOT)}.png")


if __name__ == "__main__":
    sys.exit(main())
