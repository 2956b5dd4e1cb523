# SPDX-License-Identifier: GPL-3.0-or-later
"""One ComfyUI server, with the pack installed, for all tests of this folder: starting it takes most of their time.

The server remembers what it has already computed. A test that wants a node to run must send it something new, such as
a seed of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from comfy_server import ComfyServer


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    with ComfyServer(cpu=True) as running:
        yield running
