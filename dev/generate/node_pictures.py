# SPDX-License-Identifier: GPL-3.0-or-later
"""Draw the help pages' pictures of what the pack adds to its nodes in the browser: ``web/docs/*-panel.png``."""

from __future__ import annotations

import io
import json
import sys

from PIL import Image

from browser import ONLY_THE_GRAPH, front_end, what_is_missing
from comfy_host import ROOT
from comfy_server import ComfyServer

HELP = ROOT / "web" / "docs"
# Script that shows one node of the demo workflow alone: GAG with the chart unfolded, or GAG (advanced) with the picker.
UNFOLD = """async advanced => {
    const { graph, canvas } = window.app;
    const find = type => graph.nodes.find(node => node.type === type);
    let node = find("GAGuidance");
    if (advanced) {
        const other = window.LiteGraph.createNode("GAGuidanceAdvanced");
        graph.add(other);
        find("GAGDemoLoader").connect(0, other, 0);
        other.connect(0, find("KSampler"), 0);
        graph.remove(node);
        node = other;
    }
    const { element } = node.widgets.find(widget => widget.name === "gag_panel");
    [...element.querySelectorAll("button")].at(-1).click();
    for (const group of [...graph.groups]) graph.remove(group);
    for (const other of graph.nodes) if (other !== node) other.pos = [other.pos[0] + 5000, other.pos[1]];
    node.pos = [100, 100];
    canvas.deselectAll();
    canvas.render_canvas_border = canvas.show_info = false;
    window.gagApi = window.comfyAPI.api.api;
    const done = new Promise(resolve => window.gagApi.addEventListener("execution_success", resolve));
    await window.app.queuePrompt(0);
    await done;
    await new Promise(resolve => setTimeout(resolve, 2000));
    canvas.ds.scale = 1.5;
    canvas.ds.offset = [0, 0];
    canvas.setDirty(true, true);
    await new Promise(resolve => setTimeout(resolve, 2000));
    const title = window.LiteGraph.NODE_TITLE_HEIGHT, box = canvas.canvas.getBoundingClientRect();
    const [width, height] = node.size.map(length => 1.5 * length);
    return { x: box.x + 140, y: box.y + 140 - 1.5 * title, width: width + 20, height: height + 1.5 * title + 20 };
}"""


def main() -> int:
    """Draw the pictures."""
    if missing := what_is_missing():
        print(f"node_pictures: {missing}")
        return 1
    demo = json.loads((ROOT / "workflows" / "gag_01_demo.json").read_text(encoding="utf-8"))
    with ComfyServer(cpu=True) as server, front_end(server, 1000, 1400) as opened:
        opened.page.add_style_tag(content=ONLY_THE_GRAPH)
        for name, advanced in (("GAGuidance-panel", False), ("GAGuidanceAdvanced-panel", True)):
            opened.load(demo)
            shot = opened.page.screenshot(clip=opened.evaluate(UNFOLD, advanced))
            picture = (
                Image.open(io.BytesIO(shot))
                .convert("RGB")
                .quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            )
            picture.save(HELP / f"{name}.png", optimize=True)
            print(f"node_pictures: wrote web/docs/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
