# SPDX-License-Identifier: GPL-3.0-or-later
"""The tests in this folder run in one process with the host, which this import brings up before they import it."""

from __future__ import annotations

from typing import Any

import pytest

import host_process as host


@pytest.fixture(autouse=True)
def host_in_the_results(record_property: Any) -> None:
    """The report says which ComfyUI was tested, for dev/pages.py; by test, because that travels between processes."""
    record_property("host", host.VERSION)
