# SPDX-License-Identifier: GPL-3.0-or-later
"""Draw pictures of workflows for the template browser, with the front end.

``python dev.py run generate.thumbnails gag_sdxl ...`` needs a browser, see ``dev/browser.py``. The demo workflows have
thumbnails of their results instead (``demo_pictures``).
"""

from __future__ import annotations

import argparse
import io
import json
import sys

from PIL import Image

from browser import ONLY_THE_GRAPH, front_end, what_is_missing
from comfy_host import ROOT
from comfy_server import ComfyServer

WIDTH, HEIGHT = 1320, 880
MARGIN = 20
# Script that removes notes, which would be too small to read, and fits the rest into the picture.
FIT = """([width, height, margin]) => {
    const {graph, canvas} = window.app;
    for (const note of graph.nodes.filter(node => node.type.includes("Note"))) graph.remove(note);
    const boxes = graph.groups.map(group => [...group.pos, group.pos[0] + group.size[0], group.pos[1] + group.size[1]]);
    const left = Math.min(...boxes.map(box => box[0])), top = Math.min(...boxes.map(box => box[1]));
    const right = Math.max(...boxes.map(box => box[2])), bottom = Math.max(...boxes.map(box => box[3]));
    const scale = Math.min((width - 2 * margin) / (right - left), (height - 2 * margin) / (bottom - top));
    canvas.show_info = false;
    canvas.resize(width, height);
    canvas.ds.scale = scale;
    canvas.ds.offset = [(width / scale - left - right) / 2, (height / scale - top - bottom) / 2];
    canvas.draw(true, true);
}"""


def main() -> int:
    """Draw the thumbnails of the given workflows."""
    parser = argparse.ArgumentParser(description="Draw workflows/NAME.jpg of workflows/NAME.json.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    names = parser.parse_args().names
    if missing := what_is_missing():
        print(f"thumbnails: {missing}")
        return 1
    with ComfyServer(cpu=True) as server, front_end(server, WIDTH, HEIGHT) as opened:
        opened.page.add_style_tag(content=ONLY_THE_GRAPH)
        for name in names:
            path = ROOT / "workflows" / f"{name}.json"
            opened.load(json.loads(path.read_text(encoding="utf-8")))
            opened.page.wait_for_timeout(1500)
            opened.evaluate(FIT, [WIDTH, HEIGHT, MARGIN])
            opened.page.wait_for_timeout(800)
            shot = Image.open(io.BytesIO(opened.page.screenshot()))
            picture = shot.convert("RGB").resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.LANCZOS)
            picture.save(path.with_suffix(".jpg"), quality=85, optimize=True)
            print(f"thumbnails: {name}.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
