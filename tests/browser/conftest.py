# SPDX-License-Identifier: GPL-3.0-or-later
"""One server and one page for all tests of this folder. They run with ``--browser`` only (see tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import FrontEnd, front_end, what_is_missing
from comfy_server import ComfyServer
from extension import Extension

if missing := what_is_missing():  # said once, before any test runs
    pytest.exit(missing, returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    with ComfyServer(cpu=True, node_files=[Path(__file__).with_name("stranger_nodes.py")]) as running:
        yield running


@pytest.fixture(scope="session")
def page(server: ComfyServer) -> Iterator[FrontEnd]:
    with front_end(server) as opened:
        yield opened


@pytest.fixture(scope="module", params=["classic", "vue"])
def tab(request: pytest.FixtureRequest, server: ComfyServer, page: FrontEnd) -> Iterator[FrontEnd]:
    """Two tabs in turn: one draws nodes on the canvas, the other by Vue."""
    server.settings({"Comfy.VueNodes.Enabled": request.param == "vue"})
    with page.beside(server) as opened:
        assert opened.evaluate("() => Boolean(window.LiteGraph.vueNodesMode)") == (request.param == "vue")
        yield opened
    server.settings({"Comfy.VueNodes.Enabled": False})


@pytest.fixture
def extension(tab: FrontEnd) -> Iterator[Extension]:
    """The extension in the tab; a test that leaves an error in the page or the console fails."""
    tab.errors.clear()
    opened = Extension(tab)
    yield opened
    assert tab.errors == []
    assert opened.errors == []
