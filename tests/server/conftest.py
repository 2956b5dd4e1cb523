# SPDX-License-Identifier: GPL-3.0-or-later
"""One ComfyUI server with the pack installed, for all tests in this folder, because starting it takes most of the time.

The server caches the outputs of nodes. A test that needs a node to run must send new inputs, such as an unused seed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from comfy_server import ComfyServer


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    with ComfyServer(cpu=True) as running:
        yield running
