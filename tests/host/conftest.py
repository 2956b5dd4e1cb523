# SPDX-License-Identifier: GPL-3.0-or-later
"""The tests in this folder run in one process with the host, which this import brings up before they import it."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.utils

import host_process as host


@pytest.fixture(autouse=True)
def host_in_the_results(record_property: Any) -> None:
    """The report says which ComfyUI was tested, for dev/pages.py; by test, because that travels between processes."""
    record_property("host", host.VERSION)


@pytest.fixture
def traceable_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile needs here, and a count of graphs that begins at 0.

    The host's attention for CPUs asks for free memory in every call, which cannot be traced; that for GPUs can.
    """
    host_attention = importlib.import_module("comfy.ldm.modules.attention")
    for module in [module for path, module in sys.modules.items() if path.startswith("comfy.ldm.")]:
        if hasattr(module, "optimized_attention"):
            monkeypatch.setattr(module, "optimized_attention", host_attention.attention_pytorch)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
