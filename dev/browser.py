# SPDX-License-Identifier: GPL-3.0-or-later
"""ComfyUI's front end in a real, headless Chromium: for ``tests/browser`` and ``dev/thumbnails.py``.

``python dev/browser.py`` makes the help pages' pictures of what the pack adds to its nodes.

Not part of the locked environment, because a browser cannot be locked: ``pip install playwright`` beside what
``dev.py setup`` brings, and a Chromium or Chrome on this machine.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from comfy_host import ROOT
from comfy_server import ComfyServer, Json

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LOADED = "Boolean(window.app?.graph && window.LiteGraph?.registered_node_types.GAGuidance)"
LOAD_TIMEOUT_MS = 180_000
HELP = ROOT / "web" / "docs"
ONLY_THE_GRAPH = (
    "body * {visibility: hidden !important} "
    "canvas#graph-canvas, .dom-widget, .dom-widget * {visibility: visible !important}"
)
# Of the demo's workflow: its guidance node with the chart unfolded, or an advanced one in its place with the picker.
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


def what_is_missing() -> str | None:
    """Why no page can be opened here, in one sentence that says what to do; None if one can."""
    if importlib.util.find_spec("playwright") is None:
        return "The browser needs Playwright: install it with `pip install playwright` into the Python that runs this."
    if chromium() is None:
        return (
            "The browser needs Chromium or Chrome on the PATH (on Debian and Ubuntu `apt install chromium`), or its "
            "path in the environment variable CHROMIUM."
        )
    return None


def chromium() -> Path | None:
    """The browser's program: the one that CHROMIUM names, or the first that is found."""
    if named := os.environ.get("CHROMIUM"):
        return Path(named) if Path(named).is_file() else None
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return Path(found) if found else None


class FrontEnd:
    """The front end, opened on a server. ``errors`` collects what goes wrong in the page by itself."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def go_to(self, server: ComfyServer) -> None:
        """Open a server's page, anew if it is open already."""
        self.page.goto(server.url, wait_until="commit")
        self.page.wait_for_function(LOADED, timeout=LOAD_TIMEOUT_MS)
        time.sleep(1)  # until it has restored or made its first workflow, which no event tells

    def load(self, workflow: Json) -> None:
        """Open a workflow, as when its file is dropped onto the page."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)

    def prompt(self) -> Json:
        """What the front end would queue: the graph in API format."""
        prompt: Json = self.page.evaluate("async () => (await window.app.graphToPrompt()).output")
        return prompt

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run a script in the page and return what it returns."""
        return self.page.evaluate(script, argument)

    @contextmanager
    def beside(self, server: ComfyServer, without: str | None = None) -> Iterator[FrontEnd]:
        """Another tab in the same browser, with a session of its own; ``without`` files whose address has this end."""
        browser = self.page.context.browser
        assert browser is not None
        yield from _opened(browser, server, self.page.viewport_size or {}, without)

    def wait(self, script: str, argument: Any = None, timeout_ms: int = 60_000) -> None:
        """Wait until a script returns something true."""
        self.page.wait_for_function(script, arg=argument, timeout=timeout_ms)


@contextmanager
def front_end(server: ComfyServer, width: int = 1320, height: int = 880) -> Iterator[FrontEnd]:
    """Open the front end of a running server in a browser of its own, which talks to nobody else."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=list(OPTIONS))
        yield from _opened(browser, server, {"width": width, "height": height})
        browser.close()


def _opened(browser: Browser, server: ComfyServer, size: Any, without: str | None = None) -> Iterator[FrontEnd]:
    # First steps and warnings that would lie over the page.
    server.settings({"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False})
    page = browser.new_page(viewport=size)
    page.route("**/*", _only_from(server.url, without))
    opened = FrontEnd(page)
    opened.go_to(server)
    yield opened
    page.close()


def _only_from(url: str, without: str | None) -> Callable[[Route], None]:
    def let_through(route: Route) -> None:
        asked = route.request.url
        if asked.startswith((url, "data:", "blob:")) and not (without and asked.partition("?")[0].endswith(without)):
            route.continue_()
        else:
            route.abort()

    return let_through


def main() -> int:
    """Make the pictures."""
    if missing := what_is_missing():
        print(f"browser: {missing}")
        return 1
    demo = json.loads((ROOT / "workflows" / "gag_demo.json").read_text(encoding="utf-8"))
    with ComfyServer(cpu=True) as server, front_end(server, 1000, 1400) as opened:
        opened.page.add_style_tag(content=ONLY_THE_GRAPH)
        for name, advanced in (("GAGuidance-panel", False), ("GAGuidanceAdvanced-panel", True)):
            opened.load(demo)
            shot = opened.page.screenshot(clip=opened.evaluate(UNFOLD, advanced))
            picture = Image.open(io.BytesIO(shot)).convert("RGB").quantize(64, dither=Image.Dither.NONE)
            picture.save(HELP / f"{name}.png", optimize=True)
            print(f"browser: wrote web/docs/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
