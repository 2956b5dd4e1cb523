# SPDX-License-Identifier: GPL-3.0-or-later
"""ComfyUI's front end in a real, headless Chromium: for ``tests/browser`` and ``dev/generate/``.

The locked environment has no browser, because a browser cannot be locked. Besides ``dev.py setup`` it needs
``pip install playwright`` and a Chromium or Chrome on this machine. The environment variable GAG_FRONT_END chooses
another front end than the installed one (see :func:`comfy_server.server_command`).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
RESTORED = "Boolean(window.app.extensionManager?.workflow?.activeWorkflow?.isLoaded)"
LOAD_TIMEOUT_MS = 180_000
# A library of the front end (1.49.6, for example) loads WebAssembly from a data URL. A server with --disable-api-nodes
# forbids the page to do so.
OF_THE_FRONT_END = "/assets/vendor-three"
ONLY_THE_GRAPH = (
    "body * {visibility: hidden !important} "
    "canvas#graph-canvas, .dom-widget, .dom-widget * {visibility: visible !important}"
)


def what_is_missing() -> str | None:
    """Return the reason why no page can be opened here, with what to do; None if one can."""
    if importlib.util.find_spec("playwright") is None:
        return "The browser needs Playwright: install it with `pip install playwright` into the Python that runs this."
    if chromium() is None:
        return (
            "The browser needs Chromium or Chrome on the PATH (on Debian and Ubuntu `apt install chromium`), or its "
            "path in the environment variable CHROMIUM."
        )
    return None


def chromium() -> Path | None:
    """Return the browser's program: the one that CHROMIUM names, or the first one found."""
    if named := os.environ.get("CHROMIUM"):
        return Path(named) if Path(named).is_file() else None
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return Path(found) if found else None


class FrontEnd:
    """The front end, opened on a server. ``errors`` collects uncaught errors of the page, but not OF_THE_FRONT_END."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", self._page_error)

    def _page_error(self, error: Any) -> None:
        if OF_THE_FRONT_END not in (error.stack or ""):
            self.errors.append(str(error))

    def go_to(self, server: ComfyServer) -> None:
        """Open a server's page, or reload it if it is open."""
        self.page.goto(server.url, wait_until="commit")
        self.page.wait_for_function(LOADED, timeout=LOAD_TIMEOUT_MS)
        # The page restores or makes its first workflow, after a second or more where the machine is busy.
        self.page.wait_for_function(RESTORED, timeout=LOAD_TIMEOUT_MS)
        time.sleep(1)

    def load(self, workflow: Json) -> None:
        """Open a workflow, as if its file were dropped onto the page."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)

    def prompt(self) -> Json:
        """Return the prompt that the front end would queue: the graph in API format."""
        prompt: Json = self.page.evaluate("async () => (await window.app.graphToPrompt()).output")
        return prompt

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run a script in the page and return what it returns."""
        return self.page.evaluate(script, argument)

    @contextmanager
    def beside(self, server: ComfyServer, without: str | None = None) -> Iterator[FrontEnd]:
        """Open another tab with a session of its own; files whose address ends with ``without`` are not loaded."""
        browser = self.page.context.browser
        assert browser is not None
        yield from _opened(browser, server, self.page.viewport_size or {}, without)

    def wait(self, script: str, argument: Any = None, timeout_ms: int = 60_000) -> None:
        """Wait until a script returns a true value."""
        self.page.wait_for_function(script, arg=argument, timeout=timeout_ms)


@contextmanager
def front_end(server: ComfyServer, width: int = 1320, height: int = 880) -> Iterator[FrontEnd]:
    """Open the front end of a running server in a new browser, which can reach no other address."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=list(OPTIONS))
        yield from _opened(browser, server, {"width": width, "height": height})
        browser.close()


def _opened(browser: Browser, server: ComfyServer, size: Any, without: str | None = None) -> Iterator[FrontEnd]:
    # These settings hide the tutorial and warnings that would cover the page.
    server.settings({"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False})
    page = browser.new_page(viewport=size)
    page.route("**/*", _only_from(server.url, without))
    opened = FrontEnd(page)
    opened.go_to(server)
    yield opened
    page.close()


def _only_from(url: str, without: str | None) -> Callable[[Route], None]:
    def let_through(route: Route) -> None:
        address = route.request.url
        if address.startswith((url, "data:", "blob:")) and not (
            without and address.partition("?")[0].endswith(without)
        ):
            route.continue_()
        else:
            route.abort()

    return let_through
