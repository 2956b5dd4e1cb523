# SPDX-License-Identifier: GPL-3.0-or-later
"""One server and one page for all tests of this folder. They run with ``--browser`` only (see tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from browser import FrontEnd, front_end, what_is_missing
from comfy_server import ComfyServer

if missing := what_is_missing():  # said once, before any test runs
    pytest.exit(missing, returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    with ComfyServer(cpu=True) as running:
        yield running


@pytest.fixture(scope="session")
def page(server: ComfyServer) -> Iterator[FrontEnd]:
    with front_end(server) as opened:
        yield opened
